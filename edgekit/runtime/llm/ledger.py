"""What speculation did: counts, times and changes of mode, per request and over the life of a pipeline."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Literal

from edgekit.runtime.llm.accept import Accepted
from edgekit.runtime.llm.tree import TokenTree

Mode = Literal["speculating", "resting", "probing"]


@dataclass(frozen=True, slots=True)
class ModeChange:
    """A drafter began to speculate, to rest or to probe.

    Attributes:
        token: how many tokens of the text were there, the first one not counted.
        drafter: which one.
        mode: what it does from then on.
        reason: in words.
    """

    token: int
    drafter: str
    mode: Mode
    reason: str


@dataclass(frozen=True, slots=True)
class DepthStats:
    """Drafts at one depth below the root whose parents stood, and how many of them stood."""

    depth: int
    offered: int
    accepted: int
    rate: float


@dataclass(frozen=True, slots=True)
class DrafterStats:
    """Drafts of one drafter that were scored, and how many of them stood."""

    drafter: str
    drafted: int
    accepted: int


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """What drafts were worth. The step that computes the prompt drafts nothing and is not counted.

    Attributes:
        drafter: the one asked for.
        steps: verifier calls.
        tokens: that they made.
        drafted: drafts scored.
        accepted: drafts that stood.
        tokens_per_verify: tokens / steps; 1 is ordinary decoding.
        rows_per_token: rows scored per token made; 1 is ordinary decoding.
        acceptance: by depth, of the drafts whose parents stood.
        drafters: by drafter.
        draft_seconds: looking up and running drafts, and deciding about them.
        verify_seconds: scoring trees and keeping what stands.
        accept_seconds: drawing tokens.
        rest_seconds: steps while every drafter rested, drawing included.
        plain_ms: what one step of ordinary decoding takes now.
        speedup: estimated: what the tokens would have taken by ordinary decoding, over what they took.
        curve: T(n) / T(1) by rows n, as it is believed now.
        modes: of each drafter, now.
        changes: of mode, and why.
        acceptance_rule: a row of RULES.
        lossless: whether it keeps the distribution of ordinary decoding.
        disagreements: tokens that a lossy rule let pass against the model's own draw.
        invariance: how rows depend on their run, see `probe.Invariance`.
        margin: the largest difference between two runs of the same row, not filled up, in logits.
        granule: runs are filled up to a multiple of so many rows; 1 is not at all.
    """

    drafter: str = "none"
    steps: int = 0
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens_per_verify: float = 1.0
    rows_per_token: float = 1.0
    acceptance: tuple[DepthStats, ...] = ()
    drafters: tuple[DrafterStats, ...] = ()
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    accept_seconds: float = 0.0
    rest_seconds: float = 0.0
    plain_ms: float = 0.0
    speedup: float = 1.0
    curve: dict[int, float] = field(default_factory=dict)
    modes: dict[str, Mode] = field(default_factory=dict)
    changes: tuple[ModeChange, ...] = ()
    acceptance_rule: str = "own-draw"
    lossless: bool = True
    disagreements: int = 0
    invariance: str = ""
    margin: float = 0.0
    granule: int = 1


class Tally:
    """Counts of the steps since it was made."""

    def __init__(self) -> None:
        self.steps = self.tokens = self.rows = self.rested = 0
        self.draft_seconds = self.verify_seconds = self.accept_seconds = self.rest_seconds = 0.0
        self.changes: list[ModeChange] = []
        self._depths: Counter[int] = Counter()
        self._stood: Counter[int] = Counter()
        self._drafted: Counter[str] = Counter()
        self._accepted: Counter[str] = Counter()

    def add(self, tree: TokenTree, step: Accepted, *, drafter: str) -> None:
        """Count a step; `drafter` is where drafts come from that do not say so."""
        if len(tree) == 1:
            self.plain(len(step.tokens))
            return
        self.steps += 1
        self.tokens += len(step.tokens)
        self.rows += len(tree)
        names = [source.drafter for source in tree.sources] or [drafter] * len(tree)
        self._drafted.update(names[1:])
        self._accepted.update(names[node] for node in step.path[1:])
        self._depths.update({tree.depths[node] for node in range(1, len(tree)) if tree.parents[node] in step.path})
        self._stood.update(tree.depths[node] for node in step.path[1:])

    def plain(self, tokens: int) -> None:
        """Count a step without drafts."""
        self.steps += 1
        self.tokens += tokens
        self.rows += 1

    def rest(self, steps: int, seconds: float) -> None:
        """Count steps of one token each, made while every drafter rested."""
        self.steps += steps
        self.tokens += steps
        self.rows += steps
        self.rest_seconds += seconds
        self.rested += steps

    def time(self, draft: float, verify: float, accept: float) -> None:
        """Add the seconds of a step."""
        self.draft_seconds += draft
        self.verify_seconds += verify
        self.accept_seconds += accept

    def merge(self, other: Tally) -> None:
        """Add another one's figures; its changes of mode are counted from the tokens here."""
        self.changes += [replace(change, token=self.tokens + change.token) for change in other.changes]
        self.steps += other.steps
        self.tokens += other.tokens
        self.rows += other.rows
        self.rested += other.rested
        self.rest_seconds += other.rest_seconds
        self.time(other.draft_seconds, other.verify_seconds, other.accept_seconds)
        self._depths.update(other._depths)
        self._stood.update(other._stood)
        self._drafted.update(other._drafted)
        self._accepted.update(other._accepted)

    def stats(self, drafter: str, plain: float, curve: dict[int, float], modes: dict[str, Mode]) -> SpeculationStats:
        """The figures so far; `plain` is the seconds of a step of ordinary decoding."""
        spent = self.draft_seconds + self.verify_seconds + self.accept_seconds + self.rest_seconds
        alone = (self.tokens - self.rested) * plain + self.accept_seconds + self.rest_seconds
        rates = (DepthStats(depth, n, self._stood[depth], self._stood[depth] / n) for depth, n in self._depths.items())
        return SpeculationStats(
            drafter=drafter,
            steps=self.steps,
            tokens=self.tokens,
            drafted=self._drafted.total(),
            accepted=self._accepted.total(),
            tokens_per_verify=self.tokens / self.steps if self.steps else 1.0,
            rows_per_token=self.rows / self.tokens if self.tokens else 1.0,
            acceptance=tuple(sorted(rates, key=lambda row: row.depth)),
            drafters=tuple(DrafterStats(name, n, self._accepted[name]) for name, n in self._drafted.items()),
            draft_seconds=self.draft_seconds,
            verify_seconds=self.verify_seconds,
            accept_seconds=self.accept_seconds,
            plain_ms=1e3 * plain,
            rest_seconds=self.rest_seconds,
            speedup=alone / spent if spent else 1.0,
            curve=curve,
            modes=modes,
            changes=tuple(self.changes),
        )
