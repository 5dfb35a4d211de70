"""Cost curves: how they are read, moved, measured and remembered."""

from __future__ import annotations

import json
from itertools import pairwise
from math import inf, nan
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgekit.errors import BadRequest, SessionFailed
from edgekit.runtime.llm import costs
from edgekit.runtime.llm.costs import Curve, isotonic, measure, remembered
from edgekit.runtime.llm.prefix import PrefixStore
from edgekit.runtime.llm.probe import Invariance, classify
from edgekit.runtime.llm.tree import TokenTree
from edgekit.runtime.llm.verifier import LocalVerifier
from tests.runtime.llm.fake_lm import FakeLM, logits_after

LAW = settings(max_examples=150, deadline=None)
TEXT = (3, 1, 4, 1, 5, 9, 2, 6)
TIMES = st.floats(1e-4, 10)


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    """Any table, noisy as measured ones are."""
    rows = sorted(draw(st.sets(st.integers(2, 40), max_size=6)))
    seconds = draw(st.lists(TIMES, min_size=len(rows) + 1, max_size=len(rows) + 1))
    return Curve((1, *rows), tuple(seconds))


def rising(values: tuple[float, ...]) -> bool:
    return all(after >= before for before, after in pairwise(values))


# ----------------------------------------------------------------------------------------------------- the curve


@LAW
@given(st.lists(TIMES, max_size=12))
def test_isotonic_is_the_min_max_formula(values):
    """Pooling equals the definition in cubic time: the largest over beginnings of the smallest mean over ends."""
    count = range(len(values))
    slow = [max(min(mean(values[a : b + 1]) for b in count[i:]) for a in count[: i + 1]) for i in count]
    assert isotonic(values) == pytest.approx(slow)


@LAW
@given(st.lists(TIMES, min_size=1, max_size=20))
def test_isotonic_is_a_projection(values):
    """The result rises, has the same mean, is its own result, and leaves alone what rises already."""
    fit = isotonic(values)
    assert rising(fit)
    assert mean(fit) == pytest.approx(mean(values))
    assert isotonic(fit) == fit
    assert isotonic(sorted(values)) == tuple(sorted(values))


@LAW
@given(st.lists(TIMES, min_size=1, max_size=8), st.data())
def test_no_rising_sequence_is_nearer(values, data):
    """Least squares: any other rising sequence is at least as far from the values."""
    count = len(values)
    other = sorted(data.draw(st.lists(TIMES, min_size=count, max_size=count)))

    def far(fit):
        return sum((a - b) ** 2 for a, b in zip(fit, values, strict=True))

    assert far(isotonic(values)) <= far(other) + 1e-9


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [
        ((), ()),
        ((2, 3), (1.0, 1.0)),
        ((1, 3, 3), (1.0, 1.0, 1.0)),
        ((1, 4, 2), (1.0, 1.0, 1.0)),
        ((1, 2), (1.0,)),
        ((1, 2), (1.0, 0.0)),
        ((1, 2), (-1.0, 1.0)),
        ((1, 2), (1.0, inf)),
        ((1, 2), (nan, 1.0)),
    ],
)
def test_what_is_no_cost_curve_is_refused(rows, seconds):
    """Rows ascend from 1, and every time is a positive number: checked at birth."""
    with pytest.raises(BadRequest, match="cost curve"):
        Curve(rows, seconds)


def test_a_curve_is_interpolated_and_goes_on_with_its_last_slope():
    """Straight lines between the rows of the table, and beyond it."""
    curve = Curve((1, 2, 4, 8), (1.0, 2.0, 3.0, 7.0))
    assert [curve.at(rows) for rows in (1, 2, 3, 4, 5, 6, 8, 9, 12)] == [1, 2, 2.5, 3, 4, 5, 7, 8, 11]
    assert curve.relative(3) == 2.5
    assert curve.scaled(3).at(6) == 15
    assert curve.scaled(3).relative(6) == curve.relative(6)
    assert Curve((1,), (2.0,)).at(50) == 2


@LAW
@given(curves())
def test_more_rows_never_cost_less(curve):
    """Noise in the measured times does not show: the curve rises everywhere, and keeps their mean."""
    times = tuple(curve.at(rows) for rows in range(1, 60))
    assert all(after >= before - 1e-12 for before, after in pairwise(times))
    assert mean(curve.at(rows) for rows in curve.rows) == pytest.approx(mean(curve.seconds))


@LAW
@given(curves(), st.integers(2, 40), TIMES, st.floats(0, 1))
def test_an_observation_draws_the_curve_and_never_past_itself(curve, rows, seconds, rate):
    """Every price moves towards what was seen, by at most the rate; that of a single row stays."""
    assume(rows <= curve.rows[-1])
    moved, old = curve.updated(rows, seconds, rate), curve.at(rows)
    ratio = max(seconds, curve.at(1)) / old
    least, most = sorted((1.0, ratio**rate))
    assert moved.at(1) == curve.at(1)
    for n in range(1, curve.rows[-1] + 1):
        assert curve.at(n) * least * (1 - 1e-9) <= moved.at(n) <= curve.at(n) * most * (1 + 1e-9) or (
            moved.at(n) == pytest.approx(curve.at(1))  # no price falls below that of a single row
        )


def test_the_curve_bends_less_further_away():
    """At the rows seen by the whole rate, two octaves away not at all, half way by half."""
    curve = Curve((1, 2, 4, 8, 16, 32), (1.0, 2.0, 3.0, 4.0, 5.0, 6.0))
    moved = curve.updated(4, 6.0, 0.2)
    factors = [after / before for after, before in zip(moved.seconds, curve.seconds, strict=True)]
    assert factors == pytest.approx([1, 2**0.1, 2**0.2, 2**0.1, 1, 1])


def test_a_run_faster_than_a_single_row_counts_as_one():
    """No price falls below a single row's, and rows further away stay, however often it is seen."""
    curve = Curve((1, 2, 4), (1.0, 1.0, 3.0))
    assert curve.updated(2, 0.1, 0.5) == curve
    lowered = curve
    for _ in range(500):
        lowered = lowered.updated(4, 0.1, 0.2)
    assert lowered.seconds == pytest.approx([1, 1, 1])


# --------------------------------------------------------------------------------------------------- measuring it


class TimedLM(FakeLM):
    """The fake model on a clock of its own: a run takes what `takes` says of its rows, its first run ten times that."""

    def __init__(self, takes, context: int = 600) -> None:
        super().__init__(context=context)
        self.takes, self.now, self.sizes = takes, 0.0, []

    def clock(self) -> float:
        return self.now

    def answer(self, feeds):
        count = feeds["input_ids"].shape[1]
        self.now += self.takes(count) * (1 if count in self.sizes else 10)
        self.sizes.append(count)
        return super().answer(feeds)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch):
    """(seconds by rows) -> a model whose runs take that long by the clock that `measure` reads."""

    def make(takes, **options) -> TimedLM:
        lm = TimedLM(takes, **options)
        monkeypatch.setattr(costs, "perf_counter", lm.clock)
        return lm

    return make


def test_measuring_finds_what_runs_take(timed):
    """Every length of the table is timed equally often, and its first, slow run is not counted."""
    lm = timed(lambda rows: 1e-3 + 1e-4 * rows)
    curve = measure(lm.verifier())
    assert curve.rows == costs.ROWS
    assert curve.seconds == pytest.approx([1e-3 + 1e-4 * rows for rows in costs.ROWS])
    assert {lm.sizes.count(rows) for rows in costs.ROWS[1:]} == {1 + costs.ROUNDS}


def test_a_busy_machine_measures_like_a_calm_one(timed):
    """Also where four runs in five are disturbed, as long as some are not."""
    lm = timed(lambda rows: 1e-3 * rows * (1 if len(lm.sizes) % 5 == 1 else 50))
    assert measure(lm.verifier(), rows=(1, 2, 3, 5), budget=100).seconds == pytest.approx([1e-3, 2e-3, 3e-3, 5e-3])


def test_a_slow_graph_is_measured_at_one_and_two_rows(timed):
    """Where one run exceeds the budget there is one round of the two lengths that say what a draft costs."""
    lm = timed(lambda rows: 2.0 + rows)
    curve = measure(lm.verifier(), budget=1.0)
    assert curve == Curve((1, 2), (3.0, 4.0))
    assert [lm.sizes.count(rows) for rows in (2, 3, 4)] == [2, 0, 0]


def test_a_budget_cuts_lengths_before_rounds(timed):
    """Half of a table is measured twice as often as would be needed, rather than the whole of it once."""
    lm = timed(lambda rows: 0.01)
    curve = measure(lm.verifier(), budget=1.0)
    assert 2 < len(curve.rows) < len(costs.ROWS)
    assert curve.seconds == pytest.approx([0.01] * len(curve.rows))
    assert all(lm.sizes.count(rows) >= 3 for rows in curve.rows[1:])
    assert lm.now < 3


@pytest.mark.parametrize(("context", "rows"), [(1, (1,)), (2, (1, 2)), (5, (1, 2, 3, 4)), (40, costs.ROWS)])
def test_lengths_beyond_the_context_are_not_run(timed, context, rows):
    """A model that holds few tokens is measured with as many rows as it takes."""
    assert measure(timed(lambda rows: 1e-4 * rows, context=context).verifier()).rows == rows


def test_a_verifier_that_fills_up_its_runs_pays_for_them(timed):
    """With a granule of two a single row costs what two do and three what four do, and the curve says so."""
    lm = timed(lambda rows: 1e-3 * rows)
    curve = measure(LocalVerifier(lm.session(), lm.decoding, granule=2), rows=(1, 2, 3))
    assert curve.seconds == pytest.approx([2e-3, 2e-3, 4e-3])


def test_measuring_leaves_the_verifier_alone(monkeypatch):
    """Tokens, keys and values stay, the prefix store is not asked: the next score computes one row, and it is right."""
    monkeypatch.setattr(costs, "ROUNDS", 2)
    lm = FakeLM()
    session = lm.session()
    store = PrefixStore(1 << 20)
    verifier = LocalVerifier(session, lm.decoding, prefixes=store)
    verifier.score(TEXT, TokenTree.chain(TEXT[-1]))
    verifier.keep((0,))
    looked_up = store.stats
    measure(verifier, rows=(1, 2, 4))
    assert store.stats == looked_up
    assert verifier.cached == TEXT
    runs = session.runs
    tokens = (*TEXT, 7)
    np.testing.assert_array_equal(verifier.score(tokens, TokenTree.chain(7)).logits[0], logits_after(tokens))
    assert session.runs == runs + 1


# ------------------------------------------------------------------------------------------------- remembering it


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that costs are remembered in, and few rounds of measuring."""
    monkeypatch.setattr(costs, "ROUNDS", 1)
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "verifiers"


def known(key: tuple[str, ...]) -> tuple[Curve, int]:
    """The curve that is remembered under a key, and how many runs it took to know it."""
    session = FakeLM().session()
    found = remembered(Curve, key, lambda: measure(LocalVerifier(session, FakeLM().decoding)))
    return found, session.runs


def test_costs_are_measured_once(cache):
    """The second time they are read from the disk: the same values, and the graph is not run."""
    first, runs = known(("graph", "cpu"))
    assert runs > 0
    assert first.rows == costs.ROWS
    assert len(list(cache.iterdir())) == 1
    assert known(("graph", "cpu")) == (first, 0)


def test_whether_rows_are_exact_is_remembered_beside_the_costs(cache):
    """Under one key there is a file of each kind, and neither is taken for the other."""
    curve, _ = known(("graph",))
    found = [remembered(Invariance, ("graph",), find) for find in (lambda: classify(FakeLM().verifier()), pytest.fail)]
    assert found == [Invariance("exact", 0.0, 0.0, 1)] * 2
    assert known(("graph",)) == (curve, 0)
    assert len(list(cache.iterdir())) == 2


def test_what_cannot_be_found_out_is_not_remembered(cache):
    """An error while measuring is the caller's, and leaves no file behind."""

    def fail() -> Curve:
        raise SessionFailed("the engine failed")

    with pytest.raises(SessionFailed):
        remembered(Curve, ("graph",), fail)
    assert not cache.exists()


def test_whatever_costs_depend_on_is_in_the_key(cache, monkeypatch):
    """Another graph, device or processor, and the same strings divided otherwise, are measured anew."""
    for key in (("graph", "cpu"), ("graph", "cuda"), ("other", "cpu"), ("graphcpu",)):
        assert known(key)[1] > 0
    assert known(("graph", "cpu"))[1] == 0
    monkeypatch.setattr(costs, "_processor", lambda: "another machine with the same home folder")
    assert known(("graph", "cpu"))[1] > 0
    assert len(list(cache.iterdir())) == 5


def other_format(text: str) -> str:
    return json.dumps(json.loads(text) | {"format": costs.FORMAT + 1})


def impossible_curve(text: str) -> str:
    whole = json.loads(text)
    whole["found"]["seconds"][1] = -1.0
    return json.dumps(whole)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "\x00" * 100,
        lambda text: json.dumps(json.loads(text) | {"more": 1}),
        lambda text: text.replace("seconds", "minutes"),
        other_format,
        impossible_curve,
    ],
)
def test_a_file_that_says_nothing_counts_as_missing(cache, spoil):
    """Cut, foreign, of another format or impossible: measured again, and the file is put right."""
    known(("graph",))
    (file,) = cache.iterdir()
    file.write_text(spoil(file.read_text()))
    found, runs = known(("graph",))
    assert runs > 0
    assert known(("graph",)) == (found, 0)
    assert list(cache.iterdir()) == [file]


@pytest.mark.parametrize("blocked", ["cache", "cache/verifiers"])
def test_a_folder_that_cannot_be_written_is_survived(cache, tmp_path, blocked):
    """The costs are measured every time, and nothing is left behind."""
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_text("a file where a folder should be")
    for _ in range(2):
        found, runs = known(("graph",))
        assert runs > 0
        assert found.rows[:2] == (1, 2)
    assert (tmp_path / blocked).read_text() == "a file where a folder should be"


def test_a_full_disk_is_survived(cache, monkeypatch):
    """An error while writing is no error of the caller's: the costs come back all the same."""

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr(costs, "write_atomically", full)
    assert known(("graph",))[1] > 0
    assert known(("graph",))[1] > 0
