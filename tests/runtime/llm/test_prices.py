"""Prices follow the machine without jumping, and credit keeps its promise whatever a drafter does."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.runtime.llm.costs import Curve
from edgekit.runtime.llm.prices import (
    BEND_RATE,
    DRAFT_RATE,
    DRIFT_RATE,
    GRANT,
    INTEREST,
    MOST,
    OUTLIER,
    START,
    Credit,
    Prices,
)

LAW = settings(max_examples=150, deadline=None)
CURVE = Curve((1, 2, 4, 8), (1.0, 1.2, 1.6, 2.4))


def relative(prices: Prices) -> list[float]:
    return [prices.curve.relative(rows) for rows in CURVE.rows]


def test_the_first_step_of_one_row_sets_the_scale():
    """A curve measured on a calm machine is taken over in shape; the first real step says how slow it is today."""
    prices = Prices(CURVE)
    prices.saw_plain(7.0)
    assert prices.plain == pytest.approx(7)
    assert relative(prices) == pytest.approx(list(CURVE.seconds))


@LAW
@given(st.lists(st.tuples(st.integers(1, 9), st.floats(1e-3, 100)), max_size=60))
def test_prices_are_read_off_the_curve(seen):
    """After any steps, the shortcuts that make no curve say what the curve says."""
    prices = Prices(CURVE)
    for rows, seconds in seen:
        if rows == 1:
            prices.saw_plain(seconds)
        else:
            prices.saw_run(rows, seconds)
    assert prices.plain == pytest.approx(prices.curve.at(1))
    for rows in range(1, 12):
        assert prices.at(rows) == pytest.approx(prices.curve.at(rows))
        assert prices.relative(rows) == pytest.approx(prices.at(rows) / prices.plain)


def test_the_first_steps_are_averaged():
    """While there are few, all count the same: the geometric mean."""
    prices, seen = Prices(CURVE), [3.0, 2.0, 2.5, 3.5, 3.0]
    for seconds in seen:
        prices.saw_plain(seconds)
    assert prices.plain == pytest.approx(prod(seen) ** (1 / len(seen)))


@pytest.mark.parametrize("times", [2, 0.5])
def test_a_step_far_off_counts_as_twice_off(times):
    """A page fault of a thousand steps moves the price no more than a step that took twice as long."""
    wild, tame = Prices(CURVE), Prices(CURVE)
    for prices in (wild, tame):
        prices.saw_plain(1.0)
    wild.saw_plain(times**10)
    tame.saw_plain(times)
    assert wild.plain == tame.plain
    assert wild.plain == pytest.approx(times**0.5)


def test_prices_follow_a_machine_that_slows_down():
    """Thirty steps at a new speed, and the whole curve is within a tenth of it."""
    prices = Prices(CURVE)
    for seconds in [1.0] * 50 + [3.0] * 30:
        prices.saw_plain(seconds)
    assert prices.plain == pytest.approx(3, rel=0.1)
    assert relative(prices) == pytest.approx(list(CURVE.seconds))


def test_a_larger_run_bends_the_curve_and_moves_it_a_little():
    """By their two rates: the rows seen most, the single row by the drift alone."""
    prices = Prices(CURVE)
    assert prices.saw_run(4, 2.0) == 2.0
    ratio = 2.0 / 1.6
    assert prices.plain == pytest.approx(ratio**DRIFT_RATE)
    assert prices.curve.at(4) == pytest.approx(1.6 * ratio ** (BEND_RATE + DRIFT_RATE))
    assert prices.curve.at(8) == pytest.approx(2.4 * ratio ** (BEND_RATE / 2 + DRIFT_RATE))


@pytest.mark.parametrize(("seconds", "counted"), [(100.0, 1.6 * OUTLIER), (1e-9, 1.6 / OUTLIER), (1.7, 1.7)])
def test_outliers_of_larger_runs_are_cut(seconds, counted):
    """What a run is counted with is at most a factor off what was expected, and the curve sees no more of it."""
    cut, asked = Prices(CURVE), Prices(CURVE)
    assert cut.saw_run(4, seconds) == pytest.approx(counted)
    asked.saw_run(4, counted)
    assert cut.curve.seconds == pytest.approx(asked.curve.seconds)


def test_a_curve_learns_another_one():
    """From a wrong table, steps of all sizes at their true cost: every price comes within a few per cent."""
    prices, truth = Prices(CURVE), Curve((1, 2, 4, 8), (2.0, 3.6, 4.4, 5.0))
    for _ in range(60):
        prices.saw_plain(truth.at(1))
        for rows in (2, 4, 8, 6, 3):
            prices.saw_run(rows, truth.at(rows))
    assert [prices.curve.at(rows) for rows in range(1, 9)] == pytest.approx(list(map(truth.at, range(1, 9))), rel=0.03)


@pytest.mark.parametrize(
    "truth", [{1: 2.0, 2: 1.0}, {1: 1.0, 2: 0.98}, {1: 1.0, 3: 1.6, 4: 1.3}, {1: 1.0, 2: 9.0, 8: 1.1}]
)
def test_times_that_no_curve_can_meet_do_not_drive_it_apart(truth):
    """Kernels that are faster with more rows, for thousands of steps: no price leaves what was ever seen."""
    prices = Prices(Curve((1, 2, 3, 4, 6, 8), (1.0, 1.1, 1.2, 1.3, 1.6, 2.0)))
    for _ in range(2000):
        for rows, seconds in truth.items():
            if rows == 1:
                prices.saw_plain(seconds)
            else:
                prices.saw_run(rows, seconds)
    low, high = min(truth.values()) * 0.9, max(*truth.values(), 2.0 * truth[1]) * 1.1
    assert all(low < seconds < high for seconds in prices.curve.seconds)


def test_single_rows_that_are_slower_than_two_flatten_no_larger_runs():
    """A time below a single row's is no news of runs that were not seen: they keep their distance."""
    prices = Prices(CURVE)
    for _ in range(500):
        prices.saw_plain(1.0)
        prices.saw_run(2, 0.9)
    assert prices.curve.relative(2) == pytest.approx(1, abs=0.01)
    assert prices.curve.relative(8) > 2


def test_a_level_of_drafting_is_averaged_by_drafter():
    """Unknown is free, the first observation is believed, later ones move it by their rate, and names are apart."""
    prices = Prices(CURVE)
    assert prices.level("model") == 0
    assert not prices.knows("model")
    prices.saw_draft("model", 4, 2.0)
    assert prices.level("model") == 0.5
    prices.saw_draft("model", 2, 3.0)
    assert prices.level("model") == pytest.approx(0.5 + DRAFT_RATE * (1.5 - 0.5))
    assert prices.knows("model")
    assert prices.level("ngram") == 0
    assert not prices.knows("ngram")


# One step of a text: what it is foreseen to lose at worst, the tokens it makes, what it truly costs of that.
STEPS = st.lists(
    st.tuples(st.floats(0, 8) | st.just(0.0), st.integers(1, 6) | st.just(1), st.floats(0, 1) | st.just(1.0)),
    max_size=400,
)


def losses(credit: Credit, steps: list[tuple[float, int, float]], overrun: float) -> list[tuple[int, float]]:
    """(tokens so far, plain steps lost so far) through a text; a step with drafts where credit allows it.

    A step costs up to `overrun` times what was foreseen: a plain step and its loss if no draft stands.
    """
    made, lost, seen = 0, 0.0, []
    for foreseen, tokens, share in steps:
        if credit.allows(foreseen):
            cost = share * overrun * (1 + foreseen)
            credit.grow(tokens, tokens - cost)
            made, lost = made + tokens, lost + cost - tokens
        else:
            credit.grow(1)
            made += 1
        seen.append((made, lost))
    return seen


@LAW
@given(st.lists(STEPS, min_size=1, max_size=3))
def test_a_text_never_loses_more_than_promised(texts):
    """Any drafter whose steps cost at most what was foreseen: START + INTEREST * n at every token of every text."""
    credit = Credit()
    for steps in texts:
        credit.begin()
        for made, lost in losses(credit, steps, overrun=1.0):
            assert lost <= START + INTEREST * made + 1e-9


@LAW
@given(st.lists(STEPS, min_size=1, max_size=3))
def test_a_drafter_that_turns_out_costlier_takes_one_step_more(texts):
    """Up to the factor at which outliers are cut, again and again: the bound and one plain step."""
    credit = Credit()
    for steps in texts:
        credit.begin()
        for made, lost in losses(credit, steps, overrun=OUTLIER):
            assert lost <= START + INTEREST * made + 1 + 1e-9


@LAW
@given(st.lists(st.tuples(st.integers(1, 5), st.floats(-2, 5)), max_size=300))
def test_surprises_cost_no_more_than_the_largest_of_them(steps):
    """Steps foreseen to be free that lose up to two plain steps: the bound and the worst of them, never their sum."""
    credit, made, lost, worst = Credit(), 0, 0.0, 0.0
    for tokens, gained in steps:
        if not credit.allows(0.0):
            tokens, gained = 1, 0.0
        credit.grow(tokens, gained)
        made, lost, worst = made + tokens, lost - gained, max(worst, -gained)
        assert lost <= START + INTEREST * made + worst + 1e-9


def test_a_hopeless_drafter_spends_its_credit_and_no_more():
    """The greediest adversary loses always, and as much as it may: the promise is nearly used up, and under 2 %."""
    credit, lost, tokens = Credit(), 0.0, 1000
    for _ in range(tokens):
        loss = credit.left / 2
        assert credit.allows(loss)
        assert not credit.allows(loss + 1e-6)
        credit.grow(1, -loss)
        lost += loss
    assert START + INTEREST * (tokens - 5) < lost < START + INTEREST * tokens
    assert (GRANT + INTEREST * 128) / 128 < 0.02


def test_gains_are_saved_up_to_a_limit_and_not_for_the_next_text():
    """What drafts gained may be lost again in the same text, up to MOST; a new text begins with START at most."""
    credit = Credit()
    for _ in range(100):
        credit.grow(4, 3.0)
    assert credit.left == MOST
    credit.begin()
    assert credit.left == START
    credit.grow(1, -1.0)
    poor = credit.left
    credit.begin()
    assert (poor, credit.left) == (pytest.approx(START + INTEREST - 1), GRANT)


def test_debt_is_paid_off_token_by_token():
    """One disaster stops drafts, for a time that does not grow with it: a stall of the machine is not for ever."""

    def waits(loss: float) -> int:
        credit, tokens = Credit(), 0
        credit.grow(1, -loss)
        while not credit.allows(0.0):
            credit.grow(1)
            tokens += 1
        return tokens

    assert waits(START + 1) == pytest.approx(1 / INTEREST, abs=2)
    assert waits(50) == waits(5000) < 300
