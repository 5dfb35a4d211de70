"""How codes and scales of a matrix are chosen: ROUNDINGS. Numpy only.

    rtn      the scale spans the block's extremes, every weight goes to the nearest code
    search   the scale (and zero point) with the least error sum_k h_k (w_k - w'_k)**2 among a few, h_k = mean x_k**2
    gptq     the scales of `search`; then column by column, each rounding error made good in the columns to come, for
             the least |X (W - W')|**2 (Frantar et al. 2022, arXiv 2210.17323); then the scales that are best for those
             codes

All work on a few rows at a time, so that temporaries stay in cache.

HQQ (Badri & Shaji 2023) has no row: with zero points that are codes it lowers no output error that was measured, and
`search` without data is better at the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import BadRequest
from edgekit.quant.precision import blocked, round_codes, row_chunks

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I8 = npt.NDArray[np.int8]

TINY = np.finfo(np.float32).tiny
# Steps by which the code range is stretched over the block's extremes: fewer than none leaves room, more clips them.
STRETCHES = {2: np.linspace(-1, 1.5, 6), 4: np.linspace(-1, 3, 9)}
DAMPING = 0.01  # of the mean diagonal, added to second moments that may be singular
COLUMNS = 128  # of GPTQ between two large products
GPTQ_ROWS = 2048
HELD = 1e-3  # of a scale's own equation, that it stays as it is
EQUATIONS = 1 << 25  # numbers in the equations for scales that are solved at a time


@dataclass(frozen=True, slots=True)
class Grid:
    """Which numbers codes may mean: code in [-2**(bits-1), 2**(bits-1)), weight = (code - zero) * scale.

    Attributes:
        bits: of one code.
        block: weights along a row that share a scale.
        zero: whether each block has a zero point.
        positive: whether scales must be positive, as TensorRT checks; else the longer end of the codes may lie on
            either side.
        half: whether scales are stored as float16, and so are numbers that it holds.
    """

    bits: int
    block: int
    zero: bool = False
    positive: bool = False
    half: bool = False

    @property
    def middle(self) -> int:
        """The unsigned code that means 0 where there is no zero point."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True, slots=True)
class Rounded:
    """Codes int8 (n, k); scales float32 (n, blocks); zero points int8 (n, blocks), or None where there are none."""

    codes: I8
    scales: F32
    zeros: I8 | None


Rounding = Callable[[F32, Grid, F32 | None], Rounded]
# Blocks (r, blocks, block) and the weight of each column's error (blocks, block) -> scales and the unsigned codes that
# mean 0, both (r, blocks).
Fit = Callable[[F32, F32, Grid], tuple[F32, F32]]


def spans(parts: F32, _: F32, grid: Grid) -> tuple[F32, F32]:
    """Scales that reach each block's extremes, as ONNX Runtime's own packer chooses them."""
    top, bottom = parts.max(-1), parts.min(-1)
    middle = np.float32(grid.middle)
    if grid.zero:
        top, bottom = np.maximum(top, 0), np.minimum(bottom, 0)
        last = 2 * middle - 1
        scales = (top - bottom) / last
        middles = np.floor(-bottom / _or_one(scales) + np.float32(0.5))
        return scales, np.clip(middles, 0, last)
    if grid.positive:
        scales = _or_one(np.maximum(top / (middle - 1), bottom / -middle))
    else:
        scales = np.where(np.abs(top) > np.abs(bottom), top, bottom) / -middle
    return scales, np.full_like(scales, middle)


def search(parts: F32, importance: F32, grid: Grid) -> tuple[F32, F32]:
    """Of a few stretches of the code range, the one with the least weighted error at its own best scale.

    For given codes q (zero point taken off) the best scale is sum(h w q) / sum(h q^2), and it takes sum(h w q)^2 /
    sum(h q^2) off the error of storing nothing. Rounding again at that scale only lowers the error. The same idea as
    llama.cpp's importance matrix. Starts from `spans`, so that it is never worse.
    """
    scales, middles = spans(parts, importance, grid)
    if not grid.zero:
        middles = middles[:1, :1]  # one number, which numpy compares with faster than with an array
    reach = _or_one(np.abs(parts).max(-1))  # blocks are brought to 1: squares neither overflow nor vanish
    unit = parts / reach[..., None]
    weighted = unit * importance
    best, best_scales, best_middles = np.full_like(scales, -1), scales, middles
    codes = np.empty_like(unit)
    for inverse, middle in _candidates(unit, scales / reach, middles, grid):
        np.multiply(unit, inverse, out=codes)
        np.rint(codes, out=codes)
        np.maximum(codes, -middle[..., None], out=codes)
        np.minimum(codes, 2 * grid.middle - 1 - middle[..., None], out=codes)
        along = np.einsum("rbk,rbk->rb", weighted, codes)
        np.square(codes, out=codes)
        energy = np.maximum(np.einsum("rbk,bk->rb", codes, importance), TINY)
        gain = along * (along / energy)
        better = gain > best
        best = np.where(better, gain, best)
        fitted = along / energy * reach
        best_scales = np.where(better & (np.abs(fitted) >= TINY), fitted, best_scales)
        best_middles = np.where(better, middle, best_middles)
    return best_scales, best_middles


def _candidates(unit: F32, scales: F32, middles: F32, grid: Grid) -> Iterator[tuple[F32 | np.float32, F32]]:
    """Inverse scales, and the codes that mean 0, to try for blocks whose largest magnitude is 1."""
    usable = np.abs(scales) >= TINY
    yield np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=usable)[..., None], middles
    stretches = STRETCHES.get(grid.bits, STRETCHES[4]).astype(np.float32)
    if not grid.zero:
        for sign in (1,) if grid.positive else (1, -1):
            for stretch in stretches:
                yield np.float32(sign * (grid.middle + stretch)), middles
        return
    last = 2 * grid.middle - 1
    bottom = np.minimum(unit.min(-1), 0)
    length = _or_one(np.maximum(unit.max(-1), 0) - bottom)
    for stretch in stretches:
        inverse = (last + stretch) / length
        for shift in (-1, 0, 1):
            yield inverse[..., None], np.clip(np.rint(-bottom * inverse - stretch / 2) + np.float32(shift), 0, last)


def to_nearest(fit: Fit) -> Rounding:
    """Every weight to the code that is nearest at the scales of `fit`."""

    def rounding(matrix: F32, grid: Grid, importance: F32 | None = None) -> Rounded:
        n, k = matrix.shape
        blocks = -(-k // grid.block)
        codes, scales = np.empty((n, k), np.int8), np.empty((n, blocks), np.float32)
        zeros = np.empty((n, blocks), np.int8) if grid.zero else None
        weights = _column_weights(importance, k, grid.block)
        for rows in row_chunks(n, k):
            parts = blocked(matrix[rows], grid.block)
            fitted, middles = fit(parts, weights, grid)
            scales[rows] = _stored_scales(fitted, grid)  # before the codes, which make its rounding good
            whole = round_codes(parts, scales[rows], grid.bits, middles).reshape(len(parts), -1)[:, :k]
            codes[rows] = (whole - np.uint8(grid.middle)).view(np.int8)
            if zeros is not None:
                zeros[rows] = middles - grid.middle
        return Rounded(codes, scales, zeros)

    return rounding


def gptq(matrix: F32, grid: Grid, importance: F32 | None = None) -> Rounded:
    """GPTQ at the scales of `search`.

    With H = X^T X = R R^T, R upper triangular, the output error |X (w - w')|^2 is |R^T (w - w')|^2, and its term j
    holds the columns up to j alone. So each column in turn is rounded to make its term small, given the errors before
    it: this is GPTQ (arXiv 2210.17323), whose inverse of H is never needed (arXiv 2507.18553). Columns go by falling
    second moment (its "act-order"), which costs nothing as scales are fixed beforehand.

    Raises:
        BadRequest: `importance` is not the second moments (k, k).
    """
    n, k = matrix.shape
    if importance is None or importance.ndim != 2:
        raise BadRequest("gptq needs the second moments (k, k) of the product's inputs; without them take search")
    start = ROUNDINGS["search"](matrix, grid, importance)
    damped = _damped(importance)
    order, feedback = _feedback(damped)
    moments: F32 = damped.astype(np.float32)
    codes, fitted = np.empty((n, k), np.int8), np.empty_like(start.scales)
    for first in range(0, n, GPTQ_ROWS):
        rows = slice(first, first + GPTQ_ROWS)
        columns, scales = np.ascontiguousarray(matrix[rows][:, order].T), start.scales[rows].T
        zeros = np.zeros(scales.shape, np.int8) if start.zeros is None else start.zeros[rows].T
        rounded = _columns(columns, order // grid.block, scales, zeros, grid, feedback)
        codes[rows, order] = rounded.T
        given = None if start.zeros is None else start.zeros[rows]
        fitted[rows] = _refitted(matrix[rows], codes[rows], start.scales[rows], given, grid, moments)
    return Rounded(codes, fitted, start.zeros)


def _refitted(matrix: F32, codes: I8, scales: F32, zeros: I8 | None, grid: Grid, moments: F32) -> F32:
    """The scales (r, blocks) that are best for given codes, where they keep their sign.

    With d_b the codes of block b (zero point taken off, 0 elsewhere), |X (w - sum_b s_b d_b)|^2 is least where
    sum_c (d_b H d_c) s_c = d_b H w for every b.
    """
    n, k = matrix.shape
    blocks = scales.shape[1]
    out = np.empty_like(scales)
    each = np.arange(blocks)
    starts = each * grid.block
    step = max(1, min(n, EQUATIONS // blocks**2))
    for rows in (slice(first, first + step) for first in range(0, n, step)):
        meant = codes[rows].astype(np.float32)
        if zeros is not None:
            meant -= np.repeat(zeros[rows], grid.block, axis=1)[:, :k]
        wanted = np.add.reduceat(meant * (matrix[rows] @ moments), starts, axis=1)
        system = np.empty((len(meant), blocks, blocks), np.float32)
        for block, first in enumerate(starts):
            columns = slice(first, first + grid.block)
            system[:, block] = np.add.reduceat((meant[:, columns] @ moments[columns]) * meant, starts, axis=1)
        own = system[:, each, each]
        pull = HELD * own + TINY  # towards the scales there are: a block of zeros says nothing of its own
        system[:, each, each] = own + pull
        found = np.linalg.solve(system, (wanted + pull * scales[rows])[..., None])[..., 0]
        found = np.where(np.isfinite(found) & (found * scales[rows] > 0), found, scales[rows])
        out[rows] = _stored_scales(found, grid)
    return out


def _columns(columns: F32, block_of: Any, scales: F32, zeros: I8, grid: Grid, feedback: F32) -> I8:
    """Round columns (k, r) one after the other; block j of a row has scale (blocks, r)[j]."""
    k = len(columns)
    codes = np.empty(columns.shape, np.int8)
    errors = np.empty_like(columns)
    usable = np.abs(scales) >= TINY
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=usable)
    for start in range(0, k, COLUMNS):
        stop = min(start + COLUMNS, k)
        # What columns before the group owe it, in one product; those within it are added one by one.
        owed = feedback[:start, start:stop].T @ errors[:start]
        for j in range(start, stop):
            block = block_of[j]
            wanted = columns[j] + owed[j - start] + feedback[start:j, j] @ errors[start:j]
            whole = np.rint(wanted * inverse[block]) + zeros[block]
            codes[j] = np.clip(whole, -grid.middle, grid.middle - 1)
            errors[j] = columns[j] - (codes[j] - zeros[block].astype(np.float32)) * scales[block]
    return codes


def _damped(moments: F32) -> F64:
    """Second moments that have an inverse, if they are second moments at all."""
    damped = moments.astype(np.float64)
    mean = float(np.diagonal(damped).mean())
    damped[np.diag_indices_from(damped)] += DAMPING * mean if mean > 0 else 1.0
    return damped


def _feedback(damped: F64) -> tuple[npt.NDArray[np.intp], F32]:
    """The order of columns, and F (k, k): what an error of column i adds to what column j > i should round.

    Raises:
        BadRequest: these are no second moments.
    """
    order = np.argsort(-np.diagonal(damped), kind="stable")
    # An upper triangular R with H = R R^T is the Cholesky factor of H read backwards.
    try:
        upper = np.linalg.cholesky(damped[order][:, order][::-1, ::-1])[::-1, ::-1]
    except np.linalg.LinAlgError as why:
        raise BadRequest("importance (k, k) is no matrix of second moments X^T X: calibrate again") from why
    return order, np.ascontiguousarray(upper / np.diagonal(upper), dtype=np.float32)


def _column_weights(importance: F32 | None, k: int, block: int) -> F32:
    """How much each column's error counts, float32 (blocks, block), largest 1 in each block; padding counts nothing.

    Raises:
        BadRequest: neither (k,) nor (k, k), or a mean square that is negative or not finite.
    """
    if importance is None:
        squares = np.ones(k, np.float32)
    elif importance.shape in ((k,), (k, k)):
        squares = np.asarray(importance.diagonal() if importance.ndim == 2 else importance, np.float32)
    else:
        raise BadRequest(f"importance has shape {importance.shape}; a row of {k} weights takes ({k},) or ({k}, {k})")
    if not (np.isfinite(squares).all() and (squares >= 0).all()):
        raise BadRequest("importance holds a mean square that is negative or not finite: calibrate again")
    weights = blocked(squares[None], block)[0]
    largest = weights.max(-1, keepdims=True)
    # Inputs that were never seen to move weigh alike.
    shares: F32 = np.where(largest >= TINY, weights / _or_one(largest), np.float32(1))
    return shares


def _stored_scales(scales: F32, grid: Grid) -> F32:
    """Scales as they are stored.

    Raises:
        BadRequest: one is beyond float16's reach.
    """
    if not grid.half:
        return scales
    with np.errstate(over="ignore"):
        narrow = scales.astype(np.float16)
    if not np.isfinite(narrow).all():
        raise BadRequest(f"a block's scale is {np.abs(scales).max():.3g}, beyond float16's 65504: choose fp32 for it")
    return narrow.astype(np.float32)


def _or_one(values: F32) -> F32:
    """1 where a value is too small to divide by."""
    safe: F32 = np.where(values >= TINY, values, np.float32(1))
    return safe


ROUNDINGS: dict[str, Rounding] = {
    "rtn": to_nearest(spans),
    "search": to_nearest(search),
    "gptq": gptq,
}


def get_rounding(name: str) -> Rounding:
    """The row of ROUNDINGS called `name`.

    Raises:
        BadRequest: no such rounding.
    """
    if name not in ROUNDINGS:
        raise BadRequest(f"no rounding {name!r}; known: {', '.join(ROUNDINGS)}")
    return ROUNDINGS[name]
