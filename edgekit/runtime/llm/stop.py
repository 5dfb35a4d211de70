"""Stop strings in streamed text: what may be the start of one is held back until that is settled."""

from __future__ import annotations

from collections.abc import Sequence

from edgekit.errors import BadRequest


class StopStrings:
    """Cuts a stream of text at the first stop string.

    The cut falls where a stop string is first *complete* (of two that end together, at the one that began earlier), so
    it does not depend on how the text was chunked. Neither the stop string nor anything after it is given out.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        if isinstance(stops, str) or any(not stop for stop in stops):
            raise BadRequest(f"stop strings are a list of texts, none of them empty; got {stops!r}")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Take the next text; give what is now certain to come before any stop string."""
        if self.stopped:
            return ""
        self._held += text
        # Held text has no complete stop string yet, so the first to complete is the first whose end is reached.
        hits = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            self.stopped = True
            return self._release(min(hits)[1])
        return self._release(len(self._held) - self._undecided())

    def flush(self) -> str:
        """The text ended: what was held back is no stop string after all."""
        return self._release(len(self._held)) if not self.stopped else ""

    def _undecided(self) -> int:
        """Length of the longest end of the held text that begins some stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0

    def _release(self, count: int) -> str:
        out, self._held = self._held[:count], self._held[count:]
        return out
