"""The runner against its slow, obvious twin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.runtime.diffusion.kernels import Jump, Net, direct, linear
from edgekit.runtime.random import PhiloxNoise
from tests.runtime.diffusion.cases import LAW, SHAPE, net

ROW = st.tuples(st.floats(0, 999), *[st.floats(-1, 1) for _ in range(9)])


def timed(rows: list[tuple[float, ...]]) -> Net:
    """The stand-in denoiser at each row's own time."""
    return lambda x, row: net(x, rows[row][0])


def still(x: np.ndarray, row: int) -> np.ndarray:
    """A network that always predicts zero."""
    return np.zeros_like(x)


def twin(rows: list[tuple[float, ...]], x: np.ndarray, seed: int, clip: float | None) -> np.ndarray:
    """The formula of tables.py, element by element, in float64, every term written out."""
    x = x.astype(np.float64)
    x_prev, y_prev = x, x
    for i, (t, c_in, px, pm, kx, ky, km, kz, kp, kq) in enumerate(rows):
        m = net((c_in * x).astype(np.float32), t).astype(np.float64)
        y = px * x + pm * m
        if clip is not None:
            y = np.minimum(np.maximum(y, -clip), clip)
        z = PhiloxNoise(seed).normal(SHAPE, i).astype(np.float64)
        new = kx * x + ky * y + km * m + kz * z + kp * x_prev + kq * y_prev
        x_prev, y_prev, x = x, y, new
    return x


@LAW
@given(st.lists(ROW, min_size=1, max_size=5), st.integers(0, 99), st.one_of(st.none(), st.floats(0.1, 3)))
def test_linear_is_the_formula(rows: list[tuple[float, ...]], seed: int, clip: float | None) -> None:
    """Any table at all, with history columns and clipping, gives what the written-out formula gives."""
    start = PhiloxNoise(seed).normal(SHAPE, 77)
    *_, (_, x, _) = linear(rows, start, timed(rows), lambda i: PhiloxNoise(seed).normal(SHAPE, i), clip=clip)
    wanted = twin(rows, start, seed, clip)
    assert np.abs(x - wanted).max() <= 1e-5 * max(1, np.abs(wanted).max())
    assert x.dtype == np.float32


def test_noise_is_asked_only_where_a_row_uses_it() -> None:
    """Rows without fresh noise leave the generator alone, which is what keeps torch's order of draws."""
    asked: list[int] = []

    def noise(row: int) -> np.ndarray:
        asked.append(row)
        return np.zeros(SHAPE, np.float32)

    plain = (500.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    noisy = (*plain[:7], 0.5, 0.0, 0.0)
    assert len(list(linear([plain, noisy, plain, noisy], np.ones(SHAPE, np.float32), still, noise))) == 4
    assert asked == [1, 3]


def test_the_start_is_left_alone() -> None:
    """The kernel makes new arrays: the caller's latents are the same afterwards."""
    start = np.ones(SHAPE, np.float32)
    list(linear([(10.0, 0.5, 1.0, -1.0, 0.5, 0.5, 0.1, 0.0, 0.0, 0.0)], start, still, lambda row: start))
    assert (start == 1).all()


def test_the_estimate_comes_with_the_sample() -> None:
    """Each row gives the sample after it and the clean estimate it was made from."""
    x = np.full(SHAPE, 2.0, np.float32)
    row = (0.0, 1.0, 3.0, 0.0, 0.0, 0.25, 0.0, 0.0, 0.0, 0.0)
    ((_, after, clean),) = linear([row], x, still, lambda row: x)
    assert (clean == 6).all()
    assert (after == 1.5).all()


@pytest.mark.parametrize("scale", [1.0, -2.0])
def test_direct_is_one_call(scale: float) -> None:
    """The network's answer is both sample and estimate; it is asked once, at time 0."""
    rows: list[int] = []

    def answer(x: np.ndarray, row: int) -> np.ndarray:
        rows.append(row)
        return scale * x

    ((_, x, clean),) = direct(np.ones(SHAPE, np.float32), answer)
    assert (x == scale).all()
    assert clean is x
    assert rows == [0]


KEEP = (0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)  # a row that leaves the sample as it is


def test_known_entries_are_put_back_before_every_row_and_at_the_end() -> None:
    """`impose` is asked for row 0, for each row after it, and once past the last."""
    asked: list[int] = []

    def impose(row: int, x: np.ndarray) -> np.ndarray:
        asked.append(row)
        return x + 1

    *_, last = linear([KEEP, KEEP], np.zeros(SHAPE, np.float32), still, lambda row: 0, impose=impose)
    assert asked == [0, 1, 2]
    assert (last.x == 3).all()


@pytest.mark.parametrize(("to", "visited"), [(3, [0, 1, 3]), (9, [0, 1])])
def test_a_hook_may_jump_ahead_or_end_the_run(to: int, visited: list[int]) -> None:
    """A Jump goes on at its row with its sample; past the last row the run is over."""

    def after(row: int, x: np.ndarray, clean: np.ndarray) -> Jump | None:
        return Jump(to, np.full(SHAPE, 7, np.float32)) if row == 1 else None

    steps = list(linear([KEEP] * 4, np.zeros(SHAPE, np.float32), still, lambda row: 0, after=after))
    assert [step.row for step in steps] == visited
    assert (steps[-1].x == 7).all()


def test_the_sample_is_bounded_after_every_row() -> None:
    """`clip_out` bounds what a row leaves, whatever it computed."""
    double = (0.0, 1.0, 1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0)
    *_, last = linear([double] * 3, np.full(SHAPE, 0.6, np.float32), still, lambda row: 0, clip_out=1.0)
    assert (last.x == 1).all()
