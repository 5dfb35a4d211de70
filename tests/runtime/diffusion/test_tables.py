"""Schedules, grids and tables: constants, laws, and what a loader refuses."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from edgekit.bundle.recipe import COLUMNS, Grid, NoiseSchedule, ResidualShift, Table
from edgekit.errors import BadManifest, BadRequest, IllegalSteps, TableMismatch
from edgekit.runtime.diffusion.grids import alphas_cumprod
from edgekit.runtime.diffusion.tables import SAMPLERS, Row, check_tables, compile_stage, compile_tables
from tests.runtime.diffusion.cases import COSINE, LINEAR, SD, plain, schedule, stage
from tests.runtime.diffusion.fakes import emoji_like, manifest_of

SCHEDULES = {"scaled_linear": SD, "linear": LINEAR, "cosine": COSINE}


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


def test_lcm_takes_all_its_steps_below_the_strength() -> None:
    """LCM's own rule: four steps at half strength are four steps on the lower half of the distillation grid."""
    made = plain("lcm", 4, grid=Grid("lcm"))
    assert [row[0] for row in compile_stage(stage(made), 4, 0.5).rows] == [499, 379, 259, 139]
    with pytest.raises(IllegalSteps, match=r"at least 0\.08"):
        compile_stage(stage(made), 4, 0.05)


REFUSED = {
    "no grid for this count": (plain("lcm", grid=None), BadManifest, "no grid for 4 steps"),
    "sigmas where timesteps are counted": (plain("ddim", grid=Grid("flow")), BadManifest, "counts sigmas"),
    "timesteps where sigmas are counted": (plain("flow_euler", grid=Grid("trailing")), BadManifest, "no sigmas"),
    "more steps than training had": (plain("ddim", 4, noise_schedule=NoiseSchedule(n=3)), BadManifest, "grid of 3"),
    "more steps than distillation had": (plain("lcm", grid=Grid("lcm", original=3)), BadManifest, "grid of 3"),
    "rising timesteps": (plain("ddim", timesteps=(1.0, 2.0, 3.0, 4.0)), BadManifest, "must fall"),
    "a timestep beyond training": (plain("tcd", timesteps=(1e6, 500.0, 250.0, 0.0)), BadManifest, "999"),
    "a timestep that is no number": (plain("lcm", timesteps=(math.nan, 3.0, 2.0, 1.0)), BadManifest, "must fall"),
    "an offset beyond training": (plain("euler", grid=Grid("leading", offset=900)), BadManifest, "999"),
    "rising sigmas": (plain("flow_euler", sigmas=(0.1, 0.2, 0.3, 0.4)), BadManifest, "must fall"),
    "a sigma of zero": (plain("flow_euler", sigmas=(1.0, 0.5, 0.2, 0.0)), BadManifest, "above 0"),
    "a negative shift": (plain("flow_euler", shift=-1.0), BadManifest, "shift"),
    "betas above one": (plain("ddim", noise_schedule=NoiseSchedule(beta_end=4.0)), BadManifest, "beta"),
    "epsilon at zero signal": (plain("ddim", noise_schedule=NoiseSchedule(zero_snr=True)), BadManifest, "zero"),
    "flow prediction without a flow": (plain("lcm", prediction="flow"), BadManifest, "flow samplers only"),
    "epsilon on a flow": (plain("flow_euler", prediction="epsilon"), BadManifest, "prediction `flow`"),
    "a share above one": (plain("tcd", gamma=1.5), BadManifest, "gamma"),
    "noise beyond what there is": (plain("ddim", eta=math.inf), BadManifest, "sampler"),
    "no spread of data": (plain("lcm", 1, sigma_data=0.0, timestep_scaling=0.0), BadManifest, "sampler"),
    "two points of a one-step model": (plain("one_step", 1, timesteps=(999.0, 5.0)), BadManifest, "one point"),
    "a one-step time beyond training": (plain("one_step", 1, timesteps=(1000.0,)), BadManifest, "999"),
    "a one-step sigma of zero": (plain("one_step", 1, sigmas=(0.0,), timesteps=(9.0,)), BadManifest, "above 0"),
    "a one-step flow past noise": (plain("one_step", 1, sigmas=(1.5,), prediction="flow"), BadManifest, "at most 1"),
    "a sigma without its time": (plain("one_step", 1, sigmas=(2.5,)), BadManifest, "timestep"),
    "endpoints beyond training": (
        plain("ddim", 2, timesteps=(9.0, 500.0), endpoints=(500.0, 1000.0)),
        BadManifest,
        "endpoints",
    ),
    "endpoints for other rows": (plain("ddim", 2, timesteps=(9.0, 500.0), endpoints=(0.0,)), BadManifest, "endpoint"),
    "fresh noise on the way up": (
        plain("ddim", 2, timesteps=(9.0, 500.0), endpoints=(500.0, 900.0), eta=1.0),
        BadManifest,
        "does not compile",
    ),
    "a karras grid upside down": (plain("edm_consistency", grid=Grid("karras", sigma_max=1e-3)), BadManifest, "karras"),
    "fewer distilled sigmas than steps": (
        plain("edm_consistency", grid=Grid("karras", original=3)),
        BadManifest,
        "grid of 3",
    ),
    "timesteps of a consistency model": (plain("edm_consistency", grid=Grid("trailing")), BadManifest, "no sigmas"),
    "the sample of a consistency model": (plain("edm_consistency", prediction="sample"), BadManifest, "v_prediction"),
    "epsilon on listed sigmas": (plain("euler", grid=Grid("karras")), BadManifest, "v_prediction"),
    "rising sigmas of euler": (plain("euler", 2, sigmas=(1.0, 2.0)), BadManifest, "must fall"),
    "angles beyond a quarter turn": (plain("trig_consistency", 1, timesteps=(3.0,)), BadManifest, "pi/2"),
    "no angles": (plain("trig_consistency", grid=None), BadManifest, "no angles"),
    "an infinite mu": (plain("flow_euler", mu=math.inf), BadManifest, "mu"),
    "a shift that does not grow": (
        plain("residual_shift", residual_shift=ResidualShift(min_noise=4.0)),
        BadManifest,
        "must grow",
    ),
    "a shift of nothing": (plain("residual_shift", residual_shift=ResidualShift(kappa=0.0)), BadManifest, "above 0"),
    "epsilon on a shift": (plain("residual_shift", prediction="epsilon"), BadManifest, "`sample`"),
    "epsilon on a bridge": (plain("brownian_bridge", prediction="epsilon"), BadManifest, "`sample`"),
    "negative noise on a bridge": (plain("brownian_bridge", bridge_noise=-1.0), BadManifest, "does not compile"),
    "tokens": (plain("masked_tokens"), BadManifest, "no table"),
    "a kernel without a table": (plain("direct"), BadManifest, "no table"),
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
        compile_stage(stage(plain("euler")), 4, strength)


@pytest.mark.parametrize("kind", ["one_step", "residual_shift", "brownian_bridge"])
def test_some_samplers_are_never_entered_part_of_the_way(kind: str) -> None:
    """A one-step model has only its noisiest point, and a bridge starts from a picture anyway."""
    assert not SAMPLERS[kind].from_image
    with pytest.raises(BadRequest, match="picture"):
        compile_stage(stage(plain(kind, 1)), 1, 1.0)
    with pytest.raises(BadRequest, match="strength"):
        SAMPLERS[kind].points(plain(kind, 1), 1, 0.5)


def spoiled(tables: tuple[Table, ...], kind: str) -> tuple[Table, ...]:
    """Tables with one fault."""
    first, *rest = tables
    row = (first.rows[0][0], *(value * (1 + 1e-5) for value in first.rows[0][1:]))
    changes = {
        "a coefficient moved": {"rows": (row, *first.rows[1:])},
        "the start moved": {"init_scale": first.init_scale + 1e-3},
        "the start keeps a picture": {"init_keep": 0.5},
        "a row runs another part": {"nets": ("big", "small")},
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
        "a row runs another part",
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
