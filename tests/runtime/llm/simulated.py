"""A world for the controller without models: drafts stand with given probabilities, steps take given times."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from edgekit.runtime.llm.accept import Accepted, accepted
from edgekit.runtime.llm.controller import Controller
from edgekit.runtime.llm.costs import ROWS, Curve
from edgekit.runtime.llm.drafters import Ask
from edgekit.runtime.llm.tree import Source, TokenTree
from edgekit.runtime.llm.verifier import Scores

RIGHT = 7  # the token that the model draws at every place; siblings are RIGHT + rank
STEEP = (1, 1.1, 1.3, 1.5, 1.9, 2.3, 3.0, 3.7, 5.2, 6.8)  # T(n) / T(1) of int4 weights on two cores
FLAT = (1, 1.02, 1.03, 1.04, 1.06, 1.08, 1.1, 1.15, 1.2, 1.3)  # of weights that are streamed
PLAIN = 0.010  # seconds
SCORES = Scores(np.zeros((1, 1), np.float32))

Chance = Callable[[int, int], float]  # (token of the text, depth from 1) -> whether a first draft there stands


def curve(relative: Sequence[float] = STEEP) -> Curve:
    """T(n) of the simulated verifier."""
    return Curve(ROWS, tuple(PLAIN * cost for cost in relative))


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class SimulatedDraft:
    """Fills the shape it is asked for; whether a chain of first children stands is decided by `Stream`."""

    outputs: tuple[str, ...] = ()

    def __init__(self, clock: Clock, level: float, name: str = "simulated", log_q: float = float("nan")) -> None:
        self.name, self.level, self.clock, self.log_q = name, level, clock, log_q
        self.asked: list[Ask] = []
        self.heard = 0

    def propose(self, tokens: tuple[int, ...], ask: Ask) -> TokenTree:
        self.asked.append(ask)
        self.clock.now += self.level * ask.shape.depth
        size = len(ask.shape.parents)
        drafts = tuple(RIGHT + rank for rank in ask.shape.ranks[1:])
        sources = (Source(self.name),) * size
        return TokenTree((tokens[-1], *drafts), ask.shape.parents, (0.0, *[self.log_q] * (size - 1)), sources)

    def observe(self, tree: TokenTree, step: Accepted, scores: Scores) -> None:
        self.heard += 1


class Stream:
    """The loop of `generate` in simulated time.

    Attributes:
        seconds: that all steps took.
        trees: that were scored.
        texts: tokens made so far.
    """

    def __init__(self, controller: Controller, clock: Clock, chance: Chance, cost: Curve, seed: int = 0) -> None:
        self.controller, self.clock, self.chance, self.cost = controller, clock, chance, cost
        self.random = np.random.default_rng(seed)
        self.trees: list[TokenTree] = []
        self.made = 0
        self.seconds = 0.0

    def run(self, tokens: int) -> float:
        """Make a text of so many tokens after its prompt; the seconds it took."""
        self.controller.begin()
        rule = self.controller.timed(self._accept)
        self._step(rule)
        start, end = self.clock.now, self.made + tokens
        while self.made < end:
            self._step(rule)
        self.seconds += self.clock.now - start
        return self.clock.now - start

    def _step(self, rule) -> None:
        tree = self.controller.propose((1,) * (self.made + 5), Ask())
        self.clock.now += self.cost.at(len(tree))
        step = rule(tree, SCORES.logits, ())
        self.controller.observe(tree, step, SCORES)
        self.made += len(step.tokens)
        self.trees.append(tree)

    def _accept(self, tree: TokenTree, logits, context, ends=()) -> Accepted:
        """Walk down: with what is left of the first child's chance, the second child stands, and so on, halving."""
        path, node = [0], 0
        while children := tree.children(node):
            chances = [self.chance(self.made, len(path))]
            while len(chances) < len(children):
                chances.append((1 - chances[0]) * chances[-1] / 2)
            rank = int(np.searchsorted(np.cumsum(chances), self.random.random(), side="right"))
            if rank == len(children):
                break
            node = children[rank]
            path.append(node)
        return accepted(tree, path, 3)
