"""How often drafts stand: by drafter, by place in the tree, and by how sure the drafter was.

A drafter's own probability orders its drafts well and says little about how many of them stand, and drafters that copy
know none. So it is sorted into bins and what became of the drafts is counted, as EAGLE-2 does by confidence (Li et al.
2024, arXiv:2406.16858) and adaptive speculation in vLLM by position.
"""

from __future__ import annotations

from bisect import bisect_right
from math import exp, isnan

KEEP = 1 - 1 / 48  # of a count at each new draft: the last 48 or so count
PRIOR = (0.6, 0.16, 0.08, 0.04)  # by rank among siblings; for the first with the weight of 5 drafts, Beta(3, 2)
WEIGHTS = (5.0, 4.0, 3.0)  # drafts that the estimate one level up is worth
BINS = (0.1, 0.3, 0.5, 0.7, 0.85, 0.95)  # of the drafter's probability
UNKNOWN = -1  # the bin of drafts whose probability is not known
DEPTHS = (1, 2, 3, 4, 6, 9)  # first depth of each class

Key = tuple[str | int, ...]
Cell = list[float]  # drafts offered, drafts that stood, both decayed
NONE = (0.0, 0.0)


class Calibration:
    """Decayed counts on three levels, each the prior of the next: (drafter, rank); and bin; and depth.

    A draft counts once its parent stood, so probabilities are conditional on that.
    """

    def __init__(self) -> None:
        self._cells: dict[Key, Cell] = {}
        self._known: dict[Key, float] = {}  # estimates since the last `settle`

    def add(self, drafter: str, rank: int, depth: int, log_q: float, *, stood: bool) -> None:
        """Count a draft whose parent stood; rank from 0, depth from 1, `log_q` nan where unknown."""
        rank, depth, bin = _place(rank, depth, log_q)
        keys = ((drafter, rank), (drafter, rank, bin), (drafter, rank, bin, depth), (drafter, rank, "depth", depth))
        for key in keys:
            cell = self._cells.get(key)
            if cell is None:
                cell = self._cells[key] = [0.0, 0.0]
            cell[0] = cell[0] * KEEP + 1
            cell[1] = cell[1] * KEEP + stood

    def settle(self) -> None:
        """Let what was counted show; between calls estimates are remembered."""
        self._known.clear()

    def of(self, drafter: str, rank: int, depth: int, log_q: float) -> float:
        """Probability that this draft stands, if its parent does."""
        rank, depth, bin = _place(rank, depth, log_q)
        return self._estimate(rank, (drafter, rank), (drafter, rank, bin), (drafter, rank, bin, depth))

    def typical(self, drafter: str, rank: int, depth: int) -> float:
        """The same before anything is drafted."""
        rank, depth, _ = _place(rank, depth, 0.0)
        return self._estimate(rank, (drafter, rank), (drafter, rank, "depth", depth))

    def hopeful(self, drafter: str, rank: int, depth: int) -> float:
        """The same for the kind of draft that stands most often: what a drafter can do when it is lucky.

        Never less than `typical`, which a kind seen only a few times, and only to fail, would be.
        """
        usual = self.typical(drafter, rank, depth)
        rank, depth, _ = _place(rank, depth, 0.0)
        bins = [bin for bin in range(UNKNOWN, len(BINS) + 1) if (drafter, rank, bin) in self._cells]
        found = (self._estimate(rank, (drafter, rank), (drafter, rank, b), (drafter, rank, b, depth)) for b in bins)
        return max((usual, *found))

    def loosen(self, weight: float, drafter: str) -> None:
        """Hold what is known of a drafter less firmly: as if from at most `weight` drafts of each kind."""
        for key, cell in self._cells.items():
            if key[0] == drafter and cell[0] > weight:
                cell[:] = weight, cell[1] * weight / cell[0]
        self.settle()

    def _estimate(self, rank: int, *keys: Key) -> float:
        found = self._known.get(keys[-1])
        if found is None:
            found = PRIOR[rank]
            for key, weight in zip(keys, WEIGHTS, strict=False):
                offered, stood = self._cells.get(key, NONE)
                found = (stood + weight * found) / (offered + weight)
            self._known[keys[-1]] = found
        return found


def _place(rank: int, depth: int, log_q: float) -> tuple[int, int, int]:
    """The classes of a draft."""
    bin = UNKNOWN if isnan(log_q) else bisect_right(BINS, exp(min(log_q, 0.0)))
    return min(rank, len(PRIOR) - 1), bisect_right(DEPTHS, depth), bin
