"""Drafting with a smaller model of the same vocabulary, in chains and in trees.

Speculative decoding as in Leviathan et al. 2023 (arXiv:2211.17192); trees level by level as in SpecInfer (Miao et al.
2023, arXiv:2305.09781). The draft draws with the noise of the target's own draws, so that a draft which agrees with its
target is always right, at any temperature (coupled sampling, Daliri et al. 2024, arXiv:2408.07978).
"""

from __future__ import annotations

from functools import lru_cache
from math import inf, log

import numpy as np

from edgekit.errors import BadRequest
from edgekit.runtime.llm.accept import Accepted
from edgekit.runtime.llm.drafters import Ask
from edgekit.runtime.llm.probs import Law, Row, Sampling, gumbel
from edgekit.runtime.llm.tree import Shape, Source, TokenTree
from edgekit.runtime.llm.verifier import LocalVerifier, Scores

Picks = list[tuple[int, float]]  # tokens and their log-probabilities


class ModelDraft:
    """A draft model, one run per level of the tree, and none for what is known already.

    Its cache follows the text like the verifier's: the tokens it has not seen, the target's own draw among them, are
    part of the next first run. Where the levels of a shape hang from one node, its run has only the rows of that level.

    Args:
        verifier: the draft model; nobody else's.
        vocabulary: ids the target knows, where they are not those of the draft: models pad theirs differently. Others
            are never proposed, and after a text that holds ids unknown to the draft nothing is.
        stop_below: nothing is drafted after a node whose probability, times those of its ancestors, is below this; the
            node itself still is. 0 never stops.
        rows: fill `TokenTree.q`, as rejection sampling needs it. Siblings are then drawn without replacement.

    Raises:
        BadRequest: `stop_below` is no probability.
    """

    name = "model"
    outputs: tuple[str, ...] = ()

    def __init__(
        self,
        verifier: LocalVerifier,
        *,
        vocabulary: int | None = None,
        stop_below: float = 0.0,
        rows: bool = False,
    ) -> None:
        if not 0 <= stop_below <= 1:
            raise BadRequest(f"stop_below is {stop_below}; it is a probability, between 0 (never stop) and 1")
        self.verifier = verifier
        self.rows = rows
        self._width = verifier.vocab_size if vocabulary is None else vocabulary
        self._least = log(stop_below) if stop_below > 0 else -inf

    def propose(self, tokens: tuple[int, ...], ask: Ask) -> TokenTree:
        """The shape asked for, its nodes level by level; less of it where drafting stopped, or the context is full."""
        wanted = _children(Shape.chain(ask.shape.depth) if self.verifier.chains_only else ask.shape)
        room = min(ask.room, self.verifier.context_length + 1 - len(tokens))
        tree = _Growing(tokens[-1], Source(self.name))
        if not wanted[0] or room < 1 or max(tokens[self.verifier.shared(tokens) :]) >= self.verifier.vocab_size:
            return tree.grown(self._width)
        text, run, front = tokens, [0], [0]  # the run's first node ends the text; the front is at the depth reached
        for _ in range(room):
            scores = self.verifier.score(text, tree.part(run))
            above, front = front, []
            for node in above:
                row = scores.logits[run.index(node)]
                front += self._sprout(tree, node, row, (*text, *tree.path(run[0], node)), ask.sampling, wanted)
            stems = {tree.parents[node] for node in front} or set(above[:1])
            if len(stems) == 1:  # everything to come hangs from one node: take the text there
                stem = stems.pop()
                self.verifier.keep(tuple(run.index(node) for node in tree.trail(run[0], stem)))
                text, run = (*text, *tree.path(run[0], stem)), [stem]
                if len(front) == 1:
                    text, run = (*text, tree.tokens[front[0]]), []
            front = front[: self.verifier.context_length + 1 - len(text) - len(run)]  # what its context still holds
            if not front:
                break
            run += front
        return tree.grown(self._width)

    def observe(self, tree: TokenTree, step: Accepted, scores: Scores) -> None:
        """Nothing to do: the cache finds out by itself what of it stands."""

    def _sprout(
        self,
        tree: _Growing,
        node: int,
        row: Row,
        context: tuple[int, ...],
        sampling: Sampling,
        wanted: tuple[tuple[tuple[int, int], ...], ...],
    ) -> list[int]:
        """Give `node` its children; those of them that want children themselves."""
        children = wanted[tree.places[node]]
        count = min(1 + children[-1][1], self._width, self.verifier.vocab_size)
        row = row[: self._width]
        if self.rows and sampling.temperature > 0:
            tree.laws[node] = law = sampling.law(row, context)
            picks = drawn(law, count, sampling.seed, len(context))
        else:
            picks = likeliest(row, context, count, sampling)
        fertile = []
        for place, rank in children:
            if rank < len(picks):
                token, log_q = picks[rank]
                child = tree.add(token, node, log_q, place)
                if wanted[place] and tree.reach[child] >= self._least:
                    fertile.append(child)
        return fertile


class _Growing:
    """A tree under construction.

    Attributes:
        reach: log-probability of the way from the root to each node.
        places: of each node in the shape.
        laws: what the children of a node were drawn from, where that is wanted.
    """

    def __init__(self, root: int, source: Source) -> None:
        self.tokens, self.parents, self.places = [root], [-1], [0]
        self.log_q, self.reach = [0.0], [0.0]
        self.laws: dict[int, Law] = {}
        self._source = source

    def add(self, token: int, parent: int, log_q: float, place: int) -> int:
        """A new node, and its index."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.places.append(place)
        self.log_q.append(log_q)
        self.reach.append(self.reach[parent] + log_q)
        return len(self.tokens) - 1

    def trail(self, start: int, node: int) -> list[int]:
        """The nodes from `start` down to `node`."""
        trail = [node]
        while trail[-1] != start:
            trail.append(self.parents[trail[-1]])
        return trail[::-1]

    def path(self, start: int, node: int) -> list[int]:
        """The tokens after `start` down to `node`."""
        return [self.tokens[step] for step in self.trail(start, node)[1:]]

    def part(self, nodes: list[int]) -> TokenTree:
        """The tree of these nodes alone; the first of them is its root."""
        index = {node: place for place, node in enumerate(nodes)}
        parents = [index[self.parents[node]] for node in nodes[1:]]
        return TokenTree(tuple(self.tokens[node] for node in nodes), (-1, *parents))

    def grown(self, width: int) -> TokenTree:
        """The tree itself; `width` is that of the target's rows."""
        q = np.zeros((len(self.tokens), width)) if self.laws else None
        for node, law in self.laws.items():
            assert q is not None
            q[node, : len(law)] = law
        sources = (self._source,) * len(self.tokens)
        return TokenTree(tuple(self.tokens), tuple(self.parents), tuple(self.log_q), sources, q)


def likeliest(row: Row, context: tuple[int, ...], count: int, sampling: Sampling) -> Picks:
    """The `count` tokens of the largest noisy scores, or of the largest logits where sampling is greedy, best first.

    Each is the draw of `sampling` when those before it cannot be drawn, so the filters never leave too few. The
    log-probabilities are those at the sampling temperature, or at 1 where it is 0, before any filter.

    Args:
        row: float32 (vocabulary,), left as it is.
        context: the tokens before it.
        count: at most the vocabulary.
        sampling: how the target will draw.
    """
    scaled = row - row.max()
    if sampling.temperature > 0:
        scaled *= np.float32(1 / sampling.temperature)
    total = log(float(np.exp(scaled).sum()))
    picks: Picks = []
    while True:
        token = sampling(row, context)
        picks.append((token, float(scaled[token]) - total))
        if len(picks) == count:
            return picks
        if len(picks) == 1:
            row = row.copy()
        row[token] = -np.inf


def drawn(law: Law, count: int, seed: int, position: int) -> Picks:
    """Up to `count` tokens drawn from `law` without replacement, in their order.

    These are the largest of log-probability plus Gumbel noise (Kool et al. 2019, arXiv:1903.06059); the noise is that
    of own draws, which rejection sampling does not use otherwise.
    """
    tokens = np.flatnonzero(law)
    chances = np.log(law[tokens])
    noisy = chances + gumbel(tokens, seed, position)
    order = [int(noisy.argmax())] if count == 1 else np.argsort(-noisy)[:count].tolist()
    return [(int(tokens[place]), float(chances[place])) for place in order]


@lru_cache(maxsize=64)
def _children(shape: Shape) -> tuple[tuple[tuple[int, int], ...], ...]:
    """(node, rank) of the children of every node of a shape, by rank."""
    below: list[list[tuple[int, int]]] = [[] for _ in shape.parents]
    for node, (parent, rank) in enumerate(zip(shape.parents, shape.ranks, strict=True)):
        if parent >= 0:
            below[parent].append((node, rank))
    return tuple(tuple(sorted(children, key=lambda child: child[1])) for children in below)
