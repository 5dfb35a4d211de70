"""The runners: what a stage does with its network. No sampler mathematics here; that is in the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
Net = Callable[[F32, float], F32]


def linear(
    rows: Sequence[Sequence[float]], x: F32, net: Net, noise: Callable[[int], F32], clip: float | None = None
) -> Iterator[tuple[F32, F32]]:
    """Run a table (edgekit.runtime.diffusion.tables says what a row means).

    Args:
        rows: coefficients in the order of COLUMNS.
        x: the start, (batch, ...), already at the first row's noise level.
        net: (sample, timestep) to prediction, after guidance.
        noise: row index to unit noise of x's shape; asked only where the row uses it.
        clip: bound on the clean estimate.

    Yields:
        after each row, the sample and the estimate of the clean sample it was made from.
    """
    x_prev = y_prev = x
    for i, (t, c_in, px, pm, kx, ky, km, kz, kp, kq) in enumerate(rows):
        m = net(x if c_in == 1 else c_in * x, t)
        y: F32 = px * x + pm * m
        if clip is not None:
            y = np.clip(y, -clip, clip)
        new: F32 = ky * y
        for weight, term in ((kx, x), (km, m), (kp, x_prev), (kq, y_prev)):
            if weight:
                new = new + weight * term
        if kz:
            new = new + kz * noise(i)
        x_prev, y_prev, x = x, y, new
        yield x, y


def direct(x: F32, net: Net) -> Iterator[tuple[F32, F32]]:
    """One call whose answer is the picture: regression networks, feed-forward upscalers."""
    y = net(x, 0.0)
    yield y, y
