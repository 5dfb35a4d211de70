"""Calibration: counts by kind of draft that forget, and know little until they have seen something."""

from __future__ import annotations

from math import e, inf, log, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.runtime.llm.calibration import BINS, DEPTHS, KEEP, PRIOR, WEIGHTS, Calibration

LAW = settings(max_examples=150, deadline=None)
SURE, UNSURE = log(0.99), log(0.2)
Draft = tuple[str, int, int, float, bool]
DRAFTS = st.tuples(
    st.sampled_from(["model", "ngram"]),
    st.integers(0, 5),
    st.integers(1, 12),
    st.sampled_from([nan, -inf, 0.0, 0.5, SURE, UNSURE, log(0.05), log(0.6)]),
    st.booleans(),
)
HISTORIES = st.lists(DRAFTS, max_size=80)


def counted(history: list[Draft]) -> Calibration:
    calibration = Calibration()
    for drafter, rank, depth, log_q, stood in history:
        calibration.add(drafter, rank, depth, log_q, stood=stood)
    calibration.settle()
    return calibration


def bin_of(log_q: float) -> int:
    """The slow twin's bin: how many limits the probability has reached."""
    return -1 if log_q != log_q else sum(limit <= e**log_q for limit in BINS)


def depth_of(depth: int) -> int:
    return sum(first <= depth for first in DEPTHS)


def twin(kinds: list[list[Draft]], rank: int) -> float:
    """From the whole history: each kind's drafts weighted by age among their own, shrunk to the estimate above."""
    found = PRIOR[min(rank, 3)]
    for kind, weight in zip(kinds, WEIGHTS, strict=False):
        ages = [KEEP**age for age in range(len(kind))][::-1]
        stood = sum(w for w, draft in zip(ages, kind, strict=True) if draft[4])
        found = (stood + weight * found) / (sum(ages) + weight)
    return found


@LAW
@given(HISTORIES, DRAFTS)
def test_estimates_are_those_of_the_whole_history(history, draft):
    """Decayed running counts equal sums over all that was ever seen, for each level of the prior."""
    drafter, rank, depth, log_q, _ = draft
    calibration = counted(history)
    same = [d for d in history if d[0] == drafter and min(d[1], 3) == min(rank, 3)]
    deep = [d for d in same if depth_of(d[2]) == depth_of(depth)]
    alike = [d for d in same if bin_of(d[3]) == bin_of(log_q)]
    both = [d for d in alike if depth_of(d[2]) == depth_of(depth)]
    assert calibration.of(drafter, rank, depth, log_q) == pytest.approx(twin([same, alike, both], rank))
    assert calibration.typical(drafter, rank, depth) == pytest.approx(twin([same, deep], rank))


@LAW
@given(HISTORIES, DRAFTS)
def test_an_estimate_is_a_probability_and_luck_is_never_bad(history, draft):
    """Strictly between 0 and 1, and what a drafter can hope for is never less than what it is used to."""
    drafter, rank, depth, log_q, _ = draft
    calibration = counted(history)
    usual, lucky = calibration.typical(drafter, rank, depth), calibration.hopeful(drafter, rank, depth)
    assert 0 < calibration.of(drafter, rank, depth, log_q) < 1
    assert 0 < usual <= lucky < 1


def test_before_anything_is_seen_the_prior_speaks():
    """By rank alone; ranks beyond the table are its last."""
    calibration = Calibration()
    for rank, prior in [*enumerate(PRIOR), (9, PRIOR[-1])]:
        for log_q in (nan, SURE, UNSURE):
            assert calibration.of("new", rank, 3, log_q) == prior
        assert calibration.typical("new", rank, 3) == calibration.hopeful("new", rank, 3) == prior


def test_a_few_drafts_move_the_prior_a_little():
    """The prior is worth five drafts, and four on the level below: one that fails takes a sixth off, and a fifth."""
    calibration = counted([("model", 0, 1, nan, False)])
    assert calibration.typical("model", 0, 1) == pytest.approx(PRIOR[0] * 5 / 6 * 4 / 5)
    assert counted([("model", 0, 1, nan, True)]).typical("model", 0, 1) > PRIOR[0]


def test_each_kind_of_draft_is_counted_by_itself():
    """Sure drafts that stand, unsure ones that do not, and second guesses in between are told apart."""
    history = []
    for turn in range(100):
        history += [("model", 0, 1, SURE, True), ("model", 0, 1, UNSURE, False), ("model", 1, 1, SURE, turn % 2 == 0)]
    calibration = counted(history)
    assert calibration.of("model", 0, 1, SURE) > 0.95
    assert calibration.of("model", 0, 1, UNSURE) < 0.05
    assert calibration.of("model", 1, 1, SURE) == pytest.approx(0.5, abs=0.05)
    assert calibration.typical("model", 0, 1) == pytest.approx(0.5, abs=0.05)
    assert calibration.hopeful("model", 0, 1) == calibration.of("model", 0, 1, SURE)
    assert calibration.of("ngram", 0, 1, SURE) == PRIOR[0]


def test_unknown_probabilities_are_a_kind_of_their_own():
    """Drafts copied from a text neither learn from the bins of a model's drafts nor spoil them."""
    calibration = counted([("mixed", 0, 1, nan, True), ("mixed", 0, 1, -inf, False)] * 60)
    assert calibration.of("mixed", 0, 1, nan) > 0.9
    assert calibration.of("mixed", 0, 1, log(0.01)) < 0.1
    assert calibration.hopeful("mixed", 0, 1) == calibration.of("mixed", 0, 1, nan)


def test_the_first_levels_are_the_prior_of_the_last():
    """A bin never seen is like its rank, a depth never seen like its bin."""
    calibration = counted([("model", 0, 1, SURE, True)] * 40 + [("model", 0, 1, UNSURE, False)] * 10)
    rank = (1 - KEEP**40) / (1 - KEEP) * KEEP**10, (1 - KEEP**50) / (1 - KEEP)
    above = (rank[0] + 5 * PRIOR[0]) / (rank[1] + 5)
    assert calibration.of("model", 0, 7, log(0.6)) == pytest.approx(above)
    sure = (1 - KEEP**40) / (1 - KEEP)
    assert calibration.of("model", 0, 7, SURE) == pytest.approx((sure + 4 * above) / (sure + 4))
    assert calibration.typical("model", 0, 7) == pytest.approx(above)


@pytest.mark.parametrize(("one", "other", "together"), [(1, 2, False), (4, 5, True), (6, 8, True), (9, 60, True)])
def test_deep_drafts_share_their_counts(one, other, together):
    """The first depths are apart, later ones come in classes."""
    calibration = counted([("model", 0, one, nan, False)] * 20)
    same = calibration.typical("model", 0, one) == calibration.typical("model", 0, other)
    assert same == together


def test_old_drafts_are_forgotten():
    """After a change of text as many new drafts as are kept outweigh any number of old ones, and more all but erase."""
    long, short = (counted([("model", 0, 1, nan, True)] * count) for count in (5000, 300))
    assert long.typical("model", 0, 1) == pytest.approx(short.typical("model", 0, 1), abs=1e-3)
    for _ in range(48):
        long.add("model", 0, 1, nan, stood=False)
    long.settle()
    assert long.typical("model", 0, 1) < 0.4
    for _ in range(200):
        long.add("model", 0, 1, nan, stood=False)
    long.settle()
    assert long.typical("model", 0, 1) < 0.02


def test_estimates_change_when_they_are_settled():
    """Within a step all nodes are judged by the same numbers; the counts show afterwards."""
    calibration = Calibration()
    before = calibration.of("model", 0, 1, SURE), calibration.typical("model", 0, 1)
    calibration.add("model", 0, 1, SURE, stood=False)
    assert (calibration.of("model", 0, 1, SURE), calibration.typical("model", 0, 1)) == before
    calibration.settle()
    assert calibration.of("model", 0, 1, SURE) < before[0]
    assert calibration.typical("model", 0, 1) < before[1]


def test_loosened_counts_learn_faster():
    """Another text: what is known stays the guess, and a few drafts suffice to change it."""
    firm, loose = (counted([("model", 0, 1, nan, True)] * 300) for _ in range(2))
    loose.loosen(6, "model")
    assert 0.8 < loose.typical("model", 0, 1) <= firm.typical("model", 0, 1)
    for calibration in (firm, loose):
        for _ in range(6):
            calibration.add("model", 0, 1, nan, stood=False)
        calibration.settle()
    assert firm.typical("model", 0, 1) > 0.8
    assert loose.typical("model", 0, 1) < 0.55


def test_only_the_named_drafter_is_loosened():
    """Another drafter's counts stay, also where there are more of them than the weight."""
    calibration = counted([("model", 0, 1, nan, True), ("ngram", 0, 1, nan, True)] * 50)
    before = calibration.of("ngram", 0, 1, nan)
    assert calibration.of("model", 0, 1, nan) == before
    calibration.loosen(2, "model")
    assert calibration.of("ngram", 0, 1, nan) == before > calibration.of("model", 0, 1, nan)


@LAW
@given(HISTORIES, DRAFTS, st.floats(0.5, 20))
def test_loosening_twice_is_loosening_once(history, draft, weight):
    """Counts already below the weight are left alone, so nothing is lost by doing it at every text."""
    drafter, rank, depth, log_q, _ = draft
    once, twice, untouched = counted(history), counted(history), counted(history)
    before = untouched.of(drafter, rank, depth, log_q)
    once.loosen(weight, drafter)
    for _ in range(3):
        twice.loosen(weight, drafter)
    assert once.of(drafter, rank, depth, log_q) == pytest.approx(twice.of(drafter, rank, depth, log_q))
    untouched.loosen(1000, drafter)
    assert untouched.of(drafter, rank, depth, log_q) == before
