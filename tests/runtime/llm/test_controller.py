"""The controller in simulated time: near the best fixed choice where drafts pay, near plain decoding where not."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.runtime.llm import prices
from edgekit.runtime.llm.accept import Accepted
from edgekit.runtime.llm.arms import FIRST_REST
from edgekit.runtime.llm.controller import ANCHOR, LONGEST_REST, PROBES, Controller
from edgekit.runtime.llm.drafters import Ask
from edgekit.runtime.llm.drafters.hybrid import HybridDraft
from edgekit.runtime.llm.tree import Shape, Source, TokenTree
from tests.runtime.llm.simulated import FLAT, PLAIN, SCORES, STEEP, Clock, SimulatedDraft, Stream, curve


def stream(chance, level=0.05 * PLAIN, relative=STEEP, seed=0, **options) -> tuple[Stream, SimulatedDraft]:
    """A controller over a drafter whose first drafts stand with `chance`."""
    clock = Clock()
    draft = SimulatedDraft(clock, level)
    controller = Controller(draft, curve(relative), clock=clock, **options)
    rule = chance if callable(chance) else lambda made, depth: chance
    return Stream(controller, clock, rule, curve(relative), seed), draft


def best_fixed(chance: float, level: float, relative=STEEP) -> float:
    """Seconds per token of the best chain of constant depth, by trying all."""
    times = []
    for depth in range(16):
        tokens = sum(chance**k for k in range(depth + 1))
        times.append((curve(relative).at(depth + 1) + depth * level) / tokens)
    return min(times)


@pytest.mark.parametrize("relative", [STEEP, FLAT], ids=["steep", "flat"])
@pytest.mark.parametrize("chance", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("level", [0.001 * PLAIN, 0.05 * PLAIN, 0.2 * PLAIN])
def test_it_is_as_fast_as_the_best_fixed_chain(relative, chance, level):
    """Over 3,000 tokens, learning included, at most a tenth slower than the chain one would have chosen knowing all."""
    found, _ = stream(chance, level, relative)
    found.run(3000)
    assert found.seconds / 3000 < 1.1 * best_fixed(chance, level, relative)


@settings(max_examples=60, deadline=None)
@given(
    chance=st.sampled_from([0.0, 0.05, 0.2, 0.4, 0.6]),
    level=st.floats(0, 1.5),
    texts=st.lists(st.integers(30, 400), min_size=1, max_size=6),
    seed=st.integers(0, 999),
)
def test_it_is_never_far_below_plain_decoding(chance, level, texts, seed):
    """Whatever the drafter is worth and costs: at most the credit promised, and a step, longer than without drafts."""
    found, _ = stream(chance, level * PLAIN, seed=seed)
    for length in texts:
        found.run(length)
    made = found.controller.stats(total=True).tokens
    allowed = prices.START + prices.GRANT * len(texts) + prices.INTEREST * made + level + 2
    assert found.seconds / PLAIN <= made + allowed


def test_a_drafter_that_never_pays_is_hardly_asked():
    """It rests, is tried again for a few steps, and rests twice as long each time, up to a limit."""
    found, draft = stream(0.02)
    found.run(6000)
    stats = found.controller.stats()
    rests = [change for change in stats.changes if change.mode == "resting"]
    waits = np.diff([change.token for change in rests])
    assert waits[0] >= FIRST_REST
    assert (waits[2:-1] >= 2 * FIRST_REST).all()
    assert max(waits) <= 2 * LONGEST_REST
    assert len(draft.asked) < 300
    assert stats.modes == {"simulated": "resting"} or stats.modes == {"simulated": "probing"}
    assert all("again after" in change.reason for change in rests)


def test_it_comes_back_when_drafts_pay_again():
    """Good, then hopeless, then good text: it speculates, rests, and speculates, and says so."""
    found, _ = stream(lambda made, depth: 0.02 if 500 < made < 900 else 0.85)
    found.run(3000)
    modes = [change.mode for change in found.controller.stats().changes]
    assert modes[0] == "resting"
    assert modes[-1] == "speculating"
    assert found.controller.stats().modes == {"simulated": "speculating"}
    late = [len(tree) for tree in found.trees[-50:]]
    assert np.mean(late) > 2


def test_rest_is_ordinary_decoding():
    """A resting drafter is not asked at all, and every tree is its root."""
    found, draft = stream(0.0)
    found.run(400)
    stats = found.controller.stats()
    asked = [len(tree) > 1 for tree in found.trees]
    assert sum(asked) <= len(draft.asked) <= sum(asked) + PROBES * 8
    assert stats.tokens_per_verify == 1
    assert stats.rows_per_token < 1.1


def test_a_new_text_is_a_new_chance():
    """A drafter that rests for long is tried again with the next text, as soon as credit allows."""
    found, draft = stream(lambda made, depth: 0.0 if made < 2000 else 0.9)
    found.run(2000)
    before = len(draft.asked)
    found.run(200)
    assert len(draft.asked) > before + 20
    assert found.controller.stats().tokens_per_verify > 1.5


def test_the_prompt_is_computed_as_without_drafts():
    """The first step of a text asks nobody and is not counted."""
    clock = Clock()
    draft = SimulatedDraft(clock, 0.0)
    controller = Controller(draft, curve(), clock=clock)
    controller.begin()
    tree = controller.propose((1, 2), Ask())
    clock.now += 5
    controller.observe(tree, Accepted((0,), (7,)), SCORES)
    assert (len(tree), draft.asked, draft.heard) == (1, [], 1)
    assert controller.stats().steps == 0
    assert controller.prices.plain == PLAIN


def test_a_fixed_number_is_kept():
    """Told how many drafts to ask for, it asks for those, loses what they lose, and changes no mode."""
    found, draft = stream(0.0, fixed=4)
    found.run(100)
    assert {ask.shape for ask in draft.asked} == {Shape.chain(4)}
    assert all(len(tree) == 5 for tree in found.trees[1:])
    assert found.controller.stats().changes == ()


def test_never_more_than_the_most():
    """A bound on drafts holds for chains and for trees."""
    for relative in (STEEP, FLAT):
        found, _ = stream(0.95, 0.0, relative, most=3)
        found.run(500)
        assert max(len(tree) for tree in found.trees) == 4


def test_trees_where_verification_is_flat():
    """Branches pay where rows are nearly free, chains where they are not, and chains alone where asked for."""
    flat, _ = stream(0.5, 0.01 * PLAIN, FLAT)
    steep, _ = stream(0.5, 0.01 * PLAIN, STEEP)
    chains, _ = stream(0.5, 0.01 * PLAIN, FLAT, chains_only=True)
    for one in (flat, steep, chains):
        one.run(800)
    assert any(not tree.is_chain for tree in flat.trees)
    assert all(tree.is_chain for tree in steep.trees)
    assert all(tree.is_chain for tree in chains.trees)
    assert flat.seconds < chains.seconds < steep.seconds


def test_rejection_sampling_is_not_pruned():
    """Where a draft may not be left out for its own probability, what was asked for is scored."""
    found, draft = stream(0.7, may_prune=False)
    found.run(300)
    scored = [tree for tree in found.trees if len(tree) > 1]
    assert [len(tree) for tree in scored] == [len(ask.shape.parents) for ask in draft.asked]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 9999))
def test_a_tree_is_cut_to_the_part_that_is_worth_most(seed):
    """Of all subtrees with the root, the one with the most expected tokens per second; by trying them all."""
    random = np.random.default_rng(seed)
    size = int(random.integers(2, 8))
    parents = (-1, *(int(random.integers(0, node)) for node in range(1, size)))
    log_q = (0.0, *np.log(random.uniform(0.02, 0.99, size - 1)).tolist())
    tree = TokenTree(tuple(range(size)), parents, log_q, (Source("simulated"),) * size)
    controller = Controller(SimulatedDraft(Clock(), 0.0), curve(FLAT if seed % 2 else STEEP), clock=Clock())
    controller.credit.left = prices.MOST
    kept = controller._worthwhile(tree)

    def rate(nodes: tuple[int, ...]) -> float:
        tokens = 0.0
        for node in nodes:
            stands, at = 1.0, node
            while at:
                rank = tree.children(tree.parents[at]).index(at)
                stands *= controller.calibration.of("simulated", rank, tree.depths[at], tree.log_q[at])
                at = tree.parents[at]
            tokens += stands
        return tokens / controller.prices.curve.at(len(nodes))

    subtrees = [
        (0, *nodes)
        for count in range(size)
        for nodes in combinations(range(1, size), count)
        if all(tree.parents[node] in (0, *nodes) for node in nodes)
    ]
    nodes = tuple(node for node in range(size) if tree.tokens[node] in kept.tokens)
    assert rate(nodes) == pytest.approx(max(map(rate, subtrees)))
    assert kept == tree.keep(nodes)


def test_confidence_is_learnt():
    """Drafts that stand only when the drafter is sure: in the end only those are scored."""
    clock = Clock()
    sure = SimulatedDraft(clock, 0.0)

    def chance(made: int, depth: int) -> float:
        return 0.95 if sure.log_q > -0.5 else 0.02

    found = Stream(Controller(sure, curve(), clock=clock), clock, chance, curve())
    original = sure.propose

    def propose(tokens, ask):
        sure.log_q = -0.05 if len(tokens) % 3 else -3.0
        return original(tokens, ask)

    sure.propose = propose  # type: ignore[method-assign]
    found.run(6000)
    late = [(tree.log_q[1] > -0.5) for tree in found.trees[-300:] if len(tree) > 1]
    assert np.mean(late) > 0.95


def test_of_two_drafters_each_has_its_own_mode():
    """The useless half of a hybrid rests while the other goes on."""
    clock = Clock()
    good, bad = SimulatedDraft(clock, 0.0, "good", log_q=-2.0), SimulatedDraft(clock, 0.3 * PLAIN, "bad")
    controller = Controller(HybridDraft(bad, good, sure=0.0), curve(), clock=clock)
    bad.log_q = -0.01

    def chance(made: int, depth: int) -> float:
        return 0.01 if controller._busy_with == "bad" else 0.9

    found = Stream(controller, clock, chance, curve())
    original = controller.propose

    def propose(tokens, ask):
        tree = original(tokens, ask)
        controller._busy_with = tree.sources[1].drafter if len(tree) > 1 else ""
        return tree

    controller.propose = propose  # type: ignore[method-assign]
    found.run(600)
    stats = found.controller.stats()
    assert stats.modes["good"] == "speculating"
    assert stats.modes["bad"] == "resting"
    assert {change.drafter for change in stats.changes} == {"bad"}
    assert stats.tokens_per_verify > 2


def test_the_cost_of_a_plain_step_stays_known():
    """After so many steps with drafts one goes without, and the curve follows a machine that became twice as slow."""
    found, _ = stream(0.95)
    found.run(1000)
    plain = [number for number, tree in enumerate(found.trees[1:]) if len(tree) == 1]
    assert max(np.diff(plain)) <= ANCHOR + 1
    found.cost = found.cost.scaled(2.0)
    found.run(4000)
    assert found.controller.prices.plain == pytest.approx(2 * PLAIN, rel=0.2)


def test_the_times_of_a_step_add_up():
    """Drafting, verifying and drawing are told apart, and together are all the time there was."""
    found, _ = stream(0.8, 0.1 * PLAIN)
    rule = found._accept

    def slow(tree, logits, context, ends=()):
        found.clock.now += 0.001
        return rule(tree, logits, context, ends)

    found._accept = slow  # type: ignore[method-assign]
    seconds = found.run(500)
    stats = found.controller.stats()
    assert stats.draft_seconds + stats.verify_seconds + stats.accept_seconds == pytest.approx(seconds)
    assert stats.accept_seconds == pytest.approx(0.001 * stats.steps)
    assert stats.draft_seconds > 0
    plain = stats.tokens * PLAIN + stats.accept_seconds
    assert stats.speedup == pytest.approx(plain / seconds, rel=0.05)


def test_what_is_told_is_what_happened():
    """Counts of tokens, rows and drafts, and acceptance by depth, are those of the trees."""
    found, _ = stream(0.75)
    found.run(2000)
    stats, trees = found.controller.stats(), found.trees[1:]
    assert stats.steps == len(trees)
    assert stats.tokens == found.made - 1
    assert stats.drafted == sum(len(tree) - 1 for tree in trees)
    assert stats.rows_per_token == pytest.approx(sum(map(len, trees)) / stats.tokens)
    assert stats.accepted == stats.tokens - stats.steps
    assert [row.depth for row in stats.acceptance] == list(range(1, len(stats.acceptance) + 1))
    assert stats.acceptance[0].rate == pytest.approx(0.75, abs=0.05)
    assert stats.acceptance[0].offered == sum(len(tree) > 1 for tree in trees)
    assert sum(row.accepted for row in stats.acceptance) == stats.accepted


def test_requests_are_counted_apart_and_together():
    """`begin` begins the figures anew; the total goes on."""
    found, _ = stream(0.6)
    found.run(200)
    first = found.controller.stats()
    found.run(300)
    second, total = found.controller.stats(), found.controller.stats(total=True)
    assert total.tokens == first.tokens + second.tokens
    assert total.drafted == first.drafted + second.drafted
    assert found.controller.stats(total=True).draft_seconds == pytest.approx(first.draft_seconds + second.draft_seconds)


def test_no_sibling_without_its_betters():
    """Where second guesses stand more often than first ones, a tree still has the first: its law is drawn in order."""
    clock = Clock()
    draft = SimulatedDraft(clock, 0.001 * PLAIN)
    controller = Controller(draft, curve(FLAT), clock=clock, may_prune=False)
    for depth in range(1, 6):
        for _ in range(60):
            controller.calibration.add("simulated", 0, depth, float("nan"), stood=False)
            controller.calibration.add("simulated", 1, depth, float("nan"), stood=True)
    controller.calibration.settle()
    controller.prices.saw_draft("simulated", 1, 0.001 * PLAIN)
    shape = controller._plan(controller._arms["simulated"]).shape
    links = set(zip(shape.parents, shape.ranks, strict=True))
    assert all((parent, rank - 1) in links for parent, rank in links if rank > 0)


def test_bad_luck_does_not_send_a_proven_drafter_to_rest():
    """After many good steps a streak of wrong drafts makes it wait for credit, not rest: soon it drafts again."""
    found, draft = stream(lambda made, depth: 0.0 if 600 < made < 604 else 0.9)
    found.run(600)
    assert found.controller.stats().changes == ()
    found.controller.credit.left = 0.3
    before = len(draft.asked)
    found.run(60)
    assert found.controller.stats().changes == ()
    assert len(draft.asked) > before + 5
