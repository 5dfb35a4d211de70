"""One drafter under control: what it is doing, and what its last steps brought."""

from __future__ import annotations

from dataclasses import dataclass

from edgekit.runtime.llm.ledger import Mode
from edgekit.runtime.llm.planning import Plan

REPLAN = 8  # steps with drafts between two plans, at first
FIRST_REST = 64  # tokens


@dataclass
class Arm:
    """One drafter under control.

    Attributes:
        name: as `TokenTree.sources` has it.
        mode: speculating, resting, or probing.
        plan: what to ask for; None is to be made.
        planned: steps with drafts since the plan was made.
        every: so many of them until the next.
        rest: tokens that the next rest takes, and offers in a row that may be declined before a probe.
        until: the count of tokens at which it ends.
        probes: steps with drafts left of a probe.
        gained: plain steps that it gained since its last probe began, as far as that is not long ago.
        seen: tokens of the text that it was asked to follow.
        excused: it caught up in this text, uncounted.
        declined: offers in a row that were not worth scoring.
    """

    name: str
    mode: Mode = "speculating"
    plan: Plan | None = None
    planned: int = 0
    every: int = REPLAN
    rest: int = FIRST_REST
    until: int = 0
    probes: int = 0
    gained: float = 0.0
    seen: int = 0
    excused: bool = False
    declined: int = 0
