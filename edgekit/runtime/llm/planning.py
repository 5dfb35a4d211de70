"""Which drafts to ask for: the chain or tree with the most expected tokens per second. Pure functions.

A draft at depth d that is its parent's r-th best guess stands with probability `accept[d - 1][r - 1]`, given that its
parent does. A node of the tree stands when all of its path does, so a tree is worth the sum over its nodes of the
products along their paths; the root counts 1, for the token that the model draws itself. For a chain with acceptance a
at every depth that is (1 - a^(k+1)) / (1 - a) (Leviathan et al. 2023, arXiv:2211.17192). A step of n rows and depth k
costs T(n) + k * draft, and the plan is the tree that maximises tokens over cost.

Sequoia (Chen et al. 2024, arXiv:2402.12374) finds the best tree of n nodes by dynamic programming. No node is worth
more than its parent, so the n nodes with the largest products are a tree, and no tree of n nodes is worth more: growing
it best first gives the same optimum, for every n in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from edgekit.runtime.llm.tree import Shape

Ranks = Sequence[Sequence[float]]  # [depth - 1][rank - 1] -> probability to stand, given that the parent does
Cost = Callable[[int], float]  # seconds of one verification by its rows


class Plan(NamedTuple):
    """What to ask a drafter for.

    Attributes:
        shape: the topology.
        tokens: expected per step, the model's own draw included.
        seconds: expected per step.
        speedup: tokens per second, relative to one token per single-row step.
    """

    shape: Shape
    tokens: float
    seconds: float
    speedup: float


def chain_tokens(accept: Sequence[float]) -> float:
    """Expected tokens of a step with a chain, given the probability of each draft to stand if those before it do."""
    tokens = stands = 1.0
    for probability in accept:
        stands *= probability
        tokens += stands
    return tokens


def best_chain(cost: Cost, accept: Sequence[float], *, draft: float) -> Plan:
    """The depth, from 0 to `len(accept)`, with the most expected tokens per second.

    Args:
        cost: T(n), seconds of a verification of n rows.
        accept: by depth, the probability that a draft stands if those before it do.
        draft: seconds per draft.
    """
    best = nothing = cost(1)
    tokens = stands = 1.0
    plan = Plan(Shape.chain(0), 1.0, nothing, 1.0)
    for depth, probability in enumerate(accept, start=1):
        stands *= probability
        tokens += stands
        seconds = cost(depth + 1) + depth * draft
        if seconds < best * tokens:
            best = seconds / tokens
            plan = Plan(Shape.chain(depth), tokens, seconds, nothing / best)
    return plan


def best_tree(cost: Cost, accept: Ranks, *, draft: float, nodes: int) -> Plan:
    """The tree of at most `nodes` nodes, root included, with the most expected tokens per second.

    Args:
        cost: T(n), seconds of a verification of n rows.
        accept: by depth and rank; its length is the depth limit.
        draft: seconds per level.
        nodes: the most rows.
    """
    plan = Plan(Shape.chain(0), 1.0, cost(1), 1.0)
    verify = [cost(rows) for rows in range(1, nodes + 1)]
    for depth in range(1 if draft > 0 else len(accept), len(accept) + 1):
        shape, worth = grow(accept[:depth], nodes)
        for size in range(2, len(worth) + 1):
            tokens, seconds = worth[size - 1], verify[size - 1] + depth * draft
            speedup = tokens * verify[0] / seconds
            if speedup > plan.speedup:
                plan = Plan(Shape(shape.parents[:size], shape.ranks[:size]), tokens, seconds, speedup)
    return plan


def best_part(worth: Sequence[float], cost: Cost, payable: Callable[[float], bool], *, least: int = 1) -> list[int]:
    """The nodes of a tree that together make the most tokens per second, ascending.

    Args:
        worth: of each node, the probability that all of its path stands; never more than its parent's.
        cost: T(n), seconds of a verification of n rows.
        payable: whether so many seconds may be spent.
        least: keep so many nodes, where that is payable, whatever they make.
    """
    order = sorted(range(len(worth)), key=lambda node: -worth[node])  # stable, so parents stay before children
    best, rate, tokens = 1, 1 / cost(1), 1.0
    for count, node in enumerate(order[1:], start=2):
        tokens += worth[node]
        seconds = cost(count)
        if not payable(seconds):
            break
        if tokens / seconds > rate or count <= least:
            best, rate = count, tokens / seconds
    return sorted(order[:best])


def grow(accept: Ranks, nodes: int) -> tuple[Shape, tuple[float, ...]]:
    """The best trees of 1 to `nodes` nodes, no deeper than `len(accept)`: each is the beginning of the next.

    Returns:
        the largest of them, its nodes in the order they were added; and the expected tokens of each.
    """
    parents, ranks, worth = [-1], [0], [1.0]
    hopes = [(-stands, 0, rank, 1) for rank, stands in enumerate(accept[0])] if accept else []
    heapify(hopes)
    while hopes and len(parents) < nodes:
        value, parent, rank, depth = heappop(hopes)
        if value == 0:
            break
        if depth < len(accept):
            for below, stands in enumerate(accept[depth]):
                heappush(hopes, (value * stands, len(parents), below, depth + 1))
        parents.append(parent)
        ranks.append(rank)
        worth.append(worth[-1] - value)
    return Shape(tuple(parents), tuple(ranks)), tuple(worth)
