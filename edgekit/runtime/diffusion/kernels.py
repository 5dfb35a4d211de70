"""The runner of a table, and of a single call. No sampler mathematics here; that is in the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
Net = Callable[[F32, int], F32]  # (sample, row number) to prediction, after guidance


class Step(NamedTuple):
    """Row number `row` is done: the sample, and the estimate of the clean one it was made from."""

    row: int
    x: Any
    clean: Any


class Jump(NamedTuple):
    """Go on at `row` with sample `x`; a row past the last one ends the run."""

    row: int
    x: F32


def linear(
    rows: Sequence[Sequence[float]],
    x: F32,
    net: Net,
    noise: Callable[[int], F32],
    *,
    clip: float | None = None,
    clip_out: float | None = None,
    impose: Callable[[int, F32], F32] | None = None,
    after: Callable[[int, F32, F32], Jump | None] | None = None,
) -> Iterator[Step]:
    """Run a table (edgekit.runtime.diffusion.samplers says what a row means).

    Args:
        rows: coefficients in the order of COLUMNS.
        x: the start, (batch, ...), already at the first row's noise level.
        net: (sample after c_in, row number) to prediction, after guidance.
        noise: row number to unit noise of x's shape; asked only where the row uses it.
        clip: bound on the clean estimate.
        clip_out: bound on the sample after every row.
        impose: puts known entries back: called with the row that comes next, and with len(rows) at the end.
        after: sees every row's sample and clean estimate, and may send the run elsewhere.

    Yields:
        a Step after each row.
    """
    x_prev = y_prev = x
    row = 0
    while row < len(rows):
        _, c_in, px, pm, kx, ky, km, kz, kp, kq = rows[row]
        if impose is not None:
            x = impose(row, x)
        m = net(x if c_in == 1 else c_in * x, row)
        y: F32 = px * x + pm * m
        if clip is not None:
            y = np.clip(y, -clip, clip)
        new: F32 = ky * y
        for weight, term in ((kx, x), (km, m), (kp, x_prev), (kq, y_prev)):
            if weight:
                new = new + weight * term
        if kz:
            new = new + kz * noise(row)
        if clip_out is not None:
            new = np.clip(new, -clip_out, clip_out)
        x_prev, y_prev, x = x, y, new
        done, row = row, row + 1
        jump = after(done, x, y) if after is not None else None
        if jump is not None:
            row, x = jump
        if row >= len(rows) and impose is not None:
            x = impose(len(rows), x)
        yield Step(done, x, y)


def direct(x: F32, net: Net) -> Iterator[Step]:
    """One call whose answer is the picture: regression networks, feed-forward upscalers."""
    y = net(x, 0)
    yield Step(0, y, y)
