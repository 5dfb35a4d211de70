"""Hooks as the pure functions they are."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.bundle.recipe import NoiseSchedule, Retrieve, TimeShift
from edgekit.errors import BadManifest, BadRequest
from edgekit.runtime.diffusion.grids import alphas_cumprod
from edgekit.runtime.diffusion.hooks import retrieve, time_shift

SCHEDULE = NoiseSchedule("linear", 0.0001, 0.02)
TIMES = [999.0, 749.0, 499.0, 249.0]


def noisy(t: int, shape: tuple[int, ...] = (1, 4, 64, 64)) -> np.ndarray:
    """Noise with the variance 1 - abar of timestep t."""
    return np.sqrt(1 - alphas_cumprod(SCHEDULE)[t]) * np.random.default_rng(0).standard_normal(shape)


@pytest.mark.parametrize("t", [300, 480, 499, 515])
def test_a_sample_is_told_the_time_its_variance_has(t: int) -> None:
    """Within a window of 400 around 499, noise of timestep t is told t, to what its own spread allows."""
    told = time_shift(TimeShift(400, 100.0), SCHEDULE, TIMES)(2, noisy(t))
    assert told is not None
    power = alphas_cumprod(SCHEDULE)
    assert abs(power[int(told[0])] - power[t]) < 0.02


def test_the_time_stays_in_its_window_and_is_each_samples_own() -> None:
    """Samples far noisier or cleaner than promised are told the window's ends."""
    batch = np.concatenate([noisy(999), noisy(20)])
    told = time_shift(TimeShift(30, 100.0), SCHEDULE, TIMES)(2, batch)
    assert told is not None
    assert told.tolist() == [514.0, 484.0]


def test_the_first_row_and_the_end_keep_their_times() -> None:
    """Row 0 is pure noise, and below the cutoff the variance is the picture's."""
    hook = time_shift(TimeShift(30, 300.0), SCHEDULE, TIMES)
    assert hook(0, noisy(500)) is None
    assert hook(3, noisy(500)) is None


def test_a_stored_sample_is_found_and_its_end_taken() -> None:
    """The key itself leads to its own value, at the row where the run resumes; other rows go on."""
    keys = np.random.default_rng(1).standard_normal((5, 2, 3)).astype(np.float32)
    values = np.random.default_rng(2).standard_normal((5, 2, 3)).astype(np.float32)
    after = retrieve(Retrieve("base", key_row=1, resume_row=4, top_k=1), keys, values)
    assert after(0, keys[3:4], keys[3:4]) is None
    jump = after(1, keys[3:4], keys[3:4])
    assert jump is not None
    assert jump.row == 4
    assert np.abs(jump.x - values[3:4]).max() <= 1e-5


def test_a_mixture_of_neighbours_is_the_same_mixture_of_their_ends() -> None:
    """A sample that is 0.75 of one key and 0.5 of another gives those shares of their values."""
    keys = np.zeros((3, 4), np.float32)
    keys[0, 0], keys[1, 1], keys[2, 2] = 1, 1, 50
    values = np.random.default_rng(3).standard_normal((3, 4)).astype(np.float32)
    after = retrieve(Retrieve("base", 0, 1, top_k=2), keys, values)
    jump = after(0, (0.75 * keys[:1] + 0.5 * keys[1:2]), keys[:1])
    assert jump is not None
    assert np.abs(jump.x - (0.75 * values[0] + 0.5 * values[1])).max() <= 1e-6


def test_a_store_too_small_is_refused() -> None:
    """Keys without their values, or fewer than the neighbours asked for."""
    with pytest.raises(BadManifest, match="3 keys and 2 values"):
        retrieve(Retrieve("base", 0, 1), np.zeros((3, 4), np.float32), np.zeros((2, 4), np.float32))
    with pytest.raises(BadManifest, match="top_k is 5"):
        retrieve(Retrieve("base", 0, 1, top_k=5), np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32))


def test_a_sample_of_another_size_finds_nothing() -> None:
    """Trajectories of one size say nothing of another; the sizes are named."""
    after = retrieve(Retrieve("base", 0, 1), np.zeros((3, 2, 4), np.float32), np.zeros((3, 2, 4), np.float32))
    with pytest.raises(BadRequest, match=r"stored for \(2, 4\)"):
        after(0, np.zeros((1, 2, 5), np.float32), np.zeros((1, 2, 5), np.float32))
