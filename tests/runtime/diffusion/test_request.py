"""The few-step contract: hostile requests, each with its error and the legal values in it, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from edgekit.bundle.recipe import Init, Recipe
from edgekit.bundle.validate import check_manifest
from edgekit.errors import BadManifest, BadRequest, IllegalSteps
from edgekit.runtime.diffusion.contract import Contract
from edgekit.runtime.diffusion.request import DrawRequest
from tests.runtime.diffusion.fakes import RECIPES, UPSCALE, Studio, lcm_like, studio

PICTURE = Image.new("RGB", (40, 24), "red")
NAN = np.full((1, 4, 6, 8), np.nan, np.float32)

HOSTILE: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "more steps than distilled": ("emoji", {"steps": 50}, IllegalSteps, "1, 2, 4, 8"),
    "no steps": ("lcm", {"steps": 0}, IllegalSteps, "1, 2, 4, 8"),
    "a count in between": ("cfg", {"steps": 3}, IllegalSteps, "2, 4"),
    "steps of an upscaler": ("upscaler", {"steps": 2, "image": PICTURE}, IllegalSteps, "distilled for 1"),
    "guidance above the range": ("emoji", {"guidance": 1000}, BadRequest, "guidance is 1000; .* 1.0 to 8.0"),
    "guidance below the range": ("cfg", {"guidance": 0.5}, BadRequest, "1.0 to 10.0"),
    "guidance that is no number": ("cfg", {"guidance": float("nan")}, BadRequest, "finite"),
    "guidance where there is none": ("turbo", {"guidance": 5.0}, BadRequest, "without it"),
    "negative where there is no guidance": ("turbo", {"negative": "blurry"}, BadRequest, "negative"),
    "negative of an embedded scale": ("lcm", {"negative": "blurry"}, BadRequest, "negative"),
    "negative without effect": ("cfg", {"negative": "blurry", "guidance": 1.0}, BadRequest, "no effect"),
    "another size of a fixed one": ("emoji", {"width": 33}, BadRequest, r"64 x 64 pixels only \(16 x 16, enlarged 4"),
    "the small size of an enlarged one": ("emoji", {"height": 16}, BadRequest, "64 x 64"),
    "a size off the grid": ("lcm", {"width": 60}, BadRequest, "multiple of 8"),
    "no size": ("lcm", {"height": 0}, BadRequest, "height is 0"),
    "an enormous size": ("lcm", {"width": 10**9}, BadRequest, "width"),
    "no images": ("lcm", {"batch": 0}, BadRequest, "batch"),
    "a negative seed": ("lcm", {"seed": -1}, BadRequest, "seed"),
    "a seed too long": ("lcm", {"seed": 2**64}, BadRequest, "seed"),
    "an unknown seed mode": ("lcm", {"seed_mode": "dice"}, BadRequest, "philox, torch-cpu"),
    "one image of a torch batch": ("lcm", {"seed_mode": "torch-cpu", "first_image": 2}, BadRequest, "alone"),
    "a picture without an encoder": ("emoji", {"image": PICTURE}, BadRequest, "text alone"),
    "a picture that is not there": ("lcm", {"image": "no-such.png"}, BadRequest, "no-such.png"),
    "no picture to enlarge": ("upscaler", {}, BadRequest, "picture"),
    "strength without a picture": ("lcm", {"strength": 0.5}, BadRequest, "picture"),
    "strength above one": ("lcm", {"image": PICTURE, "strength": 1.5}, BadRequest, "strength"),
    "strength of nothing": ("lcm", {"image": PICTURE, "strength": 0.0}, BadRequest, "strength"),
    "strength that leaves no step": ("cfg", {"image": PICTURE, "strength": 0.2}, IllegalSteps, "at least 0.25"),
    "strength below the distilled grid": ("lcm", {"image": PICTURE, "strength": 0.05}, IllegalSteps, "at least 0.08"),
    "two starts": ("lcm", {"image": PICTURE, "latents": np.zeros((1, 4, 3, 5))}, BadRequest, "one of them"),
    "latents of another shape": ("lcm", {"latents": np.zeros((1, 4, 8, 8))}, BadRequest, r"\(1, 4, 6, 8\)"),
    "latents of another batch": ("lcm", {"latents": np.zeros((1, 4, 6, 8)), "batch": 2}, BadRequest, r"\(2, 4, 6, 8\)"),
    "latents that are not numbers": ("lcm", {"latents": NAN}, BadRequest, "finite"),
    "latents of an upscaler": (
        "upscaler",
        {"latents": np.ones((1, 4, 5, 5)), "image": PICTURE},
        BadRequest,
        "samples nothing",
    ),
    "a prompt for an upscaler": ("upscaler", {"image": PICTURE, "prompt": "red"}, BadRequest, "no prompt"),
    "a size for an upscaler": ("upscaler", {"image": PICTURE, "width": 64}, BadRequest, "width"),
}


@pytest.fixture
def stand(tmp_path: Path) -> Any:
    """A studio for a recipe by name."""
    return lambda name: studio(tmp_path, RECIPES[name]())


@pytest.mark.parametrize("name", HOSTILE)
def test_what_the_bundle_cannot_honour_is_refused_before_anything_runs(name: str, stand: Any) -> None:
    """The error has its class, names the option, and says what would be legal; no network was opened."""
    recipe, options, error, words = HOSTILE[name]
    fake: Studio = stand(recipe)
    with pytest.raises(error, match=words) as refused:
        fake.pipeline().generate(**options)
    assert refused.value.exit_code == 2  # type: ignore[attr-defined]
    assert fake.opened == []


@pytest.mark.parametrize("name", RECIPES)
def test_the_fakes_are_legal_bundles(name: str, stand: Any) -> None:
    """What these tests stand on passes the loader's own check of a manifest."""
    check_manifest(stand(name).bundle.manifest)


def test_a_stream_is_refused_when_it_is_asked_for(stand: Any) -> None:
    """Not at its first event: a program can catch the mistake where it makes it."""
    with pytest.raises(IllegalSteps):
        stand("lcm").pipeline().stream(DrawRequest("red apple", steps=3))


@pytest.mark.parametrize("off", [None, 0.0, 1.0])
def test_no_guidance_may_be_said_in_three_ways(off: float | None, stand: Any) -> None:
    """diffusers' turbo examples say 0, the formula says 1; where a model has none, both mean none."""
    assert stand("turbo").pipeline().generate("red apple", guidance=off).used.guidance == 1.0


def test_a_given_picture_keeps_its_size_in_whole_units(stand: Any) -> None:
    """A 45 x 30 picture becomes 40 x 24 where the sample has one value per 8 pixels; asked sizes win."""
    pipeline = stand("lcm").pipeline()
    picture = Image.new("RGB", (45, 30))
    assert pipeline.generate("pear", image=picture).images[0].size == (40, 24)
    assert pipeline.generate("pear", image=picture, width=16, height=32).images[0].size == (16, 32)


def test_a_fixed_input_of_an_upscaler_is_kept(tmp_path: Path) -> None:
    """An upscaler exported for one size says which."""
    recipe = RECIPES["upscaler"]()
    stage = msgspec.structs.replace(recipe.stages[0], init=Init("input", width=20, height=20, fixed_size=True))
    with pytest.raises(BadRequest, match="20 x 20"):
        studio(tmp_path, Recipe((stage,))).pipeline().generate(image=PICTURE)


def test_a_first_stage_cannot_start_from_what_came_before_it() -> None:
    """Nothing came before the first stage, and the contract says so by its name."""
    draw = lcm_like().stages[0]
    previous = msgspec.structs.replace(draw, init=Init("previous"))
    with pytest.raises(BadManifest, match="draw"):
        Contract.of(Recipe((previous, UPSCALE)))


def test_an_image_model_does_not_open_a_language_bundle(tmp_path: Path) -> None:
    """Without a recipe there is nothing to draw by."""
    manifest = msgspec.structs.replace(studio(tmp_path, lcm_like()).bundle.manifest, recipe=None, tables=())
    with pytest.raises(BadManifest, match="recipe"):
        studio(tmp_path, lcm_like(), manifest).pipeline()
