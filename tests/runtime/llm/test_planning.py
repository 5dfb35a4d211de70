"""Plans: the best chain and the best tree, against every chain, every tree and Sequoia's dynamic programme."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.runtime.llm.planning import Plan, best_chain, best_tree, chain_tokens, grow
from edgekit.runtime.llm.tree import Shape, TokenTree

Path = tuple[int, ...]  # ranks from the root down; the root is ()
Ranks = list[list[float]]
LAW = settings(max_examples=120, deadline=None)
NODES = 6

CHANCES = st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0])
RANKS = st.lists(st.lists(CHANCES, min_size=1, max_size=3), max_size=3)
COSTS = st.lists(st.floats(0.01, 10), min_size=NODES, max_size=NODES)
RISING = COSTS.map(sorted)  # as a cost curve is; where costs fall, rows that never stand would pay
DRAFTS = st.floats(0, 3) | st.just(0.0)


@cache
def every_tree(nodes: int, widths: tuple[int, ...]) -> frozenset[frozenset[Path]]:
    """All trees of so many nodes, as sets of paths: with each path its beginnings; `widths` are children by depth."""
    if nodes == 1:
        return frozenset({frozenset({()})})
    return frozenset(
        tree | {(*node, rank)}
        for tree in every_tree(nodes - 1, widths)
        for node in tree
        if len(node) < len(widths)
        for rank in range(widths[len(node)])
        if (*node, rank) not in tree
    )


def all_trees(accept: Ranks, most: int) -> list[frozenset[Path]]:
    widths = tuple(len(ranks) for ranks in accept)
    return [tree for nodes in range(1, most + 1) for tree in every_tree(nodes, widths)]


def value(tree: frozenset[Path], accept: Ranks) -> float:
    """Expected tokens by definition: every node times the probability that all of its path stands."""
    return sum(prod(accept[depth][rank] for depth, rank in enumerate(path)) for path in tree)


def paths(shape: Shape) -> list[Path]:
    """The nodes of a shape by their ranks."""
    found: list[Path] = [()]
    for parent, rank in zip(shape.parents[1:], shape.ranks[1:], strict=True):
        found.append((*found[parent], rank))
    return found


def speed(tree: frozenset[Path], accept: Ranks, cost: list[float], draft: float) -> float:
    """Tokens per second, relative to single rows."""
    return value(tree, accept) * cost[0] / (cost[len(tree) - 1] + max(map(len, tree)) * draft)


def sequoia(accept: Ranks, nodes: int) -> float:
    """Chen et al. 2024, section 4.1: the most tokens of at most `nodes` nodes, by dividing them among the children."""

    @cache
    def below(nodes: int, depth: int, rank: int) -> float:
        """The best that `nodes` nodes are worth as children of a node at `depth`, the first of them of this rank."""
        if nodes == 0 or depth == len(accept) or rank == len(accept[depth]):
            return 0.0
        given = (accept[depth][rank] * (1 + below(n - 1, depth + 1, 0)) if n else 0.0 for n in range(nodes + 1))
        return max(worth + below(nodes - n, depth, rank + 1) for n, worth in enumerate(given))

    return 1 + below(nodes - 1, 0, 0)


def check(plan: Plan, accept: Ranks, cost: list[float], draft: float) -> None:
    """A plan's numbers are those of its shape."""
    tree = frozenset(paths(plan.shape))
    assert len(tree) == len(plan.shape.parents)
    assert plan.tokens == pytest.approx(value(tree, accept))
    assert plan.seconds == pytest.approx(cost[len(tree) - 1] + plan.shape.depth * draft)
    assert plan.speedup == pytest.approx(plan.tokens * cost[0] / plan.seconds)


@LAW
@given(RANKS)
def test_no_tree_of_any_size_is_worth_more_than_the_grown_one(accept):
    """For every number of nodes the beginning of the grown tree ties with the best of all trees of that size."""
    shape, worth = grow(accept, NODES)
    widths = tuple(len(ranks) for ranks in accept)
    for nodes in range(1, NODES + 1):
        best = max((value(tree, accept) for tree in every_tree(nodes, widths)), default=0.0)
        assert worth[min(nodes, len(worth)) - 1] >= best - 1e-12
    for nodes, tokens in enumerate(worth, start=1):
        assert tokens == pytest.approx(value(frozenset(paths(shape)[:nodes]), accept))


@LAW
@given(st.lists(st.lists(CHANCES, min_size=1, max_size=4), min_size=1, max_size=6), st.integers(1, 20))
def test_growing_best_first_equals_sequoias_programme(accept, nodes):
    """Larger trees than can be listed: the greedy value is the dynamic programme's."""
    _, worth = grow(accept, nodes)
    assert worth[-1] == pytest.approx(sequoia(accept, nodes))


@LAW
@given(RANKS, st.integers(1, 20))
def test_a_grown_shape_is_a_tree_within_its_limits(accept, nodes):
    """Parents come first, siblings differ in rank, and neither the nodes nor the depth exceed what was asked."""
    shape, worth = grow(accept, nodes)
    TokenTree(shape.ranks, shape.parents)  # refuses a late parent, and ranks that siblings share
    assert len(shape.parents) == len(worth) <= nodes
    assert shape.depth <= len(accept)
    assert all(rank < len(accept[len(path) - 1]) for path in paths(shape)[1:] for rank in path[-1:])
    gains = [after - before for before, after in pairwise(worth)]
    assert all(after <= before + 1e-12 for before, after in pairwise(gains))


def test_what_never_stands_is_not_asked_for():
    """Nodes of probability 0 add rows and no tokens: the tree ends before them."""
    shape, worth = grow([[0.5, 0.0], [0.0, 0.0], [0.9]], 10)
    assert shape == Shape.chain(1)
    assert worth == (1.0, 1.5)
    assert grow([], 10) == (Shape.chain(0), (1.0,))


@LAW
@given(RANKS, RISING, DRAFTS)
def test_the_best_tree_beats_every_tree(accept, cost, draft):
    """Over all trees of up to six nodes none makes more tokens per second, whatever rows and levels cost."""
    plan = best_tree(lambda rows: cost[rows - 1], accept, draft=draft, nodes=NODES)
    check(plan, accept, cost, draft)
    best = max(speed(tree, accept, cost, draft) for tree in all_trees(accept, NODES))
    assert plan.speedup == pytest.approx(best)


@LAW
@given(st.lists(CHANCES, max_size=NODES - 1), COSTS, DRAFTS)
def test_the_best_chain_beats_every_chain(accept, cost, draft):
    """Over all depths none makes more tokens per second, also where the cost has dips."""
    plan = best_chain(lambda rows: cost[rows - 1], accept, draft=draft)
    ranks = [[chance] for chance in accept]
    assert plan.shape == Shape.chain(plan.shape.depth)
    check(plan, ranks, cost, draft)
    chains = [chain_tokens(accept[:depth]) * cost[0] / (cost[depth] + depth * draft) for depth in range(NODES)]
    assert plan.speedup == pytest.approx(max(chains[: len(accept) + 1]))


@LAW
@given(st.lists(CHANCES, max_size=NODES - 1), RISING, DRAFTS)
def test_a_chain_is_a_tree_with_one_rank(accept, cost, draft):
    """Where every node has one guess, both planners find the same speed, and a second guess never makes it worse."""
    chain = best_chain(lambda rows: cost[rows - 1], accept, draft=draft)
    tree = best_tree(lambda rows: cost[rows - 1], [[chance] for chance in accept], draft=draft, nodes=NODES)
    bushy = best_tree(lambda rows: cost[rows - 1], [[p, 0.1] for p in accept], draft=draft, nodes=NODES)
    assert chain.speedup == pytest.approx(tree.speedup)
    assert bushy.speedup >= tree.speedup - 1e-12


@LAW
@given(st.floats(0, 0.99), st.integers(0, 30))
def test_chain_tokens_are_leviathans_closed_form(chance, depth):
    """With one acceptance at every depth the sum is (1 - a^(k+1)) / (1 - a)."""
    assert chain_tokens([chance] * depth) == pytest.approx((1 - chance ** (depth + 1)) / (1 - chance))


@pytest.mark.parametrize("planner", ["chain", "tree"])
def test_drafts_that_do_not_pay_are_not_planned(planner):
    """Where rows cost what they are worth, or nothing stands, the plan is ordinary decoding at speedup 1."""

    def plan(chance: float, draft: float) -> Plan:
        if planner == "chain":
            return best_chain(float, [chance] * 4, draft=draft)
        return best_tree(float, [[chance]] * 4, draft=draft, nodes=8)

    for chance, draft in ((0.0, 0.0), (1.0, 0.0), (1.0, 0.5), (0.7, 0.01)):
        assert plan(chance, draft) == Plan(Shape.chain(0), 1.0, 1.0, 1.0)


def test_a_plan_by_hand():
    """T(1) = 10, T(2) = T(3) = 11, T(4) = 30: two guesses for the next token beat a chain, until the second stands."""
    cost = {1: 10.0, 2: 11.0, 3: 11.0, 4: 30.0}.__getitem__
    bushy = best_tree(cost, [[0.5, 0.3], [0.5, 0.3]], draft=1.0, nodes=4)
    assert bushy.shape == Shape((-1, 0, 0), (0, 0, 1))
    assert bushy == (bushy.shape, pytest.approx(1.8), 12.0, pytest.approx(1.5))
    deep = best_tree(cost, [[0.5, 0.3], [0.9, 0.1]], draft=0.0, nodes=4)
    assert deep.shape == Shape.chain(2)
    assert deep == (deep.shape, pytest.approx(1.95), 11.0, pytest.approx(1.95 * 10 / 11))


def test_time_per_level_makes_trees_flat():
    """The same acceptance and rows: the dearer a level of drafting, the shallower the tree."""
    accept = [[0.8, 0.4, 0.2]] * 6
    depths = [best_tree(lambda rows: 1 + rows / 50, accept, draft=d, nodes=16).shape.depth for d in (0, 0.3, 0.6, 3)]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] > depths[1] > depths[-1] == 0
