"""What drafters that copy share: an index of how a text ends, and the tree of what followed before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, takewhile
from math import log, log1p
from typing import NamedTuple

from edgekit.errors import BadRequest
from edgekit.runtime.llm.drafters import Ask
from edgekit.runtime.llm.tree import Source, TokenTree

Gram = tuple[int, ...]

GUARD = 32  # tokens before the old end that must stand where they stood for a text to pass as the old one grown


class SuffixIndex:
    """Earlier places of a growing text that end like it does now.

    Every n-gram from `shortest` to `longest` tokens is known with its last end, and every end with the ends before it
    of the same n-grams. An n-gram that occurs once is not followed up: its extensions are entered when it comes again,
    so that a token costs about as many look-ups as its match is long. The ends before double as an undo log.
    """

    def __init__(self, longest: int, shortest: int) -> None:
        if not 1 <= shortest <= longest:
            raise BadRequest(f"the shortest suffix looked up is {shortest} and the longest {longest}; 1 <= min <= max")
        self.longest, self.shortest = longest, shortest
        self._tokens: Gram = ()
        self._clear()

    def follow(self, tokens: Gram) -> None:
        """Bring the index to `tokens`; what they share with the text before is reused (see `shared`)."""
        old = self._tokens
        kept = shared(old, tokens)
        if kept < len(old) - kept:  # cheaper begun anew than undone
            self._clear()
            kept = 0
        else:
            for end in range(len(old), kept, -1):
                self._remove(end)
        self._tokens = tokens
        for end in range(kept + 1, len(tokens) + 1):
            self._add(end)

    def matches(self, most: int, *, shorter: bool) -> list[tuple[int, int]]:
        """(length, end) of at most `most` earlier ends of the text's suffixes: longest first, then most recent.

        A match of `longest` tokens may be longer. With `shorter` also the matches that are shorter than the longest.
        """
        found: dict[int, int] = {}
        links = self._links[-1]
        for level in reversed(range(0 if shorter else max(0, len(links) - 1), len(links))):
            end = links[level]
            while end and len(found) < most:
                found.setdefault(end, level + self.shortest)
                before = self._links[end]
                end = before[level] if level < len(before) else 0
        return [(length, end) for end, length in found.items()]

    def _clear(self) -> None:
        self._levels: list[tuple[int, dict[Gram, int]]] = [(n, {}) for n in range(self.shortest, self.longest + 1)]
        self._links: list[Gram] = [()]  # of each end: the end before it of the same n-gram, shortest first

    def _add(self, end: int) -> None:
        tokens, links, before = self._tokens, [], 0
        for size, last in self._levels:
            if before >= size:  # the n-gram one shorter is no longer alone: enter its other place too
                last.setdefault(tokens[before - size : before], before)
            if size > end:
                break
            gram = tokens[end - size : end]
            before = last.get(gram, 0)
            last[gram] = end
            if not before:
                break
            links.append(before)
        self._links.append(tuple(links))

    def _remove(self, end: int) -> None:
        """Undo `_add` of the last end; `_tokens` is still the text it was added from."""
        links = self._links.pop()
        for level, (size, last) in enumerate(self._levels):
            gram = self._tokens[max(0, end - size) : end]
            if last.get(gram) != end:
                break
            if level < len(links):
                last[gram] = links[level]
            else:
                del last[gram]


class Copy(NamedTuple):
    """A place that continues like the text.

    Attributes:
        length: how many tokens before the place equal the end of the text.
        place: of the first token that follows.
        run: the tokens that follow.
    """

    length: int
    place: int
    run: Sequence[int]


Branch = tuple[int, float, list[Copy]]  # a next token, its log-probability, the copies that go on with it
Origin = Callable[[Copy, int], Source]  # where a copy's token at a depth (from 0) comes from


def branches(copies: Sequence[Copy], depth: int) -> list[Branch]:
    """The distinct tokens at `depth` (from 0) of the runs, in the order of the first copy that has each.

    Prediction by partial matching: after a match of m tokens, c of n continuations that agree have probability
    c / (n + 1/m). What is left, 1 / (mn + 1), goes to the continuations of shorter matches. So confidence rises with
    the length of the match and with agreement. A draft that stands lengthens the match by one. (Cleary and Witten 1984,
    "Data compression using adaptive coding and partial string matching", with an escape count of 1/m.)

    Args:
        copies: longest match first.
        depth: 0 for the token after the text.
    """
    if len(copies) == 1:
        copy = copies[0]
        return [(copy.run[depth], -log1p(1 / (copy.length + depth)), [copy])] if depth < len(copy.run) else []
    found: dict[int, Branch] = {}
    escape = 0.0
    going = [copy for copy in copies if depth < len(copy.run)]
    for length, group in groupby(going, key=lambda copy: copy.length):
        agreeing: dict[int, list[Copy]] = {}
        for copy in group:
            agreeing.setdefault(copy.run[depth], []).append(copy)
        total = sum(map(len, agreeing.values())) + 1 / (length + depth)
        for token, those in agreeing.items():
            if token in found:
                found[token][2].extend(those)
            else:
                found[token] = token, escape + log(len(those) / total), those
        escape -= log(total * (length + depth))
    return list(found.values())


def agreement(copies: Sequence[Copy]) -> list[float]:
    """`branches` along the first of copies of one length, for a chain: the log-probability of each token of its run."""
    run, length = copies[0].run, copies[0].length
    log_q: list[float] = []
    while len(copies) > 1 and len(log_q) < len(run):
        token, total = run[len(log_q)], len(copies)
        copies = [copy for copy in copies if copy.run[len(log_q)] == token]
        log_q.append(log(len(copies) / (total + 1 / (length + len(log_q)))))
    log_q += [-log1p(1 / match) for match in range(length + len(log_q), length + len(run))]
    return log_q


def fill(
    root: int, ask: Ask, copies: Sequence[Copy], origin: Origin, nowhere: Source, *, frequent_first: bool = False
) -> TokenTree:
    """Fill the shape asked for with what follows.

    Args:
        root: the last token of the text.
        ask: its shape says which siblings are wanted where, its room how deep the tree may be.
        copies: longest match first.
        origin: the source of a draft.
        nowhere: the root's source.
        frequent_first: siblings by falling probability; otherwise in the order of the copies.
    """
    tokens, parents, log_q, sources = [root], [-1], [0.0], [nowhere]
    depths, below = [0], [_ranked(copies, 0, frequent_first)]  # of each node of the tree, its children to be
    at = [0]  # where each node of the shape went, -1 where nothing fits it
    for above, rank in zip(ask.shape.parents[1:], ask.shape.ranks[1:], strict=True):
        parent = at[above]
        if parent < 0 or depths[parent] >= ask.room or rank >= len(below[parent]):
            at.append(-1)
            continue
        token, confidence, those = below[parent][rank]
        depth = depths[parent]
        at.append(len(tokens))
        tokens.append(token)
        parents.append(parent)
        log_q.append(confidence)
        sources.append(origin(those[0], depth))
        depths.append(depth + 1)
        below.append(_ranked(those, depth + 1, frequent_first))
    return TokenTree(tuple(tokens), tuple(parents), tuple(log_q), tuple(sources))


def _ranked(copies: Sequence[Copy], depth: int, frequent_first: bool) -> list[Branch]:
    found = branches(copies, depth)
    return sorted(found, key=lambda branch: -branch[1]) if frequent_first and len(found) > 1 else found


def shared(old: Gram, tokens: Gram) -> int:
    """How many tokens of a text the text after it begins with.

    Growth is told by the `GUARD` tokens before the old end, so that a step of decoding costs its new tokens and no
    more. A text that differs only before these is taken for the old one grown, which costs guesses and nothing else.
    """
    size = len(old)
    guard = max(0, size - GUARD)
    if len(tokens) >= size and tokens[guard:size] == old[guard:]:
        return size
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(old, tokens, strict=False)))
