"""What a step costs, kept up to date while it runs; and what drafting may still lose."""

from __future__ import annotations

from math import ceil

from edgekit.runtime.llm.costs import Curve

PLAIN_RATE = 0.1  # share of a new observation of a single-row step, once there are some
BEND_RATE = 0.15  # share of one of a larger run that bends the curve
DRIFT_RATE = 0.03  # share of it that moves the whole curve
DRAFT_RATE = 0.2
TICK = 1e-9  # seconds that a step takes at least, whatever the clock says
OUTLIER = 2.0  # an observation this many times off counts as that many

START = 2.0  # plain steps that drafts may cost before they have gained anything
GRANT = 1.25  # that they may cost at the beginning of every text
INTEREST = 0.0075  # plain steps of credit per token of text
MOST = 8.0  # plain steps of credit that can be saved up
LEAST = -2.0


class Prices:
    """Seconds of verification by rows, and of drafting by level and drafter.

    The curve moves as a whole with the steps of one row, which ordinary decoding would take too (the text grows longer,
    the machine busier); steps of more rows bend it relative to them.
    """

    def __init__(self, curve: Curve) -> None:
        self._shape = curve
        self._scale = 1.0  # changes with every plain step, where making a new curve each time would be felt
        self._plain = 0  # single-row steps seen
        self._levels: dict[str, float] = {}
        self._missed: dict[str, float] = {}

    @property
    def plain(self) -> float:
        """Seconds of a step of ordinary decoding."""
        return self._scale * self._shape.smooth[0]

    @property
    def curve(self) -> Curve:
        """T(n) as it is believed now."""
        return self._shape.scaled(self._scale)

    def at(self, rows: int) -> float:
        """Seconds of a verification of so many rows."""
        return self._scale * self._shape.at(rows)

    def relative(self, rows: int) -> float:
        """T(n) / T(1)."""
        return self._shape.relative(rows)

    def level(self, drafter: str) -> float:
        """Seconds that this drafter takes per level; 0 until it is known."""
        return self._levels.get(drafter, 0.0)

    def knows(self, drafter: str) -> bool:
        """Whether `level` is more than a guess."""
        return drafter in self._levels

    def saw_plain(self, seconds: float) -> None:
        """A verification of one row."""
        self._plain += 1
        seconds, expected = max(seconds, TICK), self.plain
        if self._plain > 1:
            seconds = min(max(seconds, expected / OUTLIER), expected * OUTLIER)
        rate = max(PLAIN_RATE, 1 / self._plain)
        self._scale *= (seconds / expected) ** rate

    def saw_run(self, rows: int, seconds: float) -> float:
        """A verification of two rows or more; the seconds to count it with, outliers cut."""
        expected = self.at(rows)
        seconds = min(max(seconds, expected / OUTLIER), expected * OUTLIER)
        self._shape = self._shape.updated(rows, seconds / self._scale, BEND_RATE)
        self._scale *= (seconds / expected) ** DRIFT_RATE
        return seconds

    def catching_up(self, drafter: str) -> float:
        """Seconds that this drafter takes per token of the text that it missed; 0 until it is known."""
        return self._missed.get(drafter, 0.0)

    def saw_catching_up(self, drafter: str, tokens: int, seconds: float) -> None:
        """A drafter read tokens that it had missed."""
        known = self._missed.get(drafter)
        each = seconds / tokens
        self._missed[drafter] = each if known is None else known + DRAFT_RATE * (each - known)

    def saw_draft(self, drafter: str, levels: int, seconds: float) -> None:
        """Drafting by a drafter that has nothing to catch up with."""
        known = self._levels.get(drafter)
        each = seconds / levels
        self._levels[drafter] = each if known is None else known + DRAFT_RATE * (each - known)


class Credit:
    """How much time drafts may lose, in steps of ordinary decoding.

    It begins at START, grows by INTEREST with every token, and is changed by what each step with drafts gained or lost.
    Drafts are asked for while it lasts, so a text of n tokens takes at most START + INTEREST * n plain steps longer
    than without, whatever the drafter does, and where another text knew it to be useless 1.7 % of 128 tokens. (One
    step more where a drafter turns out costlier than it was ever seen to be, and what one that is known to pay off
    takes to read the prompt.)
    """

    def __init__(self) -> None:
        self.left = START

    def begin(self) -> None:
        """A new text cannot spend what another one gained, and does not pay for what another one lost."""
        self.left = min(max(self.left, GRANT), START)

    def grow(self, tokens: int, gained: float = 0.0) -> None:
        """Tokens were added; drafts `gained` so many plain steps doing it."""
        self.left = min(MOST, max(LEAST, self.left + INTEREST * tokens + gained))

    def wait(self, loss: float) -> int:
        """Tokens until a step that loses so much is allowed, if nothing else is gained or lost."""
        return max(0, ceil((2 * loss - self.left) / INTEREST))

    def allows(self, loss: float) -> bool:
        """Whether a step may be taken that loses so much if every draft is wrong: one in two, or the smallest."""
        return loss <= self.left / 2
