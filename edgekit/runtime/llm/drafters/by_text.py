"""Drafting with a model of another tokenizer: what goes between the two is text.

Speculative decoding for heterogeneous vocabularies by re-encoding (Timor et al. 2025, arXiv:2502.05202, string-level
exact match; "universal assisted generation" of transformers). The target draws from its own rows, so a wrong border
between the two tokenizers costs a guess and nothing else.
"""

from __future__ import annotations

import re
from math import ceil

from edgekit.runtime.llm.accept import Accepted
from edgekit.runtime.llm.drafters import Ask
from edgekit.runtime.llm.tree import Source, TokenTree
from edgekit.runtime.llm.verifier import LocalVerifier, Scores
from edgekit.runtime.tokenizer import REPLACEMENT, StreamingDetokenizer, Tokenizer

LOOK_BEHIND = 10  # tokens before a border that are encoded again with what follows it
TRIES = 4  # places to begin looking behind from: in the middle of a word the same tokens may not come back
LONGEST = 32  # characters of a token, as good as always
ROOT = (-1,)

_WORD = re.compile(r"(?<=\S)(?= )")  # where tokenizers cut a text before they look for tokens


class ByTextDraft:
    """A draft model, told the text and asked for text.

    The text so far is encoded with the draft's tokenizer, the draft continues it greedily (its noise could not be the
    target's), and the new text is encoded with the target's tokenizer behind the last tokens of the target's text. If
    these come back as they were, what follows them is proposed. A chain; its log-probabilities are not known, since the
    tokens are not those that the draft chose.

    Args:
        verifier: the draft model; nobody else's.
        own: its tokenizer.
        target: the target's.
    """

    name = "model"
    outputs: tuple[str, ...] = ()

    def __init__(self, verifier: LocalVerifier, own: Tokenizer, target: Tokenizer) -> None:
        self.verifier = verifier
        self._own, self._target = own, target
        self._reading = Retokenizer(target, own)

    def propose(self, tokens: tuple[int, ...], ask: Ask) -> TokenTree:
        """A chain along the first nodes of the shape; the root alone where the text cannot go over."""
        depth = min(ask.shape.depth, ask.room)
        drafts: list[int] = []
        if depth > 0:
            ids = self._reading.follow(tokens)
            room = self.verifier.context_length + 1 - len(ids)
            count = min(room, ceil(depth * len(ids) / len(tokens)))  # as many as make up `depth` of the target's
            if ids and self._reading.settled and count > 0:
                drafts = self._behind(tokens, self._continued(ids, count))[:depth]
        return TokenTree.chain(tokens[-1], drafts, source=Source(self.name))

    def observe(self, tree: TokenTree, step: Accepted, scores: Scores) -> None:
        """Nothing to do: the text says what stands."""

    def _continued(self, ids: tuple[int, ...], count: int) -> str:
        """The text of `count` greedy tokens; less where the draft would end it."""
        before = ids[-LOOK_BEHIND:]
        text = ids
        for _ in range(count):
            row = self.verifier.score(text, TokenTree(text[-1:], ROOT)).logits[0]
            self.verifier.keep((0,))
            token = int(row.argmax())
            if self._own.is_silent(token):
                break
            text += (token,)
        known = self._own.decode(before)
        whole = self._own.decode(before + text[len(ids) :])
        return whole[len(known) :].rstrip(REPLACEMENT) if whole.startswith(known) else ""

    def _behind(self, tokens: tuple[int, ...], text: str) -> list[int]:
        """`text` in the target's tokens, as they follow the last of `tokens`."""
        if not text:
            return []
        for reach in range(LOOK_BEHIND, LOOK_BEHIND + TRIES):
            tail = list(tokens[-reach:])
            silent = [place for place, token in enumerate(tail) if self._target.is_silent(token)]
            tail = tail[silent[-1] + 1 :] if silent else tail
            again = self._target.encode(self._target.decode(tail) + text, add_special_tokens=False)
            if again[: len(tail)] == tail:
                return again[len(tail) :]
        return []


class Retokenizer:
    """The tokens of one tokenizer for a growing text in tokens of another.

    Only the end of the text is encoded when it grows: it is cut between words, where encoding the parts gives the
    tokens of the whole. Where there are none, as in Chinese, it is cut between two tokens that lie well before the end.
    """

    WINDOW = 256  # characters that are encoded again at least

    def __init__(self, theirs: Tokenizer, ours: Tokenizer) -> None:
        self._theirs, self._ours = theirs, ours
        self._tokens: tuple[int, ...]
        self._words: StreamingDetokenizer
        self._ids: tuple[int, ...]  # of what stands before the tail
        self._before: str  # the last words before the tail
        self._tail: str  # the text whose tokens may still change
        self._waiting: bool
        self._begin()

    @property
    def settled(self) -> bool:
        """Whether the text ends between characters."""
        return not self._waiting

    def follow(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Our tokens for the text of `tokens`, special ones left out; a text that did not just grow is read anew."""
        size = len(self._tokens)
        if tokens[:size] != self._tokens:
            self._begin()
            size = 0
        new = tokens[size:]
        piece = self._words.feed(new)
        spoken = [token for token in new if not self._theirs.is_silent(token)]
        self._waiting = not piece and (self._waiting or bool(spoken))
        self._tokens, self._tail = tokens, self._tail + piece
        if len(self._tail) > 2 * self.WINDOW:
            self._settle()
        return self._ids + self._encoded(self._tail)

    def _begin(self) -> None:
        self._tokens, self._ids = (), ()
        self._words = self._theirs.stream()
        self._before, self._tail = "", ""
        self._waiting = False

    def _settle(self) -> None:
        """Move what is far from the end out of the tail."""
        limit = len(self._tail) - self.WINDOW
        cuts = [cut.start() for cut in _WORD.finditer(self._tail, 0, limit)]
        cut = cuts[-1] if cuts else self._seam(limit)
        self._ids += self._encoded(self._tail[:cut])
        start = max(cuts[-4] if len(cuts) >= 4 else 0, cut - self.WINDOW)
        self._before, self._tail = self._tail[start:cut], self._tail[cut:]

    def _seam(self, limit: int) -> int:
        """The last place up to `limit`, or near it, where no token goes across."""
        whole = self._encoded(self._tail)
        for cut in range(limit, max(1, limit - LONGEST), -1):
            part = self._encoded(self._tail[:cut])
            if whole[: len(part)] == part:
                return cut
        return limit

    def _encoded(self, text: str) -> tuple[int, ...]:
        """The tokens of a text that follows `_before`; encoded behind it, since tokenizers mark where a text begins."""
        if not self._before:
            return tuple(self._ours.encode(text))
        known = self._ours.encode(self._before, add_special_tokens=False)
        both = self._ours.encode(self._before + text, add_special_tokens=False)
        if both[: len(known)] != known:  # a token goes across, after all: rather an odd token than a lost character
            return tuple(self._ours.encode(text, add_special_tokens=False))
        return tuple(both[len(known) :])
