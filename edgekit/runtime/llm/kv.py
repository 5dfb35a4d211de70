"""The key-value buffers of a decoder: one pair per layer, bound in place, grown by half."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy

import numpy as np

from edgekit.bundle.manifest import KVCacheLayout
from edgekit.errors import BadRequest
from edgekit.runtime.backends import Array, Binding, Session

FIRST_CAPACITY = 256  # slots; every run of the `std` dialect reads the whole capacity, so it starts small


class KVCache:
    """Slots in which the graph writes the keys and values of the tokens it is fed; each buffer (1, heads, slots, dim).

    It knows slots only: which tokens lie in them is the verifier's business. Forgetting is free (a slot is written
    over), keeping a branch moves its rows together, and growing copies what is in use. A snapshot takes slots out, to
    be put back in this cache or in another one of the same graph.
    """

    def __init__(self, session: Session, layout: KVCacheLayout, limit: int) -> None:
        self._session = session
        self._layout = layout
        self._limit = limit
        self._names = [f"{layer}.{side}" for layer in range(layout.layers) for side in ("key", "value")]
        self.capacity = min(FIRST_CAPACITY, limit)
        self.binding = self._bind(self.capacity)

    @property
    def can_move(self) -> bool:
        """Whether rows can be moved here; where they cannot, the caller recomputes them."""
        return self.binding.live

    def run(self, used: int, feeds: Mapping[str, Array], into: Mapping[str, Array]) -> dict[str, Array]:  # noqa: ARG002
        """One run behind the first `used` slots; the outputs that are no keys or values. Raises SessionFailed."""
        return self.binding.run(feeds, into)

    def reserve(self, slots: int, used: int) -> None:
        """Make room for `slots` in all, keeping the first `used`.

        Raises:
            BadRequest: more than the model's context length.
        """
        capacity = larger(self.capacity, slots, self._limit)
        if capacity == self.capacity:
            return
        grown = self._grown(capacity, used)
        self.capacity, self.binding = capacity, grown  # both or neither: an interrupt leaves the old buffers in use

    def move(self, rows: Sequence[int], start: int) -> None:
        """Copy the slots `rows` to start, start + 1, ...; overlaps are fine."""
        source = np.asarray(rows)
        for name in self._names:
            buffer = self.binding.read(f"past.{name}")
            buffer[:, :, start : start + len(source)] = buffer[:, :, source]  # indexing by an array copies first

    def snapshot(self, start: int, stop: int) -> Array:
        """A copy of the slots from `start` up to `stop`: (2 * layers, heads, stop - start, head_dim), cache type.

        Row 2 * i holds the keys of layer i, row 2 * i + 1 its values.

        Raises:
            BadRequest: slots the cache does not have.
        """
        self._check(start, stop)
        slots = np.empty(snapshot_shape(self._layout, stop - start), self._layout.dtype)
        for place, name in zip(slots, self._names, strict=True):
            place[...] = self.binding.read(f"past.{name}")[0, :, start:stop]
        return slots

    def restore(self, start: int, slots: Array) -> None:
        """Write a snapshot into the slots `start`, start + 1, ...; `reserve` them first.

        Raises:
            BadRequest: slots the cache does not have, or the snapshot of a graph with another layout.
        """
        stop = start + snapshot_slots(self._layout, slots)
        self._check(start, stop)
        for name, rows in zip(self._names, slots, strict=True):
            _put(self.binding, f"past.{name}", start, rows[None])

    def fork(self, used: int) -> KVCache:
        """A cache of its own on the same session that begins with the first `used` slots of this one.

        It has this one's capacity, so that runs on either are the same runs, bit for bit.

        Raises:
            BadRequest: more slots than the cache has.
        """
        self._check(0, used)
        other = copy(self)
        other.binding = self._grown(self.capacity, used)
        return other

    def _grown(self, capacity: int, used: int) -> Binding:
        """New buffers that begin with the first `used` slots."""
        grown = self._bind(capacity)
        for name in self._names if used else ():
            _put(grown, f"past.{name}", 0, self.binding.read(f"past.{name}")[:, :, :used])
        return grown

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.capacity:
            raise BadRequest(f"slots {start} to {stop} are not in a cache of {self.capacity}; reserve them first")

    def _bind(self, capacity: int) -> Binding:
        binding = self._session.bind()
        shape = (1, self._layout.heads, capacity, self._layout.head_dim)
        for name in self._names:
            binding.share(f"past.{name}", f"present.{name}", shape, self._layout.dtype)
        return binding


def larger(capacity: int, slots: int, limit: int) -> int:
    """The capacity, grown by half as often as it takes to hold `slots`.

    Raises:
        BadRequest: more than the model's context length.
    """
    if slots > limit:
        raise BadRequest(f"{slots} tokens do not fit the model's context of {limit}; shorten the text")
    while capacity < slots:
        capacity += max(FIRST_CAPACITY, capacity // 2 // FIRST_CAPACITY * FIRST_CAPACITY)
    return min(capacity, limit)


def snapshot_shape(layout: KVCacheLayout, slots: int) -> tuple[int, ...]:
    """(2 * layers, heads, slots, head_dim)."""
    return (2 * layout.layers, layout.heads, slots, layout.head_dim)


def snapshot_slots(layout: KVCacheLayout, slots: Array) -> int:
    """How many slots a snapshot has. Raises BadRequest for one of a graph with another layout."""
    count = slots.shape[2] if slots.ndim == 4 else 0
    wanted = snapshot_shape(layout, count)
    if slots.shape != wanted or slots.dtype != layout.dtype:
        raise BadRequest(
            f"{slots.dtype}{slots.shape} is no snapshot of this graph; its are {layout.dtype}{wanted}. "
            "Compute the text anew."
        )
    return count


def _put(binding: Binding, name: str, start: int, rows: Array) -> None:
    """Write `rows`, (1, heads, slots, head_dim), into a buffer from slot `start` on."""
    buffer = binding.read(name)
    buffer[:, :, start : start + rows.shape[2]] = rows
    if not binding.live:
        binding.write(name, buffer)
