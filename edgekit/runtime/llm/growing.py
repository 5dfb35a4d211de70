"""Keys and values for graphs that put new ones behind old ones: past in, past and new out, in two buffers by turns.

A graph of the `concat` dialect reads `past` and writes a longer `present` elsewhere. Two buffers per tensor take turns,
so ordinary decoding copies nothing beyond what the graph's own Concat does; a rollback copies what is kept, once, when
the next run begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy

import numpy as np

from edgekit.bundle.manifest import KVCacheLayout
from edgekit.errors import BadRequest
from edgekit.runtime.backends import Array, Session
from edgekit.runtime.llm.kv import FIRST_CAPACITY, KVCache, larger, snapshot_slots


class GrowingCache:
    """The methods of `KVCache`; slots are rows of the arrays themselves, (1, heads, slots, dim) without spare ones.

    What takes part in a run lies in host memory: on another device every run carries it there and back.
    """

    can_move = True

    def __init__(self, session: Session, layout: KVCacheLayout, limit: int) -> None:
        self._session, self._layout, self._limit = session, layout, limit
        self._names = [f"{layer}.{side}" for layer in range(layout.layers) for side in ("key", "value")]
        self.capacity = min(FIRST_CAPACITY, limit)
        self._slots = 0  # of the front buffers in use
        self._front, self._back = self._buffers(self.capacity), self._buffers(self.capacity)
        self._binding = session.bind()

    def run(self, used: int, feeds: Mapping[str, Array], into: Mapping[str, Array]) -> dict[str, Array]:
        """One run behind the first `used` slots; the outputs that are no keys or values. Raises SessionFailed."""
        self._cut(used)
        total = used + feeds["input_ids"].shape[1]
        past = {f"past.{name}": self._view(buffer, used) for name, buffer in self._front.items()}
        present = {f"present.{name}": self._view(buffer, total) for name, buffer in self._back.items()}
        out = self._binding.run({**feeds, **past}, {**into, **present})
        self._front, self._back, self._slots = self._back, self._front, total
        return {name: value for name, value in out.items() if name not in present}

    def reserve(self, slots: int, used: int) -> None:
        """Make room for `slots` in all, keeping the first `used`.

        Raises:
            BadRequest: more than the model's context length.
        """
        capacity = larger(self.capacity, slots, self._limit)
        if capacity == self.capacity:
            return
        front, back = self._buffers(capacity), self._buffers(capacity)
        for name, buffer in front.items():
            self._view(buffer, used)[...] = self._view(self._front[name], self._slots)[:, :, :used]
        self.capacity, self._slots, self._front, self._back = capacity, used, front, back

    def move(self, rows: Sequence[int], start: int) -> None:
        """Copy the slots `rows` to start, start + 1, ...; overlaps are fine."""
        source = np.asarray(rows)
        for buffer in self._front.values():
            view = self._view(buffer, self._slots)
            view[:, :, start : start + len(source)] = view[:, :, source]

    def snapshot(self, start: int, stop: int) -> Array:
        """A copy of the slots from `start` up to `stop`: (2 * layers, heads, stop - start, head_dim), cache type.

        Raises:
            BadRequest: slots the cache does not have.
        """
        self._check(start, stop, self._slots)
        views = [self._view(self._front[name], self._slots)[0, :, start:stop] for name in self._names]
        return np.stack(views)

    def restore(self, start: int, slots: Array) -> None:
        """Write a snapshot into the slots `start`, start + 1, ..., and forget those after it; `reserve` them first.

        Raises:
            BadRequest: slots the cache does not have, or the snapshot of a graph with another layout.
        """
        stop = start + snapshot_slots(self._layout, slots)
        self._check(start, stop, self.capacity)
        self._check(0, start, self._slots)
        for name, rows in zip(self._names, slots, strict=True):
            view = self._view(self._back[name], stop)
            view[:, :, :start] = self._view(self._front[name], self._slots)[:, :, :start]
            view[:, :, start:] = rows
        self._front, self._back, self._slots = self._back, self._front, stop

    def fork(self, used: int) -> GrowingCache:
        """A cache of its own on the same session that begins with the first `used` slots of this one.

        Raises:
            BadRequest: more slots than the cache has.
        """
        self._check(0, used, self._slots)
        other = copy(self)
        other._front, other._back = other._buffers(self.capacity), other._buffers(self.capacity)
        other._slots, other._binding = used, self._session.bind()
        for name, buffer in other._front.items():
            self._view(buffer, used)[...] = self._view(self._front[name], self._slots)[:, :, :used]
        return other

    def _cut(self, used: int) -> None:
        """Forget all slots but the first `used`."""
        if used == self._slots:
            return
        for name, buffer in self._back.items():
            self._view(buffer, used)[...] = self._view(self._front[name], self._slots)[:, :, :used]
        self._front, self._back, self._slots = self._back, self._front, used

    def _buffers(self, capacity: int) -> dict[str, Array]:
        size = self._layout.heads * capacity * self._layout.head_dim
        return {name: np.zeros(size, self._layout.dtype) for name in self._names}

    def _view(self, buffer: Array, slots: int) -> Array:
        """The beginning of a flat buffer as (1, heads, slots, dim)."""
        heads, dim = self._layout.heads, self._layout.head_dim
        return buffer[: heads * slots * dim].reshape(1, heads, slots, dim)

    def _check(self, start: int, stop: int, there: int) -> None:
        if not 0 <= start <= stop <= there:
            raise BadRequest(f"slots {start} to {stop} are not in a cache of {there}; compute or reserve them first")


def open_cache(dialect: str, session: Session, layout: KVCacheLayout, limit: int) -> KVCache | GrowingCache:
    """The cache of a dialect's graphs, empty."""
    return (GrowingCache if dialect == "concat" else KVCache)(session, layout, limit)
