"""Ways of choosing codes: each lowers the error it is meant to lower, and equals its slow, obvious twin."""

from __future__ import annotations

import itertools

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from edgekit.errors import BadRequest
from edgekit.quant import rounding
from edgekit.quant.rounding import DAMPING, ROUNDINGS, Grid, Rounded, get_rounding

GRIDS = [
    Grid(bits, block, zero, positive)
    for bits in (2, 4, 7, 8)
    for block in (16, 64)
    for zero, positive in ((False, False), (False, True), (True, True))
]
EVERY = pytest.mark.parametrize("grid", GRIDS, ids=str)
LOW_BITS = pytest.mark.parametrize("bits", [2, 4])


def meaning(rounded: Rounded, block: int) -> np.ndarray:
    """The matrix that is meant, in double precision."""
    k = rounded.codes.shape[1]
    codes = rounded.codes.astype(np.float64)
    if rounded.zeros is not None:
        codes -= np.repeat(rounded.zeros, block, axis=1)[:, :k]
    return codes * np.repeat(rounded.scales.astype(np.float64), block, axis=1)[:, :k]


def weighted_error(matrix: np.ndarray, rounded: Rounded, block: int, squares: np.ndarray) -> float:
    """sum_k h_k (w - w')^2."""
    return float((np.square(matrix - meaning(rounded, block)) * squares).sum())


def output_error(matrix: np.ndarray, rounded: Rounded, block: int, x: np.ndarray) -> float:
    """|X (W - W')|^2."""
    return float(np.square(x @ (matrix - meaning(rounded, block)).T).sum())


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Weights of the usual kind."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def correlated(rows: int, k: int, seed: int = 1) -> np.ndarray:
    """Inputs of a product: a few common directions, some noise, and columns of unequal size."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((k // 4, k)) / np.sqrt(k // 4)
    sizes = np.exp(0.7 * rng.standard_normal(k))
    x = rng.standard_normal((rows, k // 4)) @ mix + 0.3 * rng.standard_normal((rows, k))
    return np.asarray(x * sizes, np.float32)


def moments(x: np.ndarray) -> np.ndarray:
    """X^T X / rows, what calibration sums up."""
    return np.asarray(x.T.astype(np.float64) @ x / len(x), np.float32)


@settings(max_examples=25, deadline=None)
@given(
    matrix=arrays.arrays(np.float32, (3, 40), elements=st.floats(-100, 100, width=32)),
    squares=arrays.arrays(np.float32, 40, elements=st.floats(0, 1000, width=32)),
)
@EVERY
def test_search_is_never_worse_than_rtn(grid: Grid, matrix: np.ndarray, squares: np.ndarray) -> None:
    """Whatever matrix and importance: the weighted error of `search` is at most that of rounding to nearest."""
    plain = weighted_error(matrix, ROUNDINGS["rtn"](matrix, grid, squares), grid.block, squares)
    found = weighted_error(matrix, ROUNDINGS["search"](matrix, grid, squares), grid.block, squares)
    energy = float((np.square(matrix.astype(np.float64)) * squares).sum())
    assert found <= plain * (1 + 1e-4) + 1e-6 * energy + 1e-30


@LOW_BITS
def test_search_is_clearly_better_at_few_bits(bits: int) -> None:
    """On ordinary weights and uneven inputs the weighted error falls by a fifth at least, without data by less."""
    matrix, grid = normal((64, 256)), Grid(bits, 32)
    squares = np.square(correlated(500, 256)).mean(0)
    errors = {
        name: weighted_error(matrix, ROUNDINGS[name](matrix, grid, h), 32, squares)
        for name, h in (("rtn", None), ("search", squares))
    }
    assert errors["search"] < 0.8 * errors["rtn"]
    ones = np.ones(256, np.float32)
    blind = weighted_error(matrix, ROUNDINGS["search"](matrix, grid, None), 32, ones)
    assert blind < 0.95 * weighted_error(matrix, ROUNDINGS["rtn"](matrix, grid, None), 32, ones)


def best_by_force(block: np.ndarray, squares: np.ndarray, bits: int) -> float:
    """The least weighted error of one block over a fine grid of scales of either sign."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    reach = float(np.abs(block).max())
    least = np.inf
    for scale in reach * np.concatenate((np.linspace(0.05, 1.2, 2000), -np.linspace(0.05, 1.2, 2000))):
        codes = np.clip(np.rint(block / scale), low, high)
        least = min(least, float((squares * np.square(block - codes * scale)).sum()))
    return least


@LOW_BITS
def test_search_comes_near_the_best_scale(bits: int) -> None:
    """A few stretches come within a tenth of the best of thousands of scales, over many blocks together."""
    matrix, squares = normal((12, 32), 5), np.square(normal((32,), 6))
    found = weighted_error(matrix, ROUNDINGS["search"](matrix, Grid(bits, 32), squares), 32, squares)
    best = sum(best_by_force(row.astype(np.float64), squares, bits) for row in matrix)
    assert best <= found * (1 + 1e-6)
    assert found < 1.1 * best


@EVERY
def test_codes_are_the_nearest_at_their_scale(grid: Grid) -> None:
    """rtn and search leave no code that a neighbour would better: rounding is to nearest at the chosen scale."""
    matrix = normal((5, 70), 2)
    for name in ("rtn", "search"):
        rounded = ROUNDINGS[name](matrix, grid, None)
        error = np.abs(matrix - meaning(rounded, grid.block))
        for change in (-1, 1):
            other = rounded.codes.astype(int) + change
            allowed = (other >= -grid.middle) & (other < grid.middle)
            moved = Rounded(np.where(allowed, other, rounded.codes).astype(np.int8), rounded.scales, rounded.zeros)
            assert (error <= np.abs(matrix - meaning(moved, grid.block)) + 1e-5).all()


@EVERY
@pytest.mark.parametrize("name", ROUNDINGS)
def test_codes_scales_and_zeros_are_well_formed(name: str, grid: Grid) -> None:
    """Shapes, types and ranges are as declared, also for a matrix with a row of zeros and a short last block."""
    matrix = normal((6, 70))
    matrix[2] = 0
    rounded = ROUNDINGS[name](matrix, grid, moments(correlated(200, 70)))
    blocks = -(-70 // grid.block)
    assert rounded.codes.shape == (6, 70)
    assert rounded.codes.dtype == np.int8
    assert rounded.codes.min() >= -grid.middle
    assert rounded.codes.max() < grid.middle
    assert rounded.scales.shape == (6, blocks)
    assert rounded.scales.dtype == np.float32
    assert (rounded.zeros is not None) is grid.zero
    assert not meaning(rounded, grid.block)[2].any()
    if rounded.zeros is not None:
        assert rounded.zeros.shape == (6, blocks)
        assert rounded.zeros.dtype == np.int8
        assert rounded.zeros.min() >= -grid.middle
    if grid.positive and not grid.zero:
        assert (rounded.scales > 0).all()


@LOW_BITS
def test_zero_points_help_weights_on_one_side(bits: int) -> None:
    """Where all weights are positive a zero point takes a third of the error; where they are not it changes little."""
    grids = Grid(bits, 32), Grid(bits, 32, zero=True)
    ones = np.ones(128, np.float32)
    for matrix, least, most in ((np.abs(normal((32, 128))) + 1, 0.0, 0.67), (normal((32, 128)), 0.6, 1.3)):
        without, having = (
            weighted_error(matrix, ROUNDINGS["search"](matrix, grid, None), grid.block, ones) for grid in grids
        )
        assert least < having / without < most


@pytest.mark.parametrize("zero", [False, True])
@LOW_BITS
def test_gptq_lowers_the_output_error(bits: int, zero: bool) -> None:
    """On inputs it has not seen, |X (W - W')|^2 falls below a third of rounding to nearest and well below search."""
    x = correlated(3000, 192)
    seen, unseen = x[:1500], x[1500:]
    matrix, grid = normal((48, 192)), Grid(bits, 32, zero)
    errors = {
        name: output_error(matrix, ROUNDINGS[name](matrix, grid, moments(seen)), 32, unseen) for name in ROUNDINGS
    }
    assert errors["gptq"] < 0.6 * errors["search"] < 0.6 * errors["rtn"]
    assert errors["gptq"] < 0.34 * errors["rtn"]


def published_gptq(matrix: np.ndarray, start: Rounded, grid: Grid, second: np.ndarray) -> np.ndarray:
    """GPTQ as published: the inverse of H, its Cholesky factor, weights updated column by column, all in double."""
    h = second.astype(np.float64)
    h = h + DAMPING * np.diagonal(h).mean() * np.eye(len(h))
    order = np.argsort(-np.diagonal(h), kind="stable")
    inverse = np.linalg.cholesky(np.linalg.inv(h[order][:, order])).T
    w = matrix[:, order].astype(np.float64)
    codes = np.empty(matrix.shape, int)
    for i, column in enumerate(order):
        block = column // grid.block
        scale = start.scales[:, block].astype(np.float64)
        zero = 0 if start.zeros is None else start.zeros[:, block].astype(int)
        codes[:, column] = np.clip(np.rint(w[:, i] / scale) + zero, -grid.middle, grid.middle - 1)
        error = (w[:, i] - (codes[:, column] - zero) * scale) / inverse[i, i]
        w[:, i:] -= np.outer(error, inverse[i, i:])
    return codes


@pytest.mark.parametrize("zero", [False, True])
@LOW_BITS
def test_gptq_is_the_published_algorithm(bits: int, zero: bool) -> None:
    """Without inverting H, in single precision and in groups of columns, codes are those of the paper's recursion."""
    x, matrix, grid = correlated(1000, 200), normal((16, 200)), Grid(bits, 32, zero)
    second = moments(x)
    start = ROUNDINGS["search"](matrix, grid, second)
    mine = ROUNDINGS["gptq"](matrix, grid, second)
    twin = published_gptq(matrix, start, grid, second)
    # A tie in single precision may fall the other way and move what follows in that row.
    assert (mine.codes == twin).mean() > 0.98
    twins = Rounded(twin.astype(np.int8), start.scales, start.zeros)
    plain = Rounded(mine.codes, start.scales, start.zeros)
    assert output_error(matrix, plain, 32, x) == pytest.approx(output_error(matrix, twins, 32, x), rel=0.02)


@pytest.mark.parametrize("zero", [False, True])
@LOW_BITS
def test_scales_fit_the_codes_they_are_for(bits: int, zero: bool) -> None:
    """Those of least squares on the inputs themselves, up to damping; so the output error only falls."""
    x, matrix, grid = correlated(1000, 176), normal((6, 176)), Grid(bits, 32, zero)
    second = moments(x)
    start, made = ROUNDINGS["search"](matrix, grid, second), ROUNDINGS["gptq"](matrix, grid, second)
    before = Rounded(made.codes, start.scales, start.zeros)
    ratio = output_error(matrix, made, 32, x) / output_error(matrix, before, 32, x)
    codes = meaning(Rounded(made.codes, np.ones_like(made.scales), made.zeros), 32)
    least = []
    for row, weights in zip(codes, matrix, strict=True):
        parts = np.stack([x[:, at : at + 32] @ row[at : at + 32] for at in range(0, 176, 32)], 1).astype(np.float64)
        least.append(np.linalg.lstsq(parts, x.astype(np.float64) @ weights, rcond=None)[0])
    best = output_error(matrix, Rounded(made.codes, np.array(least, np.float32), made.zeros), 32, x)
    assert ratio < 0.995
    assert output_error(matrix, made, 32, x) < 1.01 * best


def test_fitted_scales_are_solved_for_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same result."""
    matrix, grid, second = normal((21, 96)), Grid(4, 32), moments(correlated(400, 96))
    whole = ROUNDINGS["gptq"](matrix, grid, second)
    monkeypatch.setattr(rounding, "EQUATIONS", 30)
    np.testing.assert_allclose(ROUNDINGS["gptq"](matrix, grid, second).scales, whole.scales, rtol=1e-4)


@LOW_BITS
def test_gptq_on_two_weights_finds_the_best_pair(bits: int) -> None:
    """Against every pair of codes at the same scale: never better than the best, and mostly the best."""
    second = np.array([[1, 0.9], [0.9, 1]], np.float32)
    grid, best = Grid(bits, 2), 0
    codes = range(-grid.middle, grid.middle)
    for seed in range(40):
        matrix = normal((1, 2), seed)
        rounded, start = ROUNDINGS["gptq"](matrix, grid, second), ROUNDINGS["search"](matrix, grid, second)

        def error(pair: np.ndarray, matrix: np.ndarray = matrix, scale: float = float(start.scales[0, 0])) -> float:
            missing = matrix[0] - pair * scale
            return float(missing @ second @ missing)

        least = min(error(np.array(pair)) for pair in itertools.product(codes, codes))
        got = error(rounded.codes[0].astype(float))
        assert got >= least - 1e-6
        best += got <= least * 1.001 + 1e-6
    assert best >= 24


@EVERY
def test_gptq_without_correlation_is_search(grid: Grid) -> None:
    """Where inputs are independent there is nothing to make good: codes are those of `search`, ties aside.

    Scales are then fitted to them, each block for itself, which can only help.
    """
    matrix = normal((6, 70))
    second = np.diag(np.square(normal((70,), 4)) + 0.1).astype(np.float32)
    found, made = ROUNDINGS["search"](matrix, grid, second), ROUNDINGS["gptq"](matrix, grid, second)
    assert (made.codes == found.codes).mean() > 0.99
    errors = [np.square(meaning(each, grid.block) - matrix) @ second.diagonal() for each in (found, made)]
    assert (errors[1] <= 1.002 * errors[0] + 1e-12).all()


def test_gptq_takes_inputs_that_never_moved() -> None:
    """Columns whose input was always 0, or all of them, are rounded to nearest; nothing is singular."""
    x = correlated(300, 64)
    x[:, 5:20] = 0
    matrix, grid = normal((8, 64)), Grid(4, 32)
    second = moments(x)
    plain, made = ROUNDINGS["search"](matrix, grid, second), ROUNDINGS["gptq"](matrix, grid, second)
    np.testing.assert_array_equal(made.codes[:, 5:20], plain.codes[:, 5:20])
    nothing = ROUNDINGS["gptq"](matrix, grid, np.zeros((64, 64), np.float32))
    np.testing.assert_array_equal(nothing.codes, ROUNDINGS["search"](matrix, grid, None).codes)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_rows_are_rounded_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row gets the same scales whatever stands beside it, and working in small pieces gives the same matrix."""
    matrix, grid, second = normal((21, 96)), Grid(4, 32), moments(correlated(400, 96))
    whole = ROUNDINGS[name](matrix, grid, second)
    np.testing.assert_array_equal(ROUNDINGS[name](matrix, grid, second).codes, whole.codes)
    monkeypatch.setattr("edgekit.quant.precision._CHUNK", 200)
    monkeypatch.setattr(rounding, "GPTQ_ROWS", 8)
    monkeypatch.setattr(rounding, "COLUMNS", 40)
    parts = ROUNDINGS[name](matrix, grid, second)
    np.testing.assert_allclose(parts.scales, whole.scales, rtol=1e-3 if name == "gptq" else 0)
    # GPTQ's sums are taken in another order, so that a tie may fall the other way.
    assert (parts.codes == whole.codes).mean() > (0.98 if name == "gptq" else 0.9999)


def test_importance_counts_by_its_diagonal() -> None:
    """`search` takes mean squares or the moments they are the diagonal of, alike, and their size does not matter."""
    matrix, grid, second = normal((8, 64)), Grid(4, 32), moments(correlated(300, 64))
    from_moments = ROUNDINGS["search"](matrix, grid, second)
    from_squares = ROUNDINGS["search"](matrix, grid, np.diagonal(second))
    np.testing.assert_array_equal(from_moments.codes, from_squares.codes)
    larger = ROUNDINGS["search"](matrix, grid, np.diagonal(second) * np.float32(2**40))
    np.testing.assert_array_equal(larger.codes, from_squares.codes)


def test_blocks_whose_inputs_never_moved_weigh_alike() -> None:
    """An importance of 0 all over a block is as good as none, and a single 0 leaves its weight out of account."""
    matrix, grid = normal((8, 64)), Grid(2, 32)
    squares = np.ones(64, np.float32)
    squares[:32] = 0
    np.testing.assert_array_equal(
        ROUNDINGS["search"](matrix, grid, squares).codes, ROUNDINGS["search"](matrix, grid, None).codes
    )
    outlier = matrix.copy()
    outlier[:, 3] = 4
    squares = np.ones(64, np.float32)
    squares[3] = 0
    kept = weighted_error(outlier, ROUNDINGS["search"](outlier, grid, squares), 32, squares)
    assert kept < 0.9 * weighted_error(outlier, ROUNDINGS["search"](outlier, grid, None), 32, squares)


@pytest.mark.parametrize(
    ("name", "importance", "message"),
    [
        ("gptq", None, r"needs the second moments"),
        ("gptq", np.ones(8, np.float32), r"needs the second moments"),
        ("gptq", -np.ones((8, 8), np.float32), r"negative or not finite"),
        ("gptq", np.ones((8, 8), np.float32) - 9 * np.eye(8, k=1, dtype=np.float32), r"no matrix of second moments"),
        ("search", np.ones(7, np.float32), r"takes \(8,\) or \(8, 8\)"),
        ("search", np.full(8, np.nan, np.float32), r"negative or not finite"),
        ("search", np.full(8, -1, np.float32), r"negative or not finite"),
    ],
)
def test_importance_that_means_nothing_is_refused(name: str, importance: np.ndarray | None, message: str) -> None:
    """A wrong shape, negative or missing mean squares, and a matrix that is no X^T X are refused with the reason."""
    with pytest.raises(BadRequest, match=message):
        ROUNDINGS[name](normal((2, 8)), Grid(4, 8), importance)


def test_unknown_rounding_lists_the_known() -> None:
    """A rounding nobody has is refused with the names that exist."""
    assert get_rounding("rtn") is ROUNDINGS["rtn"]
    with pytest.raises(BadRequest, match="known: rtn, search, gptq"):
        get_rounding("hqq")
