"""What a recipe may ask for between the rows of a table: each hook a pure function of arrays and its own numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from edgekit.bundle.recipe import NoiseSchedule, Retrieve, TimeShift
from edgekit.errors import BadManifest, BadRequest
from edgekit.runtime.diffusion.grids import alphas_cumprod
from edgekit.runtime.diffusion.kernels import Jump

F32 = npt.NDArray[np.float32]


def time_shift(hook: TimeShift, schedule: NoiseSchedule, times: list[float]) -> Callable[[int, F32], F32 | None]:
    """Time-Shift sampling (Li et al. 2024, algorithm 2).

    A sample made by few steps has another variance than its timestep promises; the network is told the time within
    `window` steps around the next one whose noise variance 1 - abar is closest to the sample's own. Below `cutoff` and
    at the first row the times stay.

    Returns:
        (row, sample) to times (batch,), or None to leave them.
    """
    noise = 1 - alphas_cumprod(schedule)

    def retime(row: int, x: F32) -> F32 | None:
        t = times[row]
        if row == 0 or t <= hook.cutoff:
            return None
        low, high = max(round(t) - hook.window // 2, 0), min(round(t) + hook.window // 2, len(noise) - 1)
        variance = x.reshape(len(x), -1).var(axis=1, ddof=1)
        nearest = np.abs(variance[:, None] - noise[None, low : high + 1]).argmin(axis=1)
        shifted: F32 = (low + nearest).astype(np.float32)
        return shifted

    return retime


def retrieve(hook: Retrieve, keys: F32, values: F32) -> Callable[[int, F32, F32], Jump | None]:
    """ReDi (Zhang et al. 2023): skip the middle of a trajectory by those of stored ones.

    After `key_row` the sample is written as the least-squares combination of its `top_k` nearest stored keys, and the
    run goes on at `resume_row` with the same combination of their values.

    Args:
        hook: rows and number of neighbours.
        keys, values: (stored, ...) samples after `key_row` and before `resume_row`.

    Raises:
        BadManifest: keys and values are not as many, or fewer than `top_k`.
    """
    if len(keys) != len(values) or len(keys) < hook.top_k:
        raise BadManifest(f"{hook.part} stores {len(keys)} keys and {len(values)} values; top_k is {hook.top_k}")
    flat = keys.reshape(len(keys), -1).astype(np.float64)

    def after(row: int, x: F32, _: F32) -> Jump | None:
        if row != hook.key_row:
            return None
        if x.shape[1:] != keys.shape[1:]:
            raise BadRequest(f"the sample is {x.shape[1:]}; trajectories are stored for {keys.shape[1:]} only")
        return Jump(hook.resume_row, np.stack([_combine(flat, values, one, hook.top_k) for one in x]))

    return after


def _combine(keys: npt.NDArray[np.float64], values: F32, x: F32, top_k: int) -> F32:
    query = x.reshape(-1).astype(np.float64)
    nearest = np.argsort(((keys - query) ** 2).sum(axis=1), kind="stable")[:top_k]
    weights, *_ = np.linalg.lstsq(keys[nearest].T, query, rcond=None)
    mixed: F32 = np.tensordot(weights, values[nearest].astype(np.float64), axes=1).astype(np.float32)
    return mixed
