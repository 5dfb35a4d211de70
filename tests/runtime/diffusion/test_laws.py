"""Laws of tables that need no reference: what a network that knows the answer makes of every row."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.bundle.recipe import NoiseSchedule, ResidualShift, Sampler
from edgekit.errors import IllegalSteps
from edgekit.runtime.diffusion.grids import alphas_cumprod
from edgekit.runtime.diffusion.tables import SAMPLERS, Path, Row, compile_stage, noise_levels
from edgekit.runtime.random import TorchNoise
from tests.runtime.diffusion.cases import LAW, SEED, SHAPE, draw, net, plain, stage

VP = NoiseSchedule()
GAUSSIAN = ["epsilon", "v_prediction", "sample"]
FLOWS = ["flow_euler", "flow_heun", "flow_midpoint", "flow_map", "flow_stochastic"]
PREDICTIONS = {
    **dict.fromkeys(("lcm", "tcd", "ddim", "ddpm", "dpmpp_2m", "euler", "euler_ancestral"), GAUSSIAN),
    **{kind: ["flow"] for kind in FLOWS},
    "edm_consistency": ["epsilon", "v_prediction"],
    "trig_consistency": ["epsilon"],
}
Parts = tuple[float, float]  # along the clean sample, and along the noise


def oracle(made: Sampler, row: Row, a: float, s: float) -> Parts:
    """What a network that knows x_0 and eps answers at x = a x_0 + s eps."""
    if made.kind == "trig_consistency":  # d/dt of cos(t) x_0 + sin(t) d z
        return -math.sin(row.t), math.cos(row.t) * made.sigma_data
    if made.kind == "edm_consistency":  # Karras et al. 2022, eq. 7 solved for F, its c_skip at the boundary's sigma
        c_skip = made.sigma_data**2 / ((s - made.sigma_min) ** 2 + made.sigma_data**2)
        c_out = (s - made.sigma_min) * made.sigma_data / math.hypot(s, made.sigma_data)
        sign = -1 if made.prediction == "v_prediction" else 1
        return sign * (1 - c_skip) / c_out, -sign * c_skip * s / c_out
    if made.prediction == "flow":
        return -made.sign, made.sign
    a, s = row.c_in * a, row.c_in * s
    return {"epsilon": (0.0, 1.0), "sample": (1.0, 0.0), "v_prediction": (-s, a)}[made.prediction]


def clean_end(kind: str) -> Parts:
    """Where a path ends: TCD stops at its first training step."""
    abar = alphas_cumprod(VP)[0]
    return (math.sqrt(abar), math.sqrt(1 - abar)) if kind == "tcd" else (1.0, 0.0)


def walked(made: Sampler, steps: int) -> Path:
    """The path of a sampler from its noisiest point."""
    rule = SAMPLERS[made.kind]
    return rule.build(made, rule.points(made, steps, 1.0).values)


@pytest.mark.parametrize("kind", PREDICTIONS)
@LAW
@given(data=st.data(), steps=st.integers(1, 20), eta=st.floats(0, 1))
def test_every_row_lands_on_the_next_noise_level(kind: str, data: st.DataObject, steps: int, eta: float) -> None:
    """With a network that knows the answer, a sample at one level has the signal and noise of the next after the row.

    Old noise and fresh noise add in squares. LCM's boundary condition lets 1e-5 of the noisy sample through by design,
    and EDM's counts levels from sigma_min.
    """
    prediction = data.draw(st.sampled_from(PREDICTIONS[kind]))
    made = plain(kind, steps, prediction=prediction, eta=eta, gamma=eta, sign=data.draw(st.sampled_from([1, -1])))
    if kind == "ddim":  # on a made grid diffusers aims up to one timestep beside the next point
        made = plain(kind, steps, prediction=prediction, eta=eta, timesteps=tuple(np.linspace(999, 9, steps).round()))
    path = walked(made, steps)
    before = (0.0, 0.0)
    for row, (a, s), after in zip(path.rows, path.levels, [*path.levels[1:], clean_end(kind)], strict=True):
        along_clean, along_noise = oracle(made, row, a, s)
        assert row.px * a + row.pm * along_clean == pytest.approx(1, abs=1e-6)  # y is x_0 ...
        assert row.px * s + row.pm * along_noise == pytest.approx(0, abs=1e-6 * max(1, s))  # ... and nothing else
        signal = row.kx * a + row.ky + row.km * along_clean + row.kp * before[0] + row.kq
        noise = math.hypot(row.kx * s + row.km * along_noise + row.kp * before[1], row.kz)
        if kind == "edm_consistency" and after[1]:
            noise = math.hypot(noise, made.sigma_min)
        slack = 1e-4 if kind == "lcm" else 1e-6 if kind == "edm_consistency" else 1e-9
        assert (signal, noise) == pytest.approx(after, abs=slack * max(1, after[1]))
        before = (a, s)


@LAW
@given(steps=st.integers(1, 20), kappa=st.floats(0.5, 4), least=st.floats(0.01, 0.4), power=st.floats(0.1, 2))
def test_every_shift_lands_on_the_next_mixture(steps: int, kappa: float, least: float, power: float) -> None:
    """ResShift's sample is (1 - eta) x_0 + eta y + kappa sqrt(eta) noise before every row, whatever the schedule."""
    shift = ResidualShift(kappa=kappa, min_noise=least, power=power)
    made = plain("residual_shift", steps, residual_shift=shift)
    path, etas = walked(made, steps), SAMPLERS["residual_shift"].points(made, steps, 1.0).values.tolist()
    assert etas[0] == pytest.approx(0.99**2)
    for row, eta, after, level in zip(path.rows, etas, [*etas[1:], 0.0], path.levels, strict=True):
        assert level == pytest.approx((1, kappa * math.sqrt(eta)))
        assert row.c_in == pytest.approx(1 / math.hypot(level[1], 1))
        assert row.kx * (1 - eta) + row.ky == pytest.approx(1 - after)
        assert row.kx * eta == pytest.approx(after)
        assert math.hypot(row.kx * level[1], row.kz) == pytest.approx(kappa * math.sqrt(after))


@LAW
@given(steps=st.integers(1, 20), noise=st.floats(0, 4))
def test_every_bridge_row_lands_on_the_next_law(steps: int, noise: float) -> None:
    """A Brownian bridge at t is (1 - t) x_0 + t x_1 + sqrt(e t (1 - t)) noise before every row."""
    path = walked(plain("brownian_bridge", steps, bridge_noise=noise), steps)
    times = (1 - np.arange(steps + 1) / steps).tolist()
    assert path.levels[0] == (1.0, 0.0)
    for row, t, after in zip(path.rows, times, times[1:], strict=False):
        assert row.kx * (1 - t) + row.ky == pytest.approx(1 - after)
        assert row.kx * t == pytest.approx(after)
        spread = math.hypot(row.kx * math.sqrt(noise * t * (1 - t)), row.kz)
        assert spread == pytest.approx(math.sqrt(noise * after * (1 - after)), abs=1e-12)


@LAW
@given(t=st.integers(0, 999), prediction=st.sampled_from(GAUSSIAN))
def test_one_step_is_the_closed_form(t: int, prediction: str) -> None:
    """The single row gives x_0 of x = a x_0 + s eps, whatever the network predicts."""
    made = plain("one_step", 1, prediction=prediction, timesteps=(float(t),))
    abar = alphas_cumprod(VP)[t]
    a, s = math.sqrt(abar), math.sqrt(1 - abar)
    x = TorchNoise(SEED).normal(SHAPE, 0).astype(np.float64)
    m = net(x.astype(np.float32), float(t))
    wanted = {"epsilon": (x - s * m) / a, "v_prediction": a * x - s * m, "sample": m}[prediction]
    drawn = draw(made, compile_stage(stage(made), 1))
    assert np.abs(drawn - wanted).max() <= 5e-6 * np.abs(wanted).max()


@LAW
@given(sigma=st.floats(0.1, 100), prediction=st.sampled_from(GAUSSIAN))
def test_one_step_in_sigma_space_finds_the_clean_sample(sigma: float, prediction: str) -> None:
    """With sigmas the single row starts at sigma z, scales what the network is shown, and ends at x_0."""
    made = plain("one_step", 1, prediction=prediction, sigmas=(sigma,), timesteps=(440.0,))
    path = walked(made, 1)
    (row,) = path.rows
    along_clean, along_noise = oracle(made, row, 1.0, sigma)
    assert (path.scale, path.levels, row.t) == (sigma, [(1.0, sigma)], 440.0)
    assert row.px + row.pm * along_clean == pytest.approx(1)
    assert row.px * sigma + row.pm * along_noise == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", sorted(kind for kind, rule in SAMPLERS.items() if rule.from_image))
@LAW
@given(steps=st.integers(1, 12), strength=st.floats(0.01, 1))
def test_strength_cuts_the_grid_from_the_front(kind: str, steps: int, strength: float) -> None:
    """Image-to-image visits the tail of the same grid, or says that the strength leaves nothing to do.

    A row that used the one before it, and is now the first, takes what it took from there from its own estimate.
    """
    made = plain(kind, steps)
    whole = compile_stage(stage(made), steps)
    if not kind.startswith(("flow", "trig")) and int(steps * strength) < 1:
        with pytest.raises(IllegalSteps, match="strength"):
            compile_stage(stage(made), steps, strength)
        return
    cut = compile_stage(stage(made), steps, strength)
    first, *rest = whole.rows[len(whole.rows) - len(cut.rows) :]
    *head, kx, ky, km, kz, kp, kq = first
    assert cut.rows == ((*head, kx + kp, ky + kq, km, kz, 0.0, 0.0), *rest)
    assert len(cut.rows) >= int(steps * strength)
    levels = noise_levels(stage(made), steps, strength)
    assert (cut.init_keep, cut.init_scale) == levels[0]
    assert len(levels) == len(cut.rows) + 1
    assert levels == noise_levels(stage(made), steps)[-len(levels) :]
    assert levels[-1] == (1.0, 0.0)


@pytest.mark.parametrize("kind", ["flow_heun", "flow_midpoint"])
def test_a_second_order_flow_integrates_what_euler_cannot(kind: str) -> None:
    """On dx/dsigma = 2 sigma, both methods are exact from 1 to the last point; Euler is off by the step."""

    def end(made: Sampler) -> float:
        x = x_prev = y_prev = 1.0
        for t, _, px, pm, kx, ky, km, _, kp, kq in compile_stage(stage(made), 4).rows[:-1]:
            m = 2 * t / 1000
            y = px * x + pm * m
            x, x_prev, y_prev = kx * x + ky * y + km * m + kp * x_prev + kq * y_prev, x, y
        return x

    sigmas = (1.0, 0.6, 0.3, 0.001)
    exact = 0.001**2 if kind == "flow_heun" else 0.0005**2  # the midpoint's last but one row is half way to 0
    assert end(plain(kind, 4, grid=None, sigmas=sigmas)) == pytest.approx(exact, abs=2e-6)
    assert abs(end(plain("flow_euler", 4, grid=None, sigmas=sigmas))) > 0.1
