"""Families that differ from each other by their sampler alone, against diffusers' schedulers in its own pipelines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from tests.export.diffusion.conftest import Exported
from tests.export.diffusion.rescheduled import rescheduled
from tests.export.diffusion.test_diffusers_parity import PROMPT, SEED, assert_same, in_bundle, in_torch
from tests.export.diffusion.tiny_pipelines import BETAS, FOREIGN

pytestmark = FOREIGN

NEGATIVE = "an old house"


class Case(NamedTuple):
    """A family on the graphs of a tiny pipeline, and what its contract means in diffusers' words."""

    graphs: str
    family: str
    scheduler: Callable[[], Any]
    steps: tuple[int, ...]
    guidance: float = 0.0  # 0: none
    call: Mapping[str, Any] = MappingProxyType({})  # arguments diffusers needs and a recipe says
    named: bool = False  # found by --family alone


def ddim(**changes: Any) -> Any:
    """DDIMScheduler as Hyper-SD uses it."""
    plain = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False, **BETAS}
    return diffusers.DDIMScheduler(**{**plain, **changes})


def euler(**changes: Any) -> Any:
    """EulerDiscreteScheduler as SDXL-Lightning uses it."""
    return diffusers.EulerDiscreteScheduler(timestep_spacing="trailing", **BETAS, **changes)


ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
CASES = {
    "lcm-lora": Case("sd-turbo", "lcm", lambda: diffusers.LCMScheduler(**BETAS), (1, 4), 1.5),
    "tcd": Case("sd-turbo", "tcd", lambda: diffusers.TCDScheduler(**BETAS), (1, 2, 4, 8), 2.0, {"eta": 0.3}),
    "tcd-xl": Case("sdxl-turbo", "tcd", lambda: diffusers.TCDScheduler(**BETAS), (4,), 1.5, {"eta": 0.3}),
    "hyper-sd-unified": Case(
        "sd-turbo", "hyper-sd-unified", lambda: diffusers.TCDScheduler(**BETAS), (1, 4), 0, {"eta": 1.0}, named=True
    ),
    "hyper-sd": Case("sd-turbo", "hyper-sd", ddim, (1, 2, 4, 8), 5.0),
    "hyper-sd-xl": Case("sdxl-turbo", "hyper-sd", ddim, (2,)),
    "lightning": Case("sdxl-turbo", "lightning", euler, (2, 4, 8)),
    "lightning-1": Case("sdxl-turbo", "lightning", lambda: euler(prediction_type="sample"), (1,)),
    "zero-snr": Case("sd-turbo", "zero-snr", lambda: ddim(**ZERO_SNR), (5,), 7.5, {"guidance_rescale": 0.7}),
    "dmd2": Case(
        "sdxl-turbo",
        "dmd2",
        lambda: diffusers.LCMScheduler(**BETAS),
        (4,),
        call={"timesteps": [999, 749, 499, 249]},
        named=True,
    ),
}


@pytest.fixture(scope="module")
def made(exported: Callable[[str], Exported], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """`made(case)`: the pipeline with its scheduler and the bundle of its folder, made once."""
    kept: dict[str, Exported] = {}

    def get(name: str) -> Exported:
        if name not in kept:
            case, root = CASES[name], tmp_path_factory.mktemp(name)
            kept[name] = rescheduled(
                exported(case.graphs), case.scheduler(), root, family=case.family if case.named else None
            )
        return kept[name]

    return get


def asked(case: Case, *, negative: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """The same request in our words and in diffusers'."""
    ours = {"guidance": case.guidance, "negative": negative} if case.guidance else {}
    theirs = {"guidance_scale": case.guidance, "negative_prompt": negative or None, **case.call}
    return ours, theirs


@pytest.mark.parametrize(("name", "steps"), [(name, steps) for name, case in CASES.items() for steps in case.steps])
def test_a_scheduler_draws_what_it_draws_in_diffusers(made: Callable[[str], Exported], name: str, steps: int) -> None:
    """Same seed, same steps, guidance where the family bears it: diffusers' latents and pictures."""
    case, example, size = CASES[name], made(name), {"height": 16, "width": 16}
    ours, theirs = asked(case)
    if "timesteps" in case.call:
        theirs["num_inference_steps"] = steps
    assert example.bundle.manifest.family == case.family
    assert_same(in_bundle(example, steps, **size, **ours), in_torch(example, steps, **size, **theirs))


@pytest.mark.parametrize("name", ["tcd", "tcd-xl", "hyper-sd", "zero-snr"])
def test_a_negative_prompt_pushes_away_as_in_diffusers(made: Callable[[str], Exported], name: str) -> None:
    """Two pictures of an odd size under guidance and a negative prompt; another picture than without one."""
    case, example = CASES[name], made(name)
    steps, size = case.steps[-1], {"height": 24, "width": 40}
    ours, theirs = asked(case, negative=NEGATIVE)
    expected = in_torch(example, steps, **size, num_images_per_prompt=2, **theirs)
    given = in_bundle(example, steps, **size, batch=2, **ours)
    assert_same(given, expected)
    plain = in_bundle(example, steps, **size, batch=2, **asked(case)[0])
    assert np.abs(plain[0] - given[0]).max() > 1e-3 * np.abs(given[0]).max()


@pytest.mark.parametrize(("name", "strength"), [("tcd", 0.5), ("tcd", 1.0), ("hyper-sd", 0.75), ("lightning", 0.5)])
def test_a_picture_is_redrawn_under_any_scheduler(
    made: Callable[[str], Exported], monkeypatch: pytest.MonkeyPatch, name: str, strength: float
) -> None:
    """Image-to-image enters the grid where diffusers' image-to-image pipelines do."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    case, example = CASES[name], made(name)
    steps, (ours, theirs) = case.steps[-1], asked(case)
    redraw = {
        "sd-turbo": diffusers.StableDiffusionImg2ImgPipeline,
        "sdxl-turbo": diffusers.StableDiffusionXLImg2ImgPipeline,
    }[case.graphs]
    expected = in_torch(
        replace(example, pipeline=with_components(redraw, example.pipeline)),
        steps,
        image=picture(),
        strength=strength,
        **theirs,
    )
    given = in_bundle(example, steps, image=picture(), strength=strength, **ours)
    assert_same(given, expected)


@pytest.mark.parametrize(("name", "strength"), [("tcd", 0.5), ("tcd", 1.0), ("hyper-sd", 0.5), ("lcm-lora", 1.0)])
def test_a_plain_unet_paints_inside_a_mask(made: Callable[[str], Exported], name: str, strength: float) -> None:
    """With four channels the known part is put back after every step, as diffusers' in-painting pipeline does."""
    case, example = CASES[name], made(name)
    steps, (ours, theirs) = case.steps[-1], asked(case)
    paint = with_components(diffusers.StableDiffusionInpaintPipeline, example.pipeline)
    given = {"image": picture(), "strength": strength}
    expected = in_torch(
        replace(example, pipeline=paint), steps, mask_image=mask(), height=16, width=24, **given, **theirs
    )
    assert_same(in_bundle(example, steps, mask=mask(), **given, **ours), expected)


def test_instaflow_steps_along_its_flow(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    """The pipeline its authors publish, written out: x moves by m / n at times 1000 (1 - i / n), guided or not."""
    example = rescheduled(exported("sd-turbo"), diffusers.PNDMScheduler(**BETAS), tmp_path, family="instaflow")
    pipeline = example.pipeline
    for steps, scale in ((1, 1.0), (3, 2.0)):
        positive, negative = pipeline.encode_prompt(PROMPT, "cpu", 1, do_classifier_free_guidance=True)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(SEED))
        with torch.no_grad():
            for i in range(steps):
                t = torch.full((2,), 1000 * (1 - i / steps))
                low, high = pipeline.unet(torch.cat([x, x]), t, torch.cat([negative, positive])).sample.chunk(2)
                x = x + (low + scale * (high - low)) / steps
            drawn = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample
        pictures = np.stack([np.asarray(each) for each in pipeline.image_processor.postprocess(drawn)])
        guidance = {"guidance": scale} if scale > 1 else {}
        assert_same(in_bundle(example, steps, height=16, width=16, **guidance), (x.numpy(), pictures))


def with_components(kind: Any, pipeline: Any) -> Any:
    """Another pipeline class around the same components."""
    unchecked = {} if "XL" in kind.__name__ else {"requires_safety_checker": False}
    made = kind(**pipeline.components, **unchecked)
    made.set_progress_bar_config(disable=True)
    return made


def picture() -> Image.Image:
    """16 by 24 pixels of noise."""
    return Image.fromarray(np.random.default_rng(3).integers(0, 255, (16, 24, 3), dtype=np.uint8))


def mask() -> Image.Image:
    """White where to paint: the left half, but for a strip."""
    painted = np.zeros((16, 24), np.uint8)
    painted[2:, :12] = 255
    return Image.fromarray(painted)
