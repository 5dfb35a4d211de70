"""Copy from the user's own texts, and say from where.

Retrieval in place of a draft model, after REST (arXiv:2311.08252); attribution of copied spans after NEST
(arXiv:2405.19325), with an exact verifier, so the texts change how fast an answer comes and never which answer.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekit.errors import BadRequest
from edgekit.runtime.llm.accept import Accepted
from edgekit.runtime.llm.drafters import Ask
from edgekit.runtime.llm.drafters.suffix import Copy, fill
from edgekit.runtime.llm.tree import Source, TokenTree
from edgekit.runtime.llm.verifier import Scores
from edgekit.runtime.tokenizer import Tokenizer

CROWD = 64  # places looked at; a sample of them where there are more
LIMIT = 32 * 2**20  # bytes of text
BETWEEN = 2**32 - 1  # stands between documents; no token has this id
WORD = 4  # bytes of a token


class CorpusDraft:
    """Continues the longest end of the text that stands in the documents, most frequent continuation first.

    Args:
        documents: token ids by name; see `read_documents`.
        longest: suffix looked up, in tokens.
        shortest: a match below this many tokens proposes nothing.

    Raises:
        BadRequest: not 1 <= shortest <= longest, or an id that is no token.
    """

    name = "corpus"
    outputs: tuple[str, ...] = ()

    def __init__(self, documents: Mapping[str, Sequence[int]], longest: int = 16, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise BadRequest(f"the shortest suffix looked up is {shortest} and the longest {longest}; 1 <= min <= max")
        self.shortest = shortest
        self._names = tuple(sorted(documents))
        self._index = ContextIndex([documents[name] for name in self._names], longest)

    def propose(self, tokens: tuple[int, ...], ask: Ask) -> TokenTree:
        """What followed in the documents; the root alone where nothing matches."""
        depth = min(len(ask.shape.parents) - 1, ask.room)
        if depth <= 0:
            return TokenTree(tokens[-1:], (-1,))
        found = self._index.matches(tokens, self.shortest, shorter=any(ask.shape.ranks))
        copies = [Copy(length, place, self._index.run(place, depth)) for length, place in found]
        return fill(tokens[-1], ask, copies, self._origin, Source(self.name), frequent_first=True)

    def observe(self, tree: TokenTree, step: Accepted, scores: Scores) -> None:
        """Nothing to learn: the documents stay what they are."""

    def _origin(self, copy: Copy, depth: int) -> Source:
        document, offset = self._index.document(copy.place)
        return Source(self.name, self._names[document], offset + depth)


class ContextIndex:
    """The places of some documents, sorted by the tokens before them, read backwards.

    Places with the same last m tokens before them lie side by side, for every m, so the place of a text's end in this
    order has the longest matches next to it and shorter ones further away. It is the suffix array (Manber and Myers
    1990) of the documents backwards, sorted as far as matches are looked for, with the same doubling of sorted lengths.
    A place takes twelve bytes.

    Args:
        documents: token ids.
        longest: tokens before a place that count.

    Raises:
        BadRequest: an id that is no token.
    """

    def __init__(self, documents: Sequence[Sequence[int]], longest: int) -> None:
        self.longest = longest
        parts = [np.asarray(ids, np.int64).reshape(-1) for ids in documents]
        for ids in parts:
            if len(ids) and not 0 <= ids.min() <= ids.max() < BETWEEN:
                raise BadRequest(f"a document holds token {ids.min()} or {ids.max()}; ids are in [0, {BETWEEN})")
        self._starts = list(accumulate((len(ids) + 1 for ids in parts), initial=1))
        text = np.full(self._starts[-1], BETWEEN, np.uint32)
        for start, ids in zip(self._starts, parts, strict=False):
            text[start : start + len(ids)] = ids
        self._text, self._size = text.data, len(text)
        self._backwards = text[::-1].astype(">u4").tobytes()  # bytes sort like the tokens they stand for
        self._order = _by_context(text, longest).data

    def matches(self, tokens: Sequence[int], shortest: int, *, shorter: bool) -> list[tuple[int, int]]:
        """(length, place) of places before which the text's end stands, longest match first, about `CROWD` at most.

        Where there are more, they are taken at even distances in the order. With `shorter` also the places whose match
        is shorter than the longest.
        """
        end = tokens[: -self.longest - 1 : -1]
        wanted = struct.pack(f">{len(end)}I", *end)
        low = high = bisect_left(self._order, wanted, key=lambda place: self._before(place, len(wanted)))
        found: list[tuple[int, int]] = []
        while (length := max(self._common(low - 1, wanted), self._common(high, wanted))) >= shortest:
            left, right = low, high
            low, high = self._spread(wanted[: WORD * length], left, right)
            step = -(-(left - low + high - right) // (CROWD - len(found)))
            places = self._order[low:left:step].tolist() + self._order[right:high:step].tolist()
            found += [(length, place) for place in places]
            if not shorter or len(found) >= CROWD:
                break
        return found

    def run(self, place: int, depth: int) -> list[int]:
        """`depth` tokens from `place` on, fewer where the document ends."""
        run: list[int] = self._text[place : place + depth].tolist()
        return run[: run.index(BETWEEN)] if BETWEEN in run else run

    def document(self, place: int) -> tuple[int, int]:
        """Which document a place is in, and how far in."""
        number = bisect_right(self._starts, place) - 1
        return number, place - self._starts[number]

    def _before(self, place: int, width: int) -> bytes:
        at = WORD * (self._size - place)
        return self._backwards[at : at + width]

    def _spread(self, wanted: bytes, left: int, right: int) -> tuple[int, int]:
        """The range of places that `wanted` stands before; it reaches beyond `left` to `right`."""
        low = bisect_left(self._order, wanted, 0, left, key=lambda place: self._before(place, len(wanted)))
        high = bisect_right(self._order, wanted, right, key=lambda place: self._before(place, len(wanted)))
        return low, high

    def _common(self, index: int, wanted: bytes) -> int:
        """How many of the wanted tokens stand before the place at `index` of the order."""
        if not 0 <= index < len(self._order):
            return 0
        before = self._before(self._order[index], len(wanted))
        differing = int.from_bytes(before, "big") ^ int.from_bytes(wanted[: len(before)], "big")
        return (8 * len(before) - differing.bit_length()) // (8 * WORD)


def _by_context(text: npt.NDArray[np.uint32], longest: int) -> npt.NDArray[np.uint32]:
    """The places of `text` that have a token before them and one after, sorted by at least `longest` tokens before."""
    rank = np.zeros(len(text), np.int64)  # of a place's context so far: equal where the contexts are
    rank[1:] = 1 + np.unique(text[:-1], return_inverse=True)[1]
    order, known = np.argsort(rank, kind="stable"), 1
    while known < longest:
        key = rank * (int(rank.max()) + 1)
        key[known:] += rank[:-known]
        order = np.argsort(key, kind="stable")
        rank[order[1:]] = np.cumsum(np.diff(key[order]) != 0)
        rank[order[0]] = 0
        known *= 2
    ends = (text[order] == BETWEEN) | (order == 0) | (text[order - 1] == BETWEEN)
    sorted_places: npt.NDArray[np.uint32] = order[~ends].astype(np.uint32)
    return sorted_places


def read_documents(path: Path, tokenizer: Tokenizer, *, limit: int = LIMIT) -> dict[str, list[int]]:
    """Token ids of a text file, or of all files of a folder and the folders in it, by their path there.

    Names that begin with a dot are passed over.

    Args:
        path: file or folder.
        tokenizer: that of the model the drafts are for.
        limit: bytes of text at most.

    Raises:
        BadRequest: nothing there, a file that is not UTF-8 text, or more text than `limit`.
    """
    if path.is_file():
        files = {path.name: path}
    else:
        inside = {found.relative_to(path): found for found in path.rglob("*") if found.is_file()}
        files = {n.as_posix(): inside[n] for n in sorted(inside) if not any(p.startswith(".") for p in n.parts)}
    if not files:
        raise BadRequest(f"{path} is no text file and no folder with text files in it")
    size = sum(file.stat().st_size for file in files.values())
    if size > limit:
        raise BadRequest(
            f"the texts in {path} are {size:,} bytes; at most {limit:,} are indexed. Name a smaller folder."
        )
    return {name: tokenizer.encode(_text(file), add_special_tokens=False) for name, file in files.items()}


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as why:
        raise BadRequest(
            f"{path} is not UTF-8 text: byte {why.start} is {why.object[why.start]:#04x}. Take it out."
        ) from why
    if "\0" in text:
        raise BadRequest(f"{path} is not text: it holds a zero at character {text.index(chr(0))}. Take it out.")
    return text


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start` to `end` of a text stand in `document` from `offset` on; all counted in tokens."""

    start: int
    end: int
    document: str
    offset: int


def spans(sources: Iterable[Source | None]) -> tuple[Span, ...]:
    """The runs of tokens that were copied from documents.

    Between two steps stands a token that the model drew itself. Where the copies around it line up it stands in the
    document too, since the second was found by matching the first and it; it is then part of the run.

    Args:
        sources: of each token, None where the model drew it.
    """
    found: list[Span] = []
    for place, source in enumerate(sources):
        if source is None or not source.document:
            continue
        last = found[-1] if found else None
        gap = place - last.end if last else 0
        if last and gap <= 1 and (source.document, source.offset) == (last.document, last.offset + place - last.start):
            found[-1] = replace(last, end=place + 1)
        else:
            found.append(Span(place, place + 1, source.document, source.offset))
    return tuple(found)
