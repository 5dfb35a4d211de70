"""Scoring token trees with a decoder graph. Tokens are the only truth: the cache is a memory of them.

`score` is given all tokens every time and computes what its cache lacks, so prefill, a shared prefix, a rollback and
taking over from somebody else are one path.

An engine picks its kernels by the number of rows in a run, and kernels round differently: on a CPU a lone row goes its
own way, with some kernels also the last of an odd number. So the rows of a run can be filled up to a multiple of a
granule, for text with drafts to be bit for bit the text without (`probe.classify` finds the granule of a graph).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from edgekit.bundle.manifest import Decoding
from edgekit.errors import BadManifest, BadRequest
from edgekit.runtime.backends import Array, Session
from edgekit.runtime.llm.feeds import DIALECTS, Bias, Mask
from edgekit.runtime.llm.growing import open_cache
from edgekit.runtime.llm.tree import TokenTree

if TYPE_CHECKING:
    from edgekit.runtime.llm.prefix import PrefixStore

CHUNK = 128  # tokens per prefill run: products gain little by more, and attention is in the cache's reach
ROOT_ALONE = (0,)
FEW = 64  # up to this many rows the id buffers are kept between runs
NOTHING: Mapping[str, Array] = MappingProxyType({})


class Scores(NamedTuple):
    """What the model says after each node; valid until the next `score`.

    Attributes:
        logits: float32 (nodes, vocabulary).
        extra: the graph's other outputs, such as `hidden.3`, each (nodes, width).
    """

    logits: Array
    extra: Mapping[str, Array] = NOTHING


class Verifier(Protocol):
    """Whoever can score a tree: this machine, another one, or a test."""

    context_length: int

    def score(self, tokens: tuple[int, ...], tree: TokenTree) -> Scores:
        """Rows for every node of `tree`, which hangs from the last of `tokens`."""

    def keep(self, path: Sequence[int]) -> None:
        """The nodes that were accepted, root first; the others are forgotten."""


class LocalVerifier:
    """A decoder graph in a session of this process. One caller at a time.

    Args:
        session: the part that `decoding` names.
        decoding: dialect, cache layout, context length and window of the graph.
        chunk: tokens per prefill run.
        granule: rows of every run are filled up to a multiple of this, but for the last few of the context.
        prefixes: keys and values of earlier texts, to begin from.

    Attributes:
        chains_only: the graph scores chains and no trees with branches.

    Raises:
        BadManifest: a graph whose inputs are not its dialect's.
    """

    def __init__(
        self,
        session: Session,
        decoding: Decoding,
        *,
        chunk: int = CHUNK,
        granule: int = 1,
        prefixes: PrefixStore | None = None,
    ) -> None:
        self.granule = granule
        self.prefixes = prefixes
        self._session, self._decoding = session, decoding
        self.context_length = decoding.context_length
        self.vocab_size = decoding.vocab_size
        self._chunk = chunk
        self._kv = open_cache(decoding.dialect, session, decoding.kv, decoding.context_length)
        self._feeds = DIALECTS[decoding.dialect]()
        self.chains_only = self._feeds.chains_only
        names = {spec.name for spec in session.inputs}
        windows = {"attention_bias": None, "attention_bias_sliding": decoding.sliding_window}
        self._biases: list[Bias | Mask] = [Mask()] if Mask.name in names else []
        self._biases += [Bias(name, windows[name], decoding.kv.dtype) for name in windows if name in names]
        if "attention_bias_sliding" in names and decoding.sliding_window is None:
            raise BadManifest("the decoder has an attention_bias_sliding input and its manifest no sliding_window")
        shared = ("logits", "present.")
        self.extra = tuple(spec.name for spec in session.outputs if not spec.name.startswith(shared))
        self._logits = np.zeros(decoding.vocab_size, np.float32)
        self._buffers: dict[tuple[int, int, int, int], tuple[dict[str, Array], dict[str, Array]]] = {}
        self._cached: tuple[int, ...] = ()  # the tokens whose keys and values lie in slots 0, 1, ...
        self._pending: TokenTree | None = None  # the tree in the slots after them

    @property
    def cached(self) -> tuple[int, ...]:
        """The tokens whose keys and values are in the cache."""
        return self._cached

    def shared(self, tokens: tuple[int, ...]) -> int:
        """How many of `tokens` need no computing: what the cache begins with too, but never the last of them."""
        cached = self._cached
        same = len(cached)
        if tokens[:same] != cached:
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(cached, tokens, strict=False)))
        return min(same, len(tokens) - 1)

    def recall(self, tokens: tuple[int, ...]) -> int:
        """Bring the cache to the longest known beginning of `tokens`, own or stored; how many of them it covers."""
        same = self.shared(tokens)
        if same < len(self._cached):
            self.rollback(same)
        self._pending = None
        if self.prefixes is not None and same < len(tokens) - 1:
            stored = min(self.prefixes.longest(tokens), len(tokens) - 1)
            if stored > same:
                self._kv.reserve(stored, same)
                self._kv.restore(same, self.prefixes.fetch(tokens, same, stored))
                self._cached, same = tokens[:stored], stored
        return same

    def remember(self) -> None:
        """Put what is cached into the prefix store, where there is one."""
        if self.prefixes is not None:
            self.prefixes.insert(self._cached, self._kv.snapshot)

    def fork(self) -> LocalVerifier:
        """An independent verifier on the same graph that remembers the same tokens."""
        twin = LocalVerifier(
            self._session, self._decoding, chunk=self._chunk, granule=self.granule, prefixes=self.prefixes
        )
        twin._kv, twin._cached = self._kv.fork(len(self._cached)), self._cached
        return twin

    def rollback(self, length: int) -> None:
        """Forget all but the first `length` cached tokens; nothing is moved."""
        self._cached, self._pending = self._cached[:length], None

    def score(self, tokens: tuple[int, ...], tree: TokenTree) -> Scores:
        """Rows for every node of `tree`.

        Args:
            tokens: the whole text so far.
            tree: its root is `tokens[-1]`.

        Raises:
            BadRequest: no tokens, a root that is not the last of them, an id outside the vocabulary, more tokens than
                the context holds, or branches where `chains_only`.
            SessionFailed: the engine failed; the verifier can be used again.
        """
        if not tokens or tree.tokens[0] != tokens[-1]:
            raise BadRequest(f"a tree hangs from the last token of the text; the text ends {tokens[-3:]}, {tree=}")
        if self.chains_only and not tree.is_chain:
            raise BadRequest(
                f"{tree} has branches, and this graph's mask cannot keep them apart (dialect "
                f"{self._decoding.dialect}): score its spine instead"
            )
        same = self.recall(tokens)
        lead = tokens[same:-1]
        self._check((*lead, *tree.tokens))
        last = len(tokens) - 1 + len(tree)
        self._kv.reserve(max(last, min(last + self.granule - 1, self.context_length)), same)
        while lead and len(lead) + len(tree) > self._chunk:
            piece, lead = lead[: self._chunk], lead[self._chunk :]
            self._run(TokenTree.chain(piece[0], piece[1:]), wanted=1)
            self._cached += piece
        scores = self._score(lead, tree)
        self._cached += lead
        self._pending = tree
        return scores

    def keep(self, path: Sequence[int]) -> None:
        """Move the rows of the accepted nodes together; the rest of the tree is forgotten.

        Args:
            path: node indices from the root downwards.

        Raises:
            BadRequest: there is no scored tree, or `path` is no path of it.
        """
        tree, base = self._pending, len(self._cached)
        if tree is not None and path == ROOT_ALONE:  # every token of ordinary decoding: nothing to check or to move
            self._cached += tree.tokens[:1]
            self._pending = None
            return
        if tree is None or tuple(tree.parents[node] for node in path) != (-1, *path[:-1]):
            raise BadRequest(f"{tuple(path)} is no path from the root of the tree scored last ({tree})")
        if tuple(path) != tuple(range(len(path))):
            if self._kv.can_move:
                self._kv.move([base + node for node in path], base)
            else:  # keep what already lies in place; the next `score` recomputes the others
                path = [node for place, node in enumerate(path) if place == node]
        self._cached += tuple(tree.tokens[node] for node in path)
        self._pending = None

    def _score(self, lead: tuple[int, ...], tree: TokenTree) -> Scores:
        """Run `lead` and `tree` together, rows of the tree alone."""
        whole = tree.after(lead)
        if self._cached or whole.is_chain or not self._feeds.empty_means_causal:
            return self._run(whole, wanted=len(tree))
        # The root goes first, so that the branches meet a cache that is not empty.
        stem = TokenTree.chain(whole.tokens[0], whole.tokens[1 : len(lead) + 1])
        first = self._run(stem, wanted=1)
        kept = first.logits.copy(), {name: value.copy() for name, value in first.extra.items()}
        rest = self._run(whole, wanted=len(tree) - 1, skip=len(stem))
        joined = {name: np.concatenate([value, rest.extra[name]]) for name, value in kept[1].items()}
        return Scores(np.concatenate([kept[0], rest.logits]), joined)

    def _run(self, tree: TokenTree, *, wanted: int, skip: int = 0) -> Scores:
        """Feed the nodes from `skip` on; the rows of the last `wanted` of them.

        The slots before node 0 hold `self._cached`; the nodes before `skip` are in the cache already.
        """
        base, count = len(self._cached), len(tree) - skip
        spare = -count % self.granule
        if spare and base + len(tree) + spare <= self.context_length:  # copies of the last node, one below the other
            tree = TokenTree(
                (*tree.tokens, *tree.tokens[-1:] * spare), (*tree.parents, *range(len(tree) - 1, len(tree) + spare - 1))
            )
        else:
            spare = 0
        count += spare
        total = base + len(tree)
        feeds, into = self._rows(count, wanted, spare)
        feeds["input_ids"][0] = tree.tokens[skip:]
        feeds["position_ids"][0] = [base + depth for depth in tree.depths[skip:]]
        self._feeds.place(total, count)
        width = self._feeds.width(total, self._kv.capacity)
        for bias in self._biases:
            feeds[bias.name] = bias.fill(base, tree, skip, width)
        out = self._kv.run(total - count, feeds, into)
        logits: Array = out["logits"][0][:wanted]
        return Scores(logits, {name: out[name][0][:wanted] for name in self.extra} if self.extra else NOTHING)

    def _rows(self, count: int, wanted: int, spare: int) -> tuple[dict[str, Array], dict[str, Array]]:
        """The arrays that a run is fed from and answers to; small runs find theirs again, bound.

        Args:
            count: tokens, `spare` of them at the end there for company only.
            wanted: rows before these; the last of them is asked for again to fill up the granule.
            spare: see `count`.
        """
        made = wanted + -wanted % self.granule
        if made * self.vocab_size > self._logits.size:
            self._logits = np.zeros(made * self.vocab_size, np.float32)
            self._buffers.clear()
        found = self._buffers.get((count, spare, wanted, made))
        if found is None:
            end = count - spare
            feeds: dict[str, Array] = {
                "input_ids": np.zeros((1, count), np.int64),
                "position_ids": np.zeros((1, count), np.int64),
                "rows": np.minimum(np.arange(end - wanted, end - wanted + made, dtype=np.int64), end - 1),
                **self._feeds.arrays,
            }
            logits = self._logits[: made * self.vocab_size].reshape(1, made, self.vocab_size)
            found = feeds, {"logits": logits}
            if count <= FEW:
                self._buffers[count, spare, wanted, made] = found
        return found

    def _check(self, ids: tuple[int, ...]) -> None:
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            wrong = next(token for token in ids if not 0 <= token < self.vocab_size)
            raise BadRequest(f"token {wrong} is outside the model's vocabulary of {self.vocab_size}")
