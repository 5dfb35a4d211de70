"""Calibration inside the graph finds what anyone would find who looks at every activation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.errors import GateFailed
from edgekit.quant.calibrate import LEVELS, SHARES, Calibration, calibrate
from edgekit.quant.graph import Unit, find_units, normalised
from edgekit.quant.pictures import Call
from tests.quant.lowering import linear, table_graph
from tests.quant.trial_graphs import feeds, tiny, watched


def silent(what: str, share: float) -> None:
    """No report."""


def names_of(units: Sequence[Unit]) -> list[str]:
    """What units read and make."""
    return list(dict.fromkeys(name for unit in units for name in (unit.data, unit.output)))


def seen() -> list[dict[str, np.ndarray]]:
    """Every value of four runs of different strength, the last of one picture instead of two."""
    given = [{name: value * (1 + run) for name, value in each.items()} for run, each in enumerate(feeds(4))]
    given[-1] = {name: value[:1] for name, value in given[-1].items()}
    return watched(MODEL, names_of(UNITS), given)


MODEL = tiny()
UNITS = find_units(MODEL)
SEEN = seen()
CALLS = tuple(Call({name: each[name] for name in ("sample", "text")}, {}) for each in SEEN)


@pytest.fixture(scope="module")
def found() -> Calibration:
    """Of all four runs."""
    return calibrate(MODEL, UNITS, CALLS, silent)


def whole(name: str) -> tuple[float, float]:
    """Lowest and highest of all runs, 0 among them."""
    low, high = (pick(float(pick(each[name].ravel())) for each in SEEN) for pick in (min, max))
    return min(0.0, low), max(0.0, high)


def lost(x: np.ndarray, low: float, high: float) -> float:
    """Squared error of rounding to 256 steps from low to high."""
    step = np.float32((high - low) / LEVELS)
    middle = np.clip(np.rint(-low / step), 0, LEVELS)
    codes = np.clip(np.rint(x / step) + middle, 0, LEVELS)
    return float(np.square((codes - middle) * step - x.astype(np.float64)).sum())


def test_every_value_is_measured(found: Calibration) -> None:
    """All that a unit reads or makes, nothing else; rows of channels of what products read."""
    assert set(found.ranges) == set(found.spread) == set(found.shapes) == set(names_of(UNITS))
    products = {unit.data for unit in UNITS if unit.op == "MatMul"}
    assert set(found.channel_max) == set(found.moments) == products


def test_shapes_are_those_of_the_last_run(found: Calibration) -> None:
    """Which is the deployed one, of one picture."""
    for name, shape in found.shapes.items():
        assert shape == SEEN[-1][name].shape


def test_channels_are_those_of_numpy(found: Calibration) -> None:
    """The largest magnitude over all runs, and the mean square, each run counting alike."""
    for name in found.moments:
        rows = [each[name].reshape(-1, each[name].shape[-1]) for each in SEEN]
        wanted = np.max([np.abs(each).max(0) for each in rows], 0)
        np.testing.assert_allclose(found.channel_max[name], wanted, rtol=1e-6)
        squares = np.mean([np.square(each.astype(np.float64)).mean(0) for each in rows], 0)
        np.testing.assert_allclose(found.moments[name], squares, rtol=1e-4)


def test_the_spread_is_that_of_the_widest_run(found: Calibration) -> None:
    """Over the narrowest one's."""
    for name, spread in found.spread.items():
        widths = [np.ptp(each[name]) for each in SEEN]
        assert spread == pytest.approx(max(widths) / min(widths), rel=1e-5)


def test_ranges_are_shares_of_the_whole(found: Calibration) -> None:
    """Of the lowest and highest value of all runs, 0 inside, both ends shrunk alike."""
    for name, (low, high) in found.ranges.items():
        least, most = whole(name)
        shares = [share for share in SHARES if (low, high) == pytest.approx((least * share, most * share), rel=1e-5)]
        assert len(shares) == 1
        assert low <= 0 <= high


def test_clipping_never_loses_more(found: Calibration) -> None:
    """The kept range has the least squared error of those tried, as numpy counts it, the whole range among them."""
    for name, (low, high) in found.ranges.items():
        least, most = whole(name)
        tried = {share: sum(lost(each[name], least * share, most * share) for each in SEEN) for share in SHARES}
        mine = sum(lost(each[name], low, high) for each in SEEN)
        assert mine <= tried[1.0] * (1 + 1e-3)
        assert mine <= min(tried.values()) * (1 + 1e-2)


def test_a_far_value_is_clipped_and_a_flat_one_is_not() -> None:
    """One value in a million far out is worth less than finer steps; of even values none is."""
    model = normalised(linear(16, 16))
    units = find_units(model)
    rng = np.random.default_rng(0)
    even = rng.uniform(-1, 1, (1, 4000, 16)).astype(np.float32)
    far = rng.laplace(0, 0.01, (1, 40000, 16)).astype(np.float32)
    far[0, 0, 0] = 0.5
    for x, share in ((even, 1.0), (far, None)):
        low, high = calibrate(model, units, [Call({"x": x}, {})], silent).ranges["x"]
        assert (high == pytest.approx(x.max() * 1.0)) == (share == 1.0)
        assert lost(x, low, high) <= lost(x, min(0.0, float(x.min())), float(x.max())) * (1 + 1e-3)


@pytest.mark.parametrize("sign", [1, -1])
def test_zero_is_inside_every_range(sign: int) -> None:
    """Of values of one sign, the range begins or ends at 0, which padding and integers need."""
    model = normalised(linear(16, 16))
    x = sign * np.random.default_rng(0).uniform(1, 2, (1, 50, 16)).astype(np.float32)
    low, high = calibrate(model, find_units(model), [Call({"x": x}, {})], silent).ranges["x"]
    assert (low == 0) == (sign > 0)
    assert (high == 0) == (sign < 0)


def test_a_value_that_is_always_zero_has_an_empty_range() -> None:
    """Which is finite, and costs nothing to round."""
    model = normalised(linear(16, 16, bias=False))
    found = calibrate(model, find_units(model), [Call({"x": np.zeros((1, 5, 16), np.float32)}, {})], silent)
    assert found.ranges == {"x": (0.0, 0.0), "y": (0.0, 0.0)}
    np.testing.assert_array_equal(found.moments["x"], np.zeros(16))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("at", [0, 7, 40, 79])
def test_what_is_not_finite_is_refused(value: float, at: int) -> None:
    """By name, wherever it stands among the others, in any run."""
    model = normalised(linear(16, 16))
    x = np.random.default_rng(0).standard_normal((1, 5, 16)).astype(np.float32)
    bad = x.copy()
    bad.reshape(-1)[at] = value
    with pytest.raises(GateFailed, match="activation 'x' is not finite"):
        calibrate(model, find_units(model), [Call({"x": x}, {}), Call({"x": bad}, {})], silent)


def test_progress_never_falls_back() -> None:
    """Two passes: every run, then those that clipped ranges are tried on."""
    shares: list[float] = []
    calibrate(MODEL, UNITS, CALLS, lambda _, share: shares.append(share))
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_the_graph_is_not_changed() -> None:
    """Outputs are added to a copy."""
    model = normalised(linear(16, 16))
    before = ir.serde.serialize_model(model).SerializeToString()
    calibrate(model, find_units(model), [Call({"x": np.ones((1, 5, 16), np.float32)}, {})], silent)
    assert ir.serde.serialize_model(model).SerializeToString() == before


def test_tables_have_no_range() -> None:
    """Indices are no activations."""
    model = normalised(table_graph())
    found = calibrate(model, find_units(model), [Call({"ids": np.zeros((1, 2), np.int64)}, {})], silent)
    assert (found.ranges, found.shapes, found.moments) == ({}, {}, {})
