"""Keys and values of texts met before: a radix tree over token ids, bounded in bytes.

The key of a token depends on every token before it, so what is stored hangs from its whole prefix: keys computed after
one beginning are never joined to another. (RadixAttention, Zheng et al. 2023, arXiv:2312.07104; the document tree of
RAGCache, Jin et al. 2024, arXiv:2404.12457; contexts computed once, then loaded: CAG, Chan et al. 2024,
arXiv:2412.15605.)
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edgekit.errors import BadRequest
from edgekit.runtime.backends import Array
from edgekit.runtime.llm.prefixfile import Row, read_prefixes, write_prefixes

SLOTS = 2  # the axis of a snapshot that counts tokens


class PrefixStats(NamedTuple):
    """Since the store was made: lookups that found something, or nothing; tokens fetched, and tokens dropped."""

    hits: int = 0
    misses: int = 0
    reused: int = 0
    evicted: int = 0


class PrefixStore:
    """Snapshots of `KVCache` slots, found by the tokens from the beginning of the text. One caller at a time.

    `len` is the number of tokens stored, `bytes` what their keys and values take; a shared prefix counts once.

    Args:
        max_bytes: of keys and values. What was used longest ago gives way, ends of texts before their beginnings.

    Raises:
        BadRequest: a negative bound.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise BadRequest(f"a prefix store of {max_bytes} bytes; give 0 or more")
        self.max_bytes = max_bytes
        self.bytes = 0
        self.stats = PrefixStats()
        self._tokens = 0
        self._now = 0  # uses so far: the clock of "least recently"
        self._root = _Edge((), np.zeros((0, 0, 0, 0)), None, 0)
        self._like: Array | None = None  # an empty snapshot of the one graph served here

    def __len__(self) -> int:
        return self._tokens

    def longest(self, tokens: Sequence[int]) -> int:
        """How many leading `tokens` are stored: a lookup, so it counts as a hit or a miss, and as a use."""
        path, found = self._find(tuple(tokens))
        self._touch(path)
        stats = self.stats
        self.stats = stats._replace(hits=stats.hits + (found > 0), misses=stats.misses + (found == 0))
        return found

    def fetch(self, tokens: Sequence[int], start: int, stop: int) -> Array:
        """Slots `start` up to `stop` of a stored prefix: (2 * layers, heads, stop - start, head_dim), read-only.

        Raises:
            BadRequest: an empty or reversed span, or one that ends after the first `longest(tokens)`.
        """
        path, found = self._find(tuple(tokens))
        if not 0 <= start < stop <= found:
            raise BadRequest(f"slots {start} to {stop} of a text of which {found} are stored; ask for some of those")
        self._touch(path)
        self.stats = self.stats._replace(reused=self.stats.reused + stop - start)
        pieces, at = [], 0
        for edge in path:
            piece = edge.kv[:, :, max(start - at, 0) : max(stop - at, 0)]
            pieces += [piece] if piece.size else []
            at += len(edge.tokens)
        return pieces[0] if len(pieces) == 1 else _frozen(np.concatenate(pieces, axis=SLOTS))

    def insert(self, tokens: Sequence[int], kv: Callable[[int, int], Array] | Array) -> int:
        """Store what of `tokens` is not there yet, and say how many of them are stored now.

        Those are fewer than all where the bound leaves no room: then the end of the text is left out.

        Args:
            tokens: a whole text from its first token.
            kv: a snapshot of all its slots; or a function of (start, stop) that makes one of some and gives it away,
                such as `KVCache.snapshot`. It is asked at most once, for what is missing.

        Raises:
            BadRequest: a snapshot of another length, or of another graph than those stored.
        """
        tokens = tuple(tokens)
        path, found = self._find(tokens)
        missing = len(tokens) - found
        if not missing:
            self._touch(path)
            return found
        if not callable(kv):
            self._check(kv, len(tokens))
        new = kv(found, len(tokens)) if callable(kv) else kv[:, :, found:]
        self._check(new, missing)
        path = _cut(path, found)
        self._touch(path)
        self._make_room(new.nbytes)
        fits = min(missing, (self.max_bytes - self.bytes) // (new.nbytes // missing))
        if fits > 0:
            if fits < missing or new.base is not None:  # a view keeps the whole of its memory, or is somebody else's
                new = new[:, :, :fits].copy()
            self._grow(path[-1] if path else self._root, tokens[found : found + fits], new)
        return found + fits

    def pin(self, tokens: Sequence[int]) -> None:
        """Keep a stored prefix, whatever the bound asks for, until `unpin`. Pins are saved with the store.

        Raises:
            BadRequest: no tokens, or not all of them are stored.
        """
        path, found = self._find(tuple(tokens))
        if not tokens or found < len(tokens):
            raise BadRequest(f"{found} of {len(tokens)} tokens are stored, so they cannot be pinned; insert them first")
        _cut(path, found)[-1].pinned = True

    def unpin(self, tokens: Sequence[int]) -> None:
        """Take `pin(tokens)` back.

        Raises:
            BadRequest: exactly these tokens are not pinned.
        """
        path, found = self._find(tuple(tokens))
        exact = sum(len(edge.tokens) for edge in path) == found == len(tokens)
        if not exact or not path or not path[-1].pinned:
            raise BadRequest(f"these {len(tokens)} tokens are not pinned; unpin what was pinned, token for token")
        path[-1].pinned = False

    def save(self, path: Path, fingerprint: Mapping[str, str]) -> None:
        """Write the whole store as one file, which appears whole or not at all.

        Args:
            path: replaced if it is there.
            fingerprint: what the keys and values hold for, by name: graph, precision, kind of device and the like.
        """
        edges = sorted(_below(self._root), key=lambda edge: -edge.used)  # no parent was used before its children
        place = {id(edge): at for at, edge in enumerate(edges)} | {id(self._root): -1}
        rows = [Row(place[id(edge.parent)], edge.tokens, edge.pinned) for edge in edges]
        write_prefixes(path, fingerprint, rows, [edge.kv for edge in edges])

    @classmethod
    def load(cls, path: Path, fingerprint: Mapping[str, str], max_bytes: int) -> PrefixStore:
        """Read a saved store, checked in full; what was used last when it was saved still was.

        Args:
            path: what `save` wrote.
            fingerprint: what the keys and values must hold for; all of it, name by name.
            max_bytes: of the new store.

        Raises:
            BadRequest: a file that cannot be read, another fingerprint, or more bytes than `max_bytes`.
            BundleError: no prefix store, another format, truncated, altered, or contradicting itself.
        """
        store = cls(max_bytes)
        rows, slots = read_prefixes(path, fingerprint, max_bytes)
        edges: dict[int, _Edge] = {-1: store._root}
        for place, (row, kv) in enumerate(zip(rows, slots, strict=True)):
            edges[place] = store._grow(edges[row.parent], row.tokens, kv)
            edges[place].used, edges[place].pinned = len(rows) - place, row.pinned
        store._now = len(rows)
        return store

    def _find(self, tokens: tuple[int, ...]) -> tuple[list[_Edge], int]:
        """The edges along `tokens`, and how many of them they cover; the last edge may go on with others."""
        path: list[_Edge] = []
        edge, at = self._root, 0
        while at < len(tokens) and (following := edge.children.get(tokens[at])) is not None:
            edge = following
            path.append(edge)
            same = _common(edge.tokens, tokens[at : at + len(edge.tokens)])
            at += same
            if same < len(edge.tokens):
                break
        return path, at

    def _touch(self, path: Sequence[_Edge]) -> None:
        self._now += 1
        for edge in path:
            edge.used = self._now

    def _grow(self, parent: _Edge, tokens: tuple[int, ...], kv: Array) -> _Edge:
        edge = parent.grow(tokens, kv, self._now)
        self._like = kv[:, :, :0].copy()
        self._tokens += len(tokens)
        self.bytes += kv.nbytes
        return edge

    def _make_room(self, size: int) -> None:
        """Drop leaves, the least recently used first, until `size` bytes fit; never what was used just now."""
        if self.bytes + size <= self.max_bytes:
            return
        leaves = [(edge.used, at, edge) for at, edge in enumerate(_below(self._root)) if edge.droppable]
        heapq.heapify(leaves)
        while leaves and leaves[0][0] < self._now and self.bytes + size > self.max_bytes:
            _, at, edge = heapq.heappop(leaves)
            parent = edge.parent
            assert parent is not None
            del parent.children[edge.tokens[0]]
            self.bytes -= edge.kv.nbytes
            self._tokens -= len(edge.tokens)
            self.stats = self.stats._replace(evicted=self.stats.evicted + len(edge.tokens))
            if parent.parent is not None and parent.droppable:
                heapq.heappush(leaves, (parent.used, at, parent))

    def _check(self, kv: Array, slots: int) -> None:
        like = self._like
        if kv.ndim != 4 or kv.shape[SLOTS] != slots or not kv.size or kv.dtype not in (np.float32, np.float16):
            raise BadRequest(f"{kv.dtype}{kv.shape} is no snapshot (2 * layers, heads, {slots}, head_dim)")
        if like is not None and (like.shape, like.dtype) != (kv[:, :, :0].shape, kv.dtype):
            raise BadRequest(
                f"{kv.dtype}{kv.shape} is a snapshot of another graph; those stored: {like.dtype}{like.shape}, their "
                "slots left out. Give each graph a store of its own."
            )


class _Edge:
    """Some tokens in a row, their slots, and what follows; no two children begin with the same token."""

    __slots__ = ("children", "kv", "parent", "pinned", "tokens", "used")

    def __init__(self, tokens: tuple[int, ...], kv: Array, parent: _Edge | None, used: int) -> None:
        self.tokens = tokens
        self.kv = _frozen(kv)
        self.parent = parent
        self.used = used
        self.pinned = False
        self.children: dict[int, _Edge] = {}

    @property
    def droppable(self) -> bool:
        """A leaf that nobody pinned."""
        return not self.children and not self.pinned

    def grow(self, tokens: tuple[int, ...], kv: Array, used: int) -> _Edge:
        """A new edge after this one."""
        child = self.children[tokens[0]] = _Edge(tokens, kv, self, used)
        return child

    def cut(self, length: int) -> _Edge:
        """Split after `length` tokens and give the first part, which is new. Each owns its memory, so either can go."""
        assert self.parent is not None
        first = self.parent.grow(self.tokens[:length], self.kv[:, :, :length].copy(), self.used)
        first.children[self.tokens[length]] = self
        self.tokens, self.kv, self.parent = self.tokens[length:], _frozen(self.kv[:, :, length:].copy()), first
        return first


def _cut(path: list[_Edge], found: int) -> list[_Edge]:
    """The same path, ending after `found` tokens: an edge that goes on is split."""
    spare = sum(len(edge.tokens) for edge in path) - found
    return [*path[:-1], path[-1].cut(len(path[-1].tokens) - spare)] if spare else path


def _below(edge: _Edge) -> Iterator[_Edge]:
    """Every edge after this one, parents before children."""
    pending = list(edge.children.values())
    while pending:
        yield (following := pending.pop())
        pending += following.children.values()


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many leading tokens two texts share."""
    return len(a) if a == b else sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _frozen(kv: Array) -> Array:
    kv.flags.writeable = False
    return kv
