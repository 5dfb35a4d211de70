"""What the inputs of graphs are fed from: every source by name, with the axis 0 it has.

A request draws `batch` pictures of one prompt; guidance adds a second line, the negative prompt's, ahead of it. So a
value is one of three: a *line* value has a row per line, an *image* value a row per picture (or one for all), and a
*row* value one for every line of every picture, lines outermost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from edgekit.runtime.backends import Array

LINE, IMAGE, ROW = "line", "image", "row"


@dataclass
class Sources:
    """Values by source name, for `lines` prompts and `batch` pictures."""

    lines: int
    batch: int
    zero_negative: tuple[str, ...] = ()
    _values: dict[str, tuple[str, Array]] = field(default_factory=dict)

    def __contains__(self, source: str) -> bool:
        return source in self._values

    def put(self, source: str, kind: str, value: Array) -> None:
        """Set a source; `kind` is LINE, IMAGE or ROW."""
        self._values[source] = (kind, value)

    def zero_line(self, part: str, line: int) -> None:
        """Blank one line of every line value a part gave."""
        for source, (kind, value) in self._values.items():
            if kind == LINE and source.startswith(f"{part}."):
                value[line] = 0

    def value(self, source: str) -> Array:
        """The value as it was put."""
        return self._values[source][1]

    def kind_of(self, sources: Iterable[str]) -> str:
        """What a network fed from these gives: a value per line, per image or per row. A shared one decides nothing."""
        found = [self._values[source] for source in sources]
        kinds = {kind for kind, value in found if kind != IMAGE or len(value) > 1}
        if len(kinds) > 1:
            return ROW
        return kinds.pop() if kinds else IMAGE

    def feeds(self, feeds: Mapping[str, str]) -> tuple[str, dict[str, Array]]:
        """Inputs of a network that runs once, and what kind its outputs are."""
        kind = self.kind_of(feeds.values())
        if kind == ROW:
            return kind, {name: self.rows(source) for name, source in feeds.items()}
        count = max((len(self.value(source)) for source in feeds.values()), default=1)
        return kind, {name: _spread(self.value(source), count) for name, source in feeds.items()}

    def rows(self, source: str) -> Array:
        """(lines * batch, ...): what one guided row of a table takes, the negative prompt's half first."""
        kind, value = self._values[source]
        if kind == LINE:
            value = np.repeat(value, self.batch, axis=0)
        elif kind == IMAGE:
            value = np.concatenate([_spread(value, self.batch)] * self.lines)
        if self.lines > 1 and source in self.zero_negative:
            value = value.copy()
            value[: self.batch] = 0
        return value

    def images(self, source: str, line: int = -1) -> Array:
        """(batch, ...): one line's value for every picture, the prompt's by default."""
        kind, value = self._values[source]
        if kind == LINE:
            return np.repeat(value[line][None], self.batch, axis=0)
        if kind == IMAGE:
            return _spread(value, self.batch)
        halves = np.split(value, self.lines)
        return halves[line]


def _spread(value: Array, count: int) -> Array:
    return np.repeat(value, count, axis=0) if len(value) == 1 and count > 1 else value
