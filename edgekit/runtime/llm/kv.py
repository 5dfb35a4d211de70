"""The key-value buffers of a decoder: one pair per layer, bound in place, grown by doubling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgekit.bundle.manifest import KVCacheLayout
from edgekit.errors import BadRequest
from edgekit.runtime.backends import Binding, Session

FIRST_CAPACITY = 256  # slots; every run of the `std` dialect reads the whole capacity, so it starts small


class KVCache:
    """Slots in which the graph writes the keys and values of the tokens it is fed; each buffer (1, heads, slots, dim).

    It knows slots only: which tokens lie in them is the verifier's business. Forgetting is free (a slot is written
    over), keeping a branch moves its rows together, and growing copies what is in use.
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

    def reserve(self, slots: int, used: int) -> None:
        """Make room for `slots` in all, keeping the first `used`.

        Raises:
            BadRequest: more than the model's context length.
        """
        if slots > self._limit:
            raise BadRequest(f"{slots} tokens do not fit the model's context of {self._limit}; shorten the text")
        capacity = self.capacity
        while capacity < slots:
            capacity = min(2 * capacity, self._limit)
        if capacity == self.capacity:
            return
        grown = self._bind(capacity)
        for name in self._names if used else ():
            old = self.binding.read(f"past.{name}")[:, :, :used]
            if grown.live:
                grown.read(f"past.{name}")[:, :, :used] = old
            else:
                new = grown.read(f"past.{name}")
                new[:, :, :used] = old
                grown.write(f"past.{name}", new)
        self.capacity, self.binding = capacity, grown  # both or neither: an interrupt leaves the old buffers in use

    def move(self, rows: Sequence[int], start: int) -> None:
        """Copy the slots `rows` to start, start + 1, ...; overlaps are fine."""
        source = np.asarray(rows)
        for name in self._names:
            buffer = self.binding.read(f"past.{name}")
            buffer[:, :, start : start + len(source)] = buffer[:, :, source]  # indexing by an array copies first

    def _bind(self, capacity: int) -> Binding:
        binding = self._session.bind()
        shape = (1, self._layout.heads, capacity, self._layout.head_dim)
        for name in self._names:
            binding.share(f"past.{name}", f"present.{name}", shape, self._layout.dtype)
        return binding
