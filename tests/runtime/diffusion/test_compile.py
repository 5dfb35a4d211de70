"""From a stage to its table: where it starts, what the network is told, which part each row asks, which tables ship."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from edgekit.bundle.recipe import TABLE_FREE, Grid, Init, NoiseSchedule, Recipe, Sampler, Tokens
from edgekit.errors import BadManifest, BadRequest
from edgekit.runtime.diffusion.grids import alphas_cumprod
from edgekit.runtime.diffusion.tables import SAMPLERS, compile_stage, compile_tables, noise_levels
from tests.runtime.diffusion.cases import SD, plain, stage
from tests.runtime.diffusion.fakes import UPSCALE

PICTURES = ["encode", "input", "previous"]
ABAR = alphas_cumprod(NoiseSchedule())


def times(made: Sampler) -> list[float]:
    """What the rows of a table tell the network."""
    return [row[0] for row in compile_stage(stage(made), made.steps).rows]


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_a_start_from_a_picture_keeps_it_or_brings_it_to_the_first_level(kind: Any, sampler: str) -> None:
    """As it is, a picture is the sample; `noised`, it is what the first row expects. The rows are those from noise."""
    made = plain(sampler, 1)
    table = compile_stage(stage(made), 1)
    kept = compile_stage(stage(made, Init(kind)), 1)
    noised = compile_stage(stage(made, Init(kind, noised=True)), 1)
    assert (kept.init_keep, kept.init_scale) == (1.0, 0.0)
    assert (noised.init_keep, noised.init_scale) == noise_levels(stage(made), 1)[0]
    assert kept.rows == noised.rows == table.rows
    assert table.init_keep == 0


def test_a_picture_as_it_is_has_no_strength() -> None:
    """What is not noised cannot be noised less; what is enters the grid further down, as image-to-image does."""
    made = plain("ddim", 4)
    with pytest.raises(BadRequest, match="as it is"):
        compile_stage(stage(made, Init("encode")), 4, 0.5)
    assert compile_stage(stage(made, Init("encode", noised=True)), 4, 0.5) == compile_stage(stage(made), 4, 0.5)


@pytest.mark.parametrize("kind", ["lcm", "tcd", "ddim", "ddpm", "dpmpp_2m", "euler"])
def test_the_network_may_be_told_the_signal(kind: str) -> None:
    """`sqrt_alpha_cumprod` is the root of abar at the timestep, in sigma space as well."""
    visited = [999, 749, 499, 249]
    told = times(plain(kind, 4, time="sqrt_alpha_cumprod", time_scale=10.0))
    assert times(plain(kind, 4)) == visited
    assert told == pytest.approx([10 * math.sqrt(ABAR[t]) for t in visited], rel=1e-6)


def test_a_flow_may_be_told_how_far_it_is() -> None:
    """`one_minus_sigma` counts from noise to data, `index` from the last row up; both times `time_scale`."""
    grid = Grid("uniform")
    made = plain("flow_euler", 4, grid=grid, time="one_minus_sigma", time_scale=999.0)
    assert times(made) == pytest.approx([0, 249.75, 499.5, 749.25])
    assert times(plain("flow_euler", 4, grid=grid, time="index", time_scale=2.0)) == [6, 4, 2, 0]
    assert times(plain("flow_heun", 3, grid=grid, time="index")) == [4, 3, 2, 1, 0]
    assert times(plain("flow_euler", 4, grid=grid, time_scale=0.001)) == pytest.approx([1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    ("kind", "time"),
    [
        ("flow_euler", "sqrt_alpha_cumprod"),
        ("ddim", "one_minus_sigma"),
        ("edm_consistency", "one_minus_sigma"),
        ("residual_shift", "sqrt_alpha_cumprod"),
        ("brownian_bridge", "one_minus_sigma"),
    ],
)
def test_a_time_that_a_sampler_has_not_is_refused(kind: str, time: str) -> None:
    """A flow has no abar and a schedule no sigma of a straight path; neither is made up."""
    with pytest.raises(BadManifest, match=time):
        compile_stage(stage(plain(kind, 2, time=time)), 2)


def test_other_times_leave_the_coefficients() -> None:
    """`time_tuned` is told as it stands, row by row, and moves nothing else; image-to-image takes its tail."""
    told = (990.0, 700.5, 480.0, 300.0)
    usual = compile_stage(stage(plain("ddim", 4)), 4)
    tuned = plain("ddim", 4, time_tuned=told, time_scale=7.0)
    table = compile_stage(stage(tuned), 4)
    assert [row[0] for row in table.rows] == list(told)
    assert [row[1:] for row in table.rows] == [row[1:] for row in usual.rows]
    assert [row[0] for row in compile_stage(stage(tuned), 4, 0.5).rows] == list(told[2:])


def test_every_row_names_its_part() -> None:
    """`nets` go into the table, one per row; image-to-image keeps those of the rows it runs."""
    made = plain("ddim", 4, nets=("big", "big", "small", "small"))
    assert compile_stage(stage(made), 4).nets == made.nets
    assert compile_stage(stage(made), 4, 0.75).nets == ("big", "small", "small")
    assert compile_stage(stage(plain("ddim", 4)), 4).nets == ()
    heun = plain("flow_heun", 2, nets=("a", "b", "c"))
    assert compile_stage(stage(heun), 2).nets == ("a", "b", "c")


@pytest.mark.parametrize("field", ["nets", "time_tuned"])
def test_a_list_for_another_step_count_is_refused(field: str) -> None:
    """What is given row by row is for one step count; a recipe that allows others as well says so nowhere."""
    given = {"nets": ("a", "b", "c", "d"), "time_tuned": (9.0, 8.0, 7.0, 6.0)}[field]
    made = Sampler("ddim", 4, (2, 4), grid=Grid("trailing"), **{field: given})  # type: ignore[arg-type]
    with pytest.raises(BadManifest, match=rf"{field} has 4 entries and the table of 2 steps 2 rows"):
        compile_tables(Recipe((stage(made),)))


def test_listed_points_are_for_their_own_step_count() -> None:
    """Other legal counts come from the grid, or are refused where there is none."""
    listed = Sampler("ddim", 2, (1, 2), timesteps=(999.0, 400.0), endpoints=(400.0, 0.0), grid=Grid("trailing"))
    assert [row[0] for table in compile_tables(Recipe((stage(listed),))) for row in table.rows] == [999, 999, 400]
    with pytest.raises(BadManifest, match="no grid for 1 steps"):
        compile_tables(Recipe((stage(msgspec.structs.replace(listed, grid=None)),)))


def test_samplers_without_a_table_ship_none() -> None:
    """Tokens, blocks, frames and direct calls run by rules of their own; asked for a table, they are named."""
    assert not set(TABLE_FREE) & set(SAMPLERS)
    tokens = Sampler("masked_tokens", 4, (4,), tokens=Tokens(16, 32))
    free = msgspec.structs.replace(stage(tokens, Init("mask")), name="tokens")
    drawn = stage(plain("ddim", 2))
    assert [table.stage for table in compile_tables(Recipe((drawn, free, UPSCALE)))] == ["main"]
    with pytest.raises(BadManifest, match="no table"):
        compile_stage(free, 4)


LIVE = {
    "ddim": ("DDIMScheduler", {**SD, "timestep_spacing": "trailing"}),
    "euler": ("EulerDiscreteScheduler", {**SD, "timestep_spacing": "trailing"}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {**SD, "timestep_spacing": "trailing"}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
}


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
@pytest.mark.parametrize("kind", LIVE)
def test_noise_levels_are_where_diffusers_paints_around(kind: str) -> None:
    """What its in-painting pipelines bring the known part to before row i is `add_noise` at timestep i."""
    torch = pytest.importorskip("torch")
    from tests.runtime.diffusion.reference import from_diffusers

    name, config = LIVE[kind]
    scheduler = from_diffusers(name)(**config)
    scheduler.set_timesteps(5)
    one, zero = torch.ones(1), torch.zeros(1)
    bring = getattr(scheduler, "add_noise", None) or (lambda clean, noise, t: scheduler.scale_noise(clean, t, noise))
    theirs = [[float(bring(*pair, t[None])) for pair in ((one, zero), (zero, one))] for t in scheduler.timesteps]
    *ours, end = noise_levels(stage(plain(kind, 5)), 5)
    assert np.allclose(ours, theirs, rtol=1e-6)
    assert end == (1.0, 0.0)
