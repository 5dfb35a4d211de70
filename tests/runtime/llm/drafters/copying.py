"""What the tests of copying drafters share: shapes, a model that is a rule, and a run of the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from edgekit.runtime.llm.accept import Accepted, own_draw
from edgekit.runtime.llm.drafters import Ask, Drafter
from edgekit.runtime.llm.generate import generate
from edgekit.runtime.llm.probs import Sampling
from edgekit.runtime.llm.tree import Shape, TokenTree
from edgekit.runtime.llm.verifier import Scores, Verifier

BUSH = Shape((-1, 0, 0, 0, 1, 1, 2, 4, 4, 7, 8), (0, 0, 1, 2, 0, 1, 0, 0, 1, 0, 0))
WIDE = Shape((*range(-1, 12), *[0] * 40), (*[0] * 13, *range(1, 41)))  # a chain of 12 and many siblings of its first
ASKS = [Ask(), Ask(Shape.chain(1)), Ask(Shape.chain(6)), Ask(BUSH), Ask(WIDE)]


class Rule:
    """A verifier whose model says `after(text)`, and nothing else is likely."""

    context_length = 10_000

    def __init__(self, after: Callable[[tuple[int, ...]], int], vocabulary: int) -> None:
        self.after, self.vocabulary = after, vocabulary
        self.rows = 0

    def score(self, tokens: tuple[int, ...], tree: TokenTree) -> Scores:
        logits = np.zeros((len(tree), self.vocabulary), np.float32)
        paths = {-1: tokens[:-1]}
        for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
            paths[node] = (*paths[parent], token)
            logits[node, self.after(paths[node])] = 50
        self.rows += len(tree)
        return Scores(logits)

    def keep(self, path: Sequence[int]) -> None:
        assert path[0] == 0


def steps(
    drafter: Drafter, verifier: Verifier, prompt: Sequence[int], count: int, ask: Ask, sampling: Sampling | None = None
) -> list[Accepted]:
    """The steps of the loop, by default greedily."""
    draw = partial(own_draw, draw=sampling or Sampling())
    return list(generate(prompt, drafter=drafter, verifier=verifier, accept=draw, ask=ask, max_new_tokens=count))


def text(accepted: Sequence[Accepted]) -> list[int]:
    return [token for step in accepted for token in step.tokens]


def assert_fits(tree: TokenTree, ask: Ask) -> None:
    """Every node of the tree stands where the shape has one, the k-th child only where the k before it are."""
    assert max(tree.depths) <= min(ask.shape.depth, ask.room)
    at = {0: 0}
    for node in range(1, len(tree)):
        rank = tree.children(tree.parents[node]).index(node)
        wanted = at[tree.parents[node]], rank
        at[node] = list(zip(ask.shape.parents, ask.shape.ranks, strict=True)).index(wanted, 1)
    assert len(tree.log_q) in (0, len(tree))
    assert all(confidence <= 0 for confidence in tree.log_q)
