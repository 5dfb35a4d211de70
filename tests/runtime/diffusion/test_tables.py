"""Schedules, grids and tables: constants, laws, and what a loader refuses."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.bundle.recipe import COLUMNS, Grid, NoiseSchedule, Sampler, Table
from edgekit.errors import BadManifest, BadRequest, IllegalSteps, TableMismatch
from edgekit.runtime.diffusion.grids import alphas_cumprod
from edgekit.runtime.diffusion.tables import SAMPLERS, Row, check_tables, compile_stage, compile_tables
from edgekit.runtime.random import TorchNoise
from tests.runtime.diffusion.cases import COSINE, LAW, LINEAR, SD, SEED, SHAPE, draw, net, schedule, stage
from tests.runtime.diffusion.fakes import emoji_like, manifest_of

SCHEDULES = {"scaled_linear": SD, "linear": LINEAR, "cosine": COSINE}
VP = NoiseSchedule()


def sampler(kind: str, steps: int = 4, **options: object) -> Sampler:
    """A plain sampler of any kind."""
    flow = kind.startswith("flow")
    plain: dict[str, object] = {"prediction": "flow" if flow else "epsilon", "noise_schedule": None if flow else VP}
    plain["grid"] = None if kind == "one_step" else Grid("flow" if flow else "trailing")
    return Sampler(kind, steps, (steps,), **{**plain, **options})  # type: ignore[arg-type]


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "zero_snr", "ulps"), [(n, z, 4 if z else 1) for n in SCHEDULES for z in (False, True)]
)
def test_schedule_constants_are_torchs(name: str, zero_snr: bool, ulps: int) -> None:
    """abar equals torch's to one float32 step; to four at zero SNR, where torch's own square root is off by one."""
    pytest.importorskip("diffusers")
    from tests.runtime.diffusion.reference import from_diffusers

    config = {**SCHEDULES[name], "rescale_betas_zero_snr": zero_snr}
    theirs = from_diffusers("DDIMScheduler")(**config).alphas_cumprod.numpy()
    mine = alphas_cumprod(schedule(config)).astype(np.float32)
    distance = np.abs(mine.view(np.int32).astype(np.int64) - theirs.view(np.int32))
    assert distance.max() <= ulps


def test_columns_are_the_fields_of_a_row() -> None:
    """The order a bundle documents is the order the builders write."""
    assert Row._fields == COLUMNS


def oracle(prediction: str, a: float, s: float) -> tuple[float, float]:
    """What a network that knows x_0 and eps answers at x = a x_0 + s eps: its parts along x_0 and along eps."""
    return {"epsilon": (0.0, 1.0), "sample": (1.0, 0.0), "v_prediction": (-s, a), "flow": (-1.0, 1.0)}[prediction]


PREDICTIONS = {
    **{kind: ["epsilon", "v_prediction", "sample"] for kind in ("lcm", "tcd", "ddim", "euler", "euler_ancestral")},
    "flow_euler": ["flow"],
    "flow_stochastic": ["flow"],
}


@pytest.mark.parametrize("kind", PREDICTIONS)
@LAW
@given(data=st.data(), steps=st.integers(1, 20), eta=st.floats(0, 1))
def test_every_row_lands_on_the_next_noise_level(kind: str, data: st.DataObject, steps: int, eta: float) -> None:
    """With a network that knows the answer, a sample at one level has the signal and noise of the next after the row.

    Old noise and fresh noise add in squares. LCM's boundary condition lets 1e-5 of the noisy sample through by design.
    """
    prediction = data.draw(st.sampled_from(PREDICTIONS[kind]))
    made = sampler(kind, steps, prediction=prediction, eta=eta, gamma=eta)
    if kind == "ddim":  # on a made grid diffusers aims up to one timestep beside the next point
        made = sampler(kind, steps, prediction=prediction, eta=eta, timesteps=tuple(np.linspace(999, 9, steps).round()))
    rule = SAMPLERS[kind]
    path = rule.build(made, rule.points(made, steps, 1.0).values)
    abar = alphas_cumprod(VP)[0]
    end = (math.sqrt(abar), math.sqrt(1 - abar)) if kind == "tcd" else (1.0, 0.0)
    for row, (a, s), (a_next, s_next) in zip(path.rows, path.levels, [*path.levels[1:], end], strict=True):
        along_clean, along_noise = oracle(prediction, row.c_in * a, row.c_in * s)
        assert row.px * a + row.pm * along_clean == pytest.approx(1, abs=1e-6)  # y is x_0 ...
        assert row.px * s + row.pm * along_noise == pytest.approx(0, abs=1e-6 * max(1, s))  # ... and nothing else
        signal = row.kx * a + row.ky + row.km * along_clean
        noise = math.hypot(row.kx * s + row.km * along_noise, row.kz)
        slack = 1e-4 if kind == "lcm" else 1e-9
        assert (signal, noise) == pytest.approx((a_next, s_next), abs=slack * max(1, s_next))


@LAW
@given(t=st.integers(0, 999), prediction=st.sampled_from(["epsilon", "v_prediction", "sample"]))
def test_one_step_is_the_closed_form(t: int, prediction: str) -> None:
    """The single row gives x_0 of x = a x_0 + s eps, whatever the network predicts."""
    made = sampler("one_step", 1, prediction=prediction, timesteps=(float(t),))
    abar = alphas_cumprod(VP)[t]
    a, s = math.sqrt(abar), math.sqrt(1 - abar)
    x = TorchNoise(SEED).normal(SHAPE, 0).astype(np.float64)
    m = net(x.astype(np.float32), float(t))
    wanted = {"epsilon": (x - s * m) / a, "v_prediction": a * x - s * m, "sample": m}[prediction]
    drawn = draw(made, compile_stage(stage(made), 1))
    assert np.abs(drawn - wanted).max() <= 5e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", sorted(set(SAMPLERS) - {"one_step"}))
@LAW
@given(steps=st.integers(1, 12), strength=st.floats(0.01, 1))
def test_strength_cuts_the_grid_from_the_front(kind: str, steps: int, strength: float) -> None:
    """Image-to-image visits the tail of the same grid, or says that the strength leaves nothing to do."""
    made = sampler(kind, steps)
    whole = compile_stage(stage(made), steps)
    if not kind.startswith("flow") and int(steps * strength) < 1:
        with pytest.raises(IllegalSteps, match="strength"):
            compile_stage(stage(made), steps, strength)
        return
    cut = compile_stage(stage(made), steps, strength)
    assert cut.rows == whole.rows[len(whole.rows) - len(cut.rows) :]
    assert cut.init_keep >= 0
    assert len(cut.rows) >= int(steps * strength)


def test_lcm_takes_all_its_steps_below_the_strength() -> None:
    """LCM's own rule: four steps at half strength are four steps on the lower half of the distillation grid."""
    made = sampler("lcm", 4, grid=Grid("lcm"))
    assert [row[0] for row in compile_stage(stage(made), 4, 0.5).rows] == [499, 379, 259, 139]
    with pytest.raises(IllegalSteps, match=r"at least 0\.08"):
        compile_stage(stage(made), 4, 0.05)


REFUSED = {
    "no grid for this count": (sampler("lcm", grid=None), BadManifest, "no grid for 4 steps"),
    "sigmas where timesteps are counted": (sampler("ddim", grid=Grid("flow")), BadManifest, "counts sigmas"),
    "timesteps where sigmas are counted": (sampler("flow_euler", grid=Grid("trailing")), BadManifest, "no sigmas"),
    "more steps than training had": (sampler("ddim", 4, noise_schedule=NoiseSchedule(n=3)), BadManifest, "grid of 3"),
    "more steps than distillation had": (sampler("lcm", grid=Grid("lcm", original=3)), BadManifest, "grid of 3"),
    "rising timesteps": (sampler("ddim", timesteps=(1.0, 2.0, 3.0, 4.0)), BadManifest, "must fall"),
    "a timestep beyond training": (sampler("tcd", timesteps=(1e6, 500.0, 250.0, 0.0)), BadManifest, "999"),
    "a timestep that is no number": (sampler("lcm", timesteps=(math.nan, 3.0, 2.0, 1.0)), BadManifest, "must fall"),
    "an offset beyond training": (sampler("euler", grid=Grid("leading", offset=900)), BadManifest, "999"),
    "rising sigmas": (sampler("flow_euler", sigmas=(0.1, 0.2, 0.3, 0.4)), BadManifest, "must fall"),
    "a sigma of zero": (sampler("flow_euler", sigmas=(1.0, 0.5, 0.2, 0.0)), BadManifest, "above 0"),
    "a negative shift": (sampler("flow_euler", shift=-1.0), BadManifest, "shift"),
    "betas above one": (sampler("ddim", noise_schedule=NoiseSchedule(beta_end=4.0)), BadManifest, "beta"),
    "epsilon at zero signal": (sampler("ddim", noise_schedule=NoiseSchedule(zero_snr=True)), BadManifest, "zero"),
    "flow prediction without a flow": (sampler("lcm", prediction="flow"), BadManifest, "flow samplers only"),
    "epsilon on a flow": (sampler("flow_euler", prediction="epsilon"), BadManifest, "prediction `flow`"),
    "a share above one": (sampler("tcd", gamma=1.5), BadManifest, "gamma"),
    "noise beyond what there is": (sampler("ddim", eta=math.inf), BadManifest, "sampler"),
    "no spread of data": (sampler("lcm", 1, sigma_data=0.0, timestep_scaling=0.0), BadManifest, "sampler"),
    "two points of a one-step model": (sampler("one_step", 1, timesteps=(999.0, 5.0)), BadManifest, "one point"),
    "a kernel without a table": (sampler("direct"), BadManifest, "no table"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_sampler_that_means_nothing_is_refused(name: str) -> None:
    """Every malformed sampler ends in an error of ours that names the fault, never in a table of nonsense."""
    made, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        compile_stage(stage(made), made.steps)


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.5, math.nan])
def test_strength_is_a_share(strength: float) -> None:
    """Outside (0, 1] there is no picture to start from."""
    with pytest.raises(BadRequest, match="strength"):
        compile_stage(stage(sampler("euler")), 4, strength)


def test_one_step_cannot_start_from_a_picture() -> None:
    """Its only point is the noisiest one."""
    with pytest.raises(BadRequest, match="picture"):
        compile_stage(stage(sampler("one_step", 1)), 1, 1.0)


def spoiled(tables: tuple[Table, ...], kind: str) -> tuple[Table, ...]:
    """Tables with one fault."""
    first, *rest = tables
    row = (first.rows[0][0], *(value * (1 + 1e-5) for value in first.rows[0][1:]))
    changes = {
        "a coefficient moved": {"rows": (row, *first.rows[1:])},
        "the start moved": {"init_scale": first.init_scale + 1e-3},
        "the start keeps a picture": {"init_keep": 0.5},
        "a row is missing": {"rows": first.rows[:-1]},
        "a row is short": {"rows": (first.rows[0][:-1], *first.rows[1:])},
    }
    if kind == "a table is missing":
        return tuple(rest)
    if kind == "a table is there twice":
        return (first, first, *rest)
    return (msgspec.structs.replace(first, **changes[kind]), *rest)


@pytest.mark.parametrize(
    "kind",
    [
        "a coefficient moved",
        "the start moved",
        "the start keeps a picture",
        "a row is missing",
        "a row is short",
        "a table is missing",
        "a table is there twice",
    ],
)
def test_a_bundle_whose_tables_are_not_the_recipes_is_refused(kind: str) -> None:
    """Tables travel with the recipe and must be what it compiles to."""
    manifest = manifest_of(emoji_like())
    check_tables(manifest)
    with pytest.raises(TableMismatch, match="export"):
        check_tables(msgspec.structs.replace(manifest, tables=spoiled(manifest.tables, kind)))


def test_a_last_bit_is_no_mismatch() -> None:
    """Another machine's libm may differ by a last bit; that is not an edited bundle."""
    manifest = manifest_of(emoji_like())
    moved = tuple(
        msgspec.structs.replace(t, rows=tuple(tuple(v * (1 + 1e-12) for v in row) for row in t.rows))
        for t in manifest.tables
    )
    check_tables(msgspec.structs.replace(manifest, tables=moved))


def test_a_recipe_compiles_to_a_table_per_legal_step_count() -> None:
    """Direct stages have none; a manifest without recipe has nothing to check."""
    recipe = emoji_like()
    assert [(t.stage, t.steps) for t in compile_tables(recipe)] == [("draw", n) for n in (1, 2, 4, 8)]
    with pytest.raises(BadManifest, match="recipe"):
        check_tables(msgspec.structs.replace(manifest_of(recipe), recipe=None))
