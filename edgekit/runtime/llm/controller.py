"""How much to draft, and whether at all: the most tokens per second, and never far below ordinary decoding.

Three things are known and kept up to date: T(n), what a verification costs by its rows (`prices.Prices`); how often
drafts stand, by drafter, depth and confidence (`calibration.Calibration`); and how much time drafts may still lose
(`prices.Credit`). From these a plan says what to ask a drafter for (`planning`), and once the drafts are there and say
how sure they are, the tree is cut to the part that is worth its rows.

A drafter that does not pay rests: its steps are those of ordinary decoding, and it is not even asked. After 64 tokens
it is tried again for a few steps, and if that failed too after twice as many, up to 1024.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import accumulate
from math import nan
from time import perf_counter

from edgekit.runtime.backends import Array
from edgekit.runtime.llm.accept import Accept, Accepted
from edgekit.runtime.llm.arms import FIRST_REST, REPLAN, Arm
from edgekit.runtime.llm.calibration import Calibration
from edgekit.runtime.llm.costs import Curve
from edgekit.runtime.llm.drafters import Ask, Drafter
from edgekit.runtime.llm.drafters.hybrid import HybridDraft
from edgekit.runtime.llm.ledger import Mode, ModeChange, SpeculationStats, Tally
from edgekit.runtime.llm.planning import Plan, best_chain, best_part, best_tree
from edgekit.runtime.llm.prices import MOST, Credit, Prices
from edgekit.runtime.llm.tree import Shape, TokenTree
from edgekit.runtime.llm.verifier import Scores

DEEPEST = 15  # drafts in a chain
BUSHIEST = 31  # drafts in a tree
RANKS = 3  # siblings
CHEAP = 0.03  # a drafter whose level takes less of a plain step is asked for all it may be lucky with
FLAT = 1.5  # trees are thought about where four rows cost less than this many times one
WORTHY = 1.1  # a drafter that promises so many times plain speed need not rest because of a streak of bad luck
SETTLED = 64  # steps with drafts between two plans, once nothing changes
LONGEST_REST = 1024  # tokens
PROBES = 4  # steps with drafts that a probe takes
PROBED_DEPTH = 2
LOOSE = 4.0  # drafts of each kind that what is known counts for in a probe
ANCHOR = 64  # steps with drafts after which one step goes without, so that its cost stays known
FREE = 1.2  # a tree that costs less than this many times one row is not cut where it has guesses to be improved
FOLLOWS = 16  # tokens that a drafter may have missed and still drafts as fast as ever
GLANCE = 16  # steps at rest to one that is timed
ROOT = (-1,)
NOTHING = Shape.chain(0)


class Controller:
    """A drafter that asks another one for the right amount, or for nothing. One request at a time.

    Args:
        drafter: the one asked.
        curve: T(n) as measured for the verifier.
        chains_only: never ask for a tree with branches.
        may_prune: drafts may be left out for their own probability, which rejection sampling forbids.
        fixed: always ask for a chain of so many drafts and decide nothing.
        most: never more drafts in a step than this.
        clock: seconds, from any beginning.
    """

    def __init__(
        self,
        drafter: Drafter,
        curve: Curve,
        *,
        chains_only: bool = False,
        may_prune: bool = True,
        fixed: int | None = None,
        most: int | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self.name, self.outputs = drafter.name, drafter.outputs
        self.prices, self.calibration, self.credit = Prices(curve), Calibration(), Credit()
        self._drafter, self._fixed, self._clock = drafter, fixed, clock
        self._may_prune = may_prune and fixed is None
        self._deepest = min(DEEPEST, most or DEEPEST)
        self._nodes = 0 if chains_only else 1 + min(BUSHIEST, most or BUSHIEST)
        members = drafter.members if isinstance(drafter, HybridDraft) else (drafter.name,)
        self._arms = {name: Arm(name) for name in members}
        self._made = 0  # tokens ever
        self._since_plain = 0  # steps with drafts
        self._asked: list[str] = []  # for drafts in this step
        self._began = self._proposing = self._drafting = self._accepting = 0.0
        self._length = 0  # of the text
        self._source, self._levels = "", 0  # of the tree as it was drafted
        self._asleep = 0  # the count of tokens until which every drafter rests
        self._dozing, self._dozed, self._rest_seconds = False, 0, 0.0  # steps at rest that are not counted yet
        self._past, self.tally = Tally(), Tally()  # of the texts before, of this one
        self.begin()

    def begin(self) -> None:
        """A new text: its prompt comes first, and drafters that rest do so for half as long."""
        self._prompt = True
        self._asleep = 0
        self._wake()
        self._past.merge(self.tally)
        self.tally = Tally()
        self.credit.begin()
        for arm in self._arms.values():
            arm.seen, arm.excused = 0, False
            arm.until -= max(0, arm.until - self._made) // 2

    def timed(self, rule: Accept) -> Accept:
        """The same rule; the time it takes is not taken for verification."""

        def watched(tree: TokenTree, logits: Array, context: tuple[int, ...], ends: Collection[int] = ()) -> Accepted:
            if self._dozing:
                return rule(tree, logits, context, ends)
            start = self._clock()
            step = rule(tree, logits, context, ends)
            self._accepting = self._clock() - start
            return step

        return watched

    def stats(self, *, total: bool = False) -> SpeculationStats:
        """Of the request since the last `begin`, or of all of them."""
        self._wake()
        curve = self.prices.curve
        relative = {rows: round(curve.relative(rows), 3) for rows in curve.rows}
        modes: dict[str, Mode] = {arm.name: arm.mode for arm in self._arms.values()}
        tally = Tally()
        for part in (self._past, self.tally) if total else (self.tally,):
            tally.merge(part)
        return tally.stats(self.name, self.prices.plain, relative, modes)

    def propose(self, tokens: tuple[int, ...], ask: Ask) -> TokenTree:
        """The part of a drafter's tree that is worth scoring; the root alone with the prompt and at rest."""
        start = self._clock()
        self._dozing = self._made < self._asleep and self._made % GLANCE > 0
        if self._dozing:  # every token of a text that nobody can guess comes by here
            self._began = start
            return TokenTree(tokens[-1:], ROOT)
        self._wake()
        tree, self._length, self._levels, self._source = TokenTree(tokens[-1:], ROOT), len(tokens), 0, ""
        shapes = {} if self._prompt or self._anchors() else self._shapes()
        self._asked = [name for name, shape in shapes.items() if len(shape.parents) > 1]
        if shapes and not self._asked:
            self._asleep = min(arm.until for arm in self._arms.values())
        if self._asked:
            asked = self._clock()
            tree = self._drafter.propose(tokens, ask._replace(shape=next(iter(shapes.values())), shapes=shapes))
            self._proposing = self._clock() - asked
            self._levels, self._source = max(tree.depths), self._origin(tree)
            if self._may_prune and len(tree) > 1:
                tree = self._worthwhile(tree)
        self._began = self._clock()
        self._drafting, self._accepting = self._began - start, 0.0
        return tree

    def observe(self, tree: TokenTree, step: Accepted, scores: Scores) -> None:
        """Learn what the step cost and which drafts stood; while every drafter rests, next to nothing."""
        if self._dozing:
            self._made += 1
            self._dozed += 1
            self._rest_seconds += self._clock() - self._began
            return
        verifying = self._clock() - self._began - self._accepting
        self._made += len(step.tokens)
        if self._prompt:
            self._prompt = False
            self._drafter.observe(tree, step, scores)
            return
        self._count(tree, step)
        start = self._clock()
        self._drafter.observe(tree, step, scores)
        self._drafting += self._clock() - start
        self.tally.add(tree, step, drafter=self.name)
        self.tally.time(self._drafting, verifying, self._accepting)
        gained = self._learn_cost(tree, step, verifying)
        if self._fixed is None:
            self._decide(tree, gained)

    def _wake(self) -> None:
        """Count the steps at rest."""
        if self._dozed:
            self.tally.rest(self._dozed, self._rest_seconds)
            self.credit.grow(self._dozed)
            self._dozed, self._rest_seconds = 0, 0.0

    # Asking

    def _anchors(self) -> bool:
        """Whether it is time for a step without drafts."""
        return self._fixed is None and self._since_plain >= ANCHOR

    def _shapes(self) -> dict[str, Shape]:
        """What to ask each drafter for."""
        if self._fixed is not None:
            return dict.fromkeys(self._arms, Shape.chain(self._fixed))
        return {name: self._shape(arm) for name, arm in self._arms.items()}

    def _shape(self, arm: Arm) -> Shape:
        """The plan's, as far as credit allows; less while too little is known of the drafter."""
        if arm.mode == "resting" and self._made < arm.until:
            return NOTHING
        if not self._affords(arm, 1):
            arm.until = max(arm.until, self._made + self.credit.wait(self._loss(arm, 1)))
            return NOTHING
        if arm.mode == "resting":
            self._probe(arm, "tried again")
        if not self.prices.knows(arm.name):
            return Shape.chain(1)
        arm.plan = arm.plan or self._plan(arm)
        if arm.plan.speedup <= 1 and arm.mode == "speculating":
            rate = self.calibration.typical(arm.name, 0, 1)
            self._rest(arm, f"{rate:.0%} of its first drafts stand, which pays at no depth")
            return NOTHING
        depth = arm.plan.shape.depth
        if arm.mode == "probing":
            depth = max(depth, min(PROBED_DEPTH, self._deepest))
        if depth == arm.plan.shape.depth and self._affords(arm, depth, len(arm.plan.shape.parents)):
            return arm.plan.shape
        return Shape.chain(next(d for d in range(depth, 0, -1) if self._affords(arm, d)))

    def _plan(self, arm: Arm) -> Plan:
        """The chain or tree with the most tokens per second, as far as is known before anything is drafted.

        Looking up is cheap, so what it may find is asked for in full and cut later; running a model is not.
        """
        arm.planned = 0
        cost, level = self.prices.at, self.prices.level(arm.name)
        lucky = self._may_prune and level < CHEAP * self.prices.plain
        estimate = self.calibration.hopeful if lucky else self.calibration.typical
        ranks = range(RANKS if self._nodes and self.prices.relative(4) < FLAT else 1)
        accept = [  # a sibling is never asked for without the better ones: rejection sampling relies on it
            list(accumulate((estimate(arm.name, rank, depth) for rank in ranks), min))
            for depth in range(1, self._deepest + 1)
        ]
        plan = best_chain(cost, [first for first, *_ in accept], draft=level)
        if len(ranks) > 1:
            plan = max(plan, best_tree(cost, accept, draft=level, nodes=self._nodes), key=lambda plan: plan.speedup)
        return plan

    def _worthwhile(self, tree: TokenTree) -> TokenTree:
        """The nodes that together make the most tokens per second; what drafting took is gone either way."""
        worth = [1.0]
        seen = [0] * len(tree)
        arms = [source.drafter for source in tree.sources] or [self.name] * len(tree)
        if self.prices.relative(len(tree)) < FREE and not self._arms.keys() >= set(arms):
            return tree
        for node, parent in enumerate(tree.parents[1:], start=1):
            log_q = tree.log_q[node] if tree.log_q else nan
            chance = self.calibration.of(arms[node], seen[parent], tree.depths[node], log_q)
            seen[parent] += 1
            worth.append(worth[parent] * chance)
        arm = self._arms.get(self._source)
        probing = arm is not None and arm.mode == "probing"
        nodes = best_part(worth, self.prices.at, self._payable, least=2 if probing else 1)
        if arm is not None:
            arm.declined = arm.declined + 1 if len(nodes) == 1 else 0
        return tree if len(nodes) == len(tree) else tree.keep(nodes)

    def _payable(self, seconds: float) -> bool:
        """Whether credit allows a verification of so many seconds."""
        return self.credit.allows(seconds / self.prices.plain - 1)

    # Learning

    def _count(self, tree: TokenTree, step: Accepted) -> None:
        """Which of the drafts whose parents stood are what the model drew."""
        if len(tree) == 1:
            return
        for node, drawn in zip(step.path, step.tokens, strict=True):
            for rank, child in enumerate(tree.children(node)):
                name = tree.sources[child].drafter if tree.sources else self.name
                log_q = tree.log_q[child] if tree.log_q else nan
                self.calibration.add(name, rank, tree.depths[child], log_q, stood=tree.tokens[child] == drawn)
        self.calibration.settle()

    def _learn_cost(self, tree: TokenTree, step: Accepted, seconds: float) -> float:
        """Move prices towards what the step took, and settle what drafts gained or lost, in plain steps."""
        plain, drafting = self.prices.plain, self._learn_draft() if self._asked else 0.0
        if len(tree) == 1:
            self.prices.saw_plain(seconds)
            self._since_plain = 0
            gained = -drafting / plain
        else:
            seconds = self.prices.saw_run(len(tree), seconds)
            self._since_plain += 1
            gained = len(step.tokens) - (seconds + drafting) / plain
        self.credit.grow(len(step.tokens), gained)
        return gained

    def _learn_draft(self) -> float:
        """Move the price of drafting; the seconds of it that count against credit."""
        arm = self._arms.get(self._source)
        missed = 0 if arm is None else self._length - arm.seen
        for name in self._asked:
            self._arms[name].seen = self._length
            if name == self._source:
                break
        if arm is None or not self._levels:
            return self._drafting
        if missed <= FOLLOWS:
            self.prices.saw_draft(arm.name, self._levels, self._proposing)
            return self._drafting
        more = max(0.0, self._proposing - self._levels * self.prices.level(arm.name))
        self.prices.saw_catching_up(arm.name, missed, more)
        if arm.excused or arm.mode != "speculating":
            return self._drafting
        arm.excused = True
        return self._drafting - more

    def _origin(self, tree: TokenTree) -> str:
        """Which of the drafters the first draft is from; "" where there is none."""
        if len(tree) == 1:
            return ""
        name = tree.sources[1].drafter if tree.sources else self.name
        return name if name in self._arms else self.name  # lookahead names its window apart

    # Deciding

    def _decide(self, tree: TokenTree, gained: float) -> None:
        """Change modes after a step, where there is a reason to."""
        arm = self._arms.get(self._origin(tree))
        if arm is not None:
            arm.planned += 1
            arm.probes -= 1
            arm.gained = min(arm.gained + gained, MOST)
            if arm.mode == "probing" and arm.probes <= 0:
                self._judge(arm)
            elif arm.mode == "speculating" and arm.planned >= arm.every:
                arm.plan, arm.every = self._plan(arm), min(2 * arm.every, SETTLED)
        for other in [arm] if arm is not None else [self._arms[name] for name in self._asked]:
            if other.mode != "resting" and not self._affords(other, 1):
                self._broke(other)
            elif other.mode == "speculating" and other.declined >= other.rest:
                self._probe(other, f"{other.declined} offers in a row were not worth their rows")

    def _broke(self, arm: Arm) -> None:
        """Credit does not cover the next draft: a drafter that has gained, and should again, waits until it does."""
        if arm.mode == "speculating" and arm.gained > 0:
            arm.plan = self._plan(arm)
            if arm.plan.speedup > WORTHY:
                return
        self._rest(arm, f"of the credit {self.credit.left:.2f} plain steps are left, too few for its next draft")

    def _judge(self, arm: Arm) -> None:
        """The end of a probe: its own outcome counts, since little else is known for sure then."""
        told = f"the probe gained {arm.gained:+.1f} plain steps"
        if arm.gained > 0:
            arm.rest = FIRST_REST
            self._turn(arm, "speculating", told)
        else:
            self._rest(arm, told)

    def _affords(self, arm: Arm, depth: int, nodes: int = 0) -> bool:
        """Whether credit allows a step with so many levels of drafts, all of them wrong; a chain without `nodes`."""
        return self.credit.allows(self._loss(arm, depth, nodes))

    def _loss(self, arm: Arm, depth: int, nodes: int = 0) -> float:
        """What such a step loses if all drafts are wrong, in plain steps.

        A drafter that rests has to read what it missed first. One that is known to pay off may do so uncounted, once
        in a text: it gains it back over many steps, and no single one would be allowed it.
        """
        seconds = self.prices.at(nodes or 1 + depth) + depth * self.prices.level(arm.name)
        if arm.mode == "resting":
            seconds += self.prices.catching_up(arm.name) * (self._length - arm.seen)
        return seconds / self.prices.plain - 1

    def _rest(self, arm: Arm, reason: str) -> None:
        arm.until = self._made + arm.rest
        reason += f"; again after {arm.rest} tokens"
        arm.rest = min(2 * arm.rest, LONGEST_REST)
        self._turn(arm, "resting", reason)

    def _probe(self, arm: Arm, reason: str) -> None:
        arm.probes, arm.gained = PROBES, 0.0
        self.calibration.loosen(LOOSE, arm.name)
        self._turn(arm, "probing", reason)

    def _turn(self, arm: Arm, mode: Mode, reason: str) -> None:
        """Change the mode, forget the plan, and say so."""
        arm.mode, arm.plan, arm.declined, arm.every = mode, None, 0, REPLAN
        self.tally.changes.append(ModeChange(self.tally.tokens, arm.name, mode, reason))
