"""Which folder is which family, what its recipe says, and what is refused by name: from configs alone."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from edgekit.errors import BadSource, EdgekitError, IllegalSteps, UnknownFamily, UnsupportedModel
from edgekit.export.families import FAMILIES, family_of, named_family
from edgekit.export.families.export import DiffusionOptions, plan_diffusion
from edgekit.export.sources import Source, read_source
from tests.export.diffusion.tiny_pipelines import FAMILY_OF, FOREIGN, PIPELINES

pytestmark = FOREIGN

Folders = dict[str, tuple[Any, Path]]
EMOJI = Path(__file__).parents[3] / "models" / "emoji"


def edited(folder: Path, to: Path, changes: dict[str, dict[str, Any]]) -> Path:
    """A copy of a model folder with some fields of some JSON files changed."""
    shutil.copytree(folder, to)
    for file, fields in changes.items():
        value = json.loads((to / file).read_text())
        (to / file).write_text(json.dumps({**value, **fields}))
    return to


@pytest.mark.parametrize("name", PIPELINES)
def test_a_family_is_known_by_its_index_and_scheduler(folders: Folders, tmp_path: Path, name: str) -> None:
    """The folder's own name does not count: the same files elsewhere are the same family."""
    elsewhere = shutil.copytree(folders[name][1], tmp_path / "sd-turbo-lcm-emoji")
    assert family_of(read_source(elsewhere)).name == FAMILY_OF[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_a_module_that_names_itself(name: str) -> None:
    """A row of FAMILIES leads to a family of that name, which claims no folder that says nothing."""
    family = named_family(name)
    assert family.name == name
    assert not family.claims(Source(Path(), "diffusion", {}))


def test_the_recipe_of_a_latent_consistency_model(folders: Folders) -> None:
    """Steps, grid, guidance embedding and scales come from the folder's configs."""
    source = read_source(folders["lcm"][1])
    (stage,) = family_of(source).recipe(source).stages
    assert stage.sampler.kind == "lcm"
    assert (stage.sampler.steps, stage.sampler.legal_steps) == (4, (1, 2, 3, 4, 5, 6, 7, 8))
    assert stage.sampler.grid is not None
    assert stage.sampler.grid.original == 50
    assert (stage.guidance.kind, stage.guidance.scale, stage.guidance.dim) == ("w_embedding", 8.5, 32)
    assert stage.denoise.feeds["timestep_cond"] == "@w_embedding"
    assert stage.decode is not None
    assert (stage.init.downscale, stage.init.scale, stage.decode.scale) == (2, 0.18215, 0.18215)


def test_the_recipes_of_the_turbo_models(folders: Folders) -> None:
    """One to four Euler steps without guidance; SDXL's pooled text and sizes are fed."""
    for name, kind in (("sd-turbo", "euler"), ("sdxl-turbo", "euler_ancestral")):
        source = read_source(folders[name][1])
        (stage,) = family_of(source).recipe(source).stages
        assert (stage.sampler.kind, stage.sampler.steps, stage.sampler.legal_steps) == (kind, 1, (1, 2, 3, 4))
        assert stage.guidance.kind == "none"
    assert stage.denoise.feeds["text_embeds"] == "text_encoder_2.text_embeds"
    assert stage.denoise.feeds["time_ids"] == "@time_ids"


def test_the_recipe_of_the_emoji_model() -> None:
    """A base stage of pixels folded two by two, then an upscaler by four."""
    source = read_source(EMOJI)
    base, upscale = family_of(source).recipe(source).stages
    assert (base.sampler.kind, base.sampler.prediction, base.sampler.legal_steps) == (
        "flow_stochastic",
        "flow",
        (1, 2, 4, 8),
    )
    assert (base.init.channels, base.init.downscale, base.init.width, base.init.fixed_size) == (12, 2, 32, True)
    assert (base.guidance.kind, base.guidance.dim) == ("w_embedding", 64)
    assert (upscale.sampler.kind, upscale.upscale, upscale.denoise.feeds) == ("direct", 4, {"image": "@previous"})


def test_a_plain_unet_with_the_lcm_scheduler_is_guided_by_two_passes(folders: Folders, tmp_path: Path) -> None:
    """LCM-LoRA models have no guidance embedding: classifier-free guidance up to 2, none by default."""
    index = {"scheduler": ["diffusers", "LCMScheduler"]}
    scheduler = {"_class_name": "LCMScheduler", "timestep_spacing": "leading"}
    changes = {"model_index.json": index, "scheduler/scheduler_config.json": scheduler}
    source = read_source(edited(folders["sd-turbo"][1], tmp_path / "m", changes))
    guidance = family_of(source).recipe(source).stages[0].guidance
    assert (guidance.kind, guidance.scale, guidance.maximum) == ("cfg", 1.0, 2.0)


REFUSALS = {
    "another spacing of sigmas": ("sd-turbo", "scheduler/scheduler_config.json", "use_karras_sigmas", True),
    "dynamic thresholding": ("lcm", "scheduler/scheduler_config.json", "thresholding", True),
    "betas given one by one": ("lcm", "scheduler/scheduler_config.json", "trained_betas", [0.1, 0.2]),
    "a class label": ("lcm", "unet/config.json", "class_embed_type", "timestep"),
    "an image-conditioned unet": ("lcm", "unet/config.json", "addition_embed_type", "image"),
    "gated attention": ("sd-turbo", "unet/config.json", "attention_type", "gated"),
    "editing channels": ("sd-turbo", "unet/config.json", "in_channels", 8),
    "a refiner": ("sdxl-turbo", "model_index.json", "requires_aesthetics_score", True),
    "a guidance embedding under Euler": ("sd-turbo", "unet/config.json", "time_cond_proj_dim", 32),
    "no guidance embedding": ("lcm", "unet/config.json", "time_cond_proj_dim", None),
    "another text width": ("lcm", "unet/config.json", "cross_attention_dim", 48),
    "a masked text encoder": ("lcm", "text_encoder/config.json", "use_attention_mask", True),
    "latents with their own mean": ("lcm", "vae/config.json", "latents_mean", [0.0, 0.0, 0.0, 0.0]),
    "more latent channels": ("lcm", "vae/config.json", "latent_channels", 16),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_is_not_modelled_is_refused_by_name(folders: Folders, tmp_path: Path, what: str) -> None:
    """A field with a value no graph or recipe here expresses is named in the error, not approximated."""
    name, file, field, value = REFUSALS[what]
    source = read_source(edited(folders[name][1], tmp_path / "m", {file: {field: value}}))
    family = family_of(source)
    words = {"in_channels": "channels", "latent_channels": "latent channels"}.get(field, field)
    words = "text states" if field == "cross_attention_dim" else words
    with pytest.raises(UnsupportedModel, match=words):
        (family.recipe(source), family.jobs(source))


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("text_encoder", "T5EncoderModel"),
        ("vae", "AsymmetricAutoencoderKL"),
        ("unet", "UNetSpatioTemporalConditionModel"),
    ],
)
def test_another_class_of_component_is_refused_by_name(folders: Folders, tmp_path: Path, part: str, kind: str) -> None:
    """A component of a class without a graph here is named."""
    changes = {"model_index.json": {part: ["diffusers", kind]}}
    source = read_source(edited(folders["lcm"][1], tmp_path / "m", changes))
    with pytest.raises(UnsupportedModel, match=kind):
        plan_diffusion(source, DiffusionOptions())


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": "KandinskyPipeline"},
        {"scheduler": ["diffusers", "PNDMScheduler"]},
    ],
    ids=["pipeline", "scheduler"],
)
def test_an_unknown_pipeline_is_told_what_is_known(folders: Folders, tmp_path: Path, changes: dict[str, Any]) -> None:
    """The error lists every family."""
    source = read_source(edited(folders["lcm"][1], tmp_path / "m", {"model_index.json": changes}))
    with pytest.raises(UnknownFamily) as caught:
        family_of(source)
    assert all(name in str(caught.value) for name in FAMILIES)


def test_euler_on_the_grid_of_an_undistilled_model_is_no_turbo(folders: Folders, tmp_path: Path) -> None:
    """Only a trailing grid makes an Euler folder SD-Turbo: others would start a one-step sample below full noise."""
    changes = {"scheduler/scheduler_config.json": {"timestep_spacing": "leading"}}
    with pytest.raises(UnknownFamily):
        family_of(read_source(edited(folders["sd-turbo"][1], tmp_path / "m", changes)))


@pytest.mark.parametrize("name", ["nonsense", "emoji"])
def test_a_family_asked_for_by_name_must_fit(folders: Folders, name: str) -> None:
    """A name in --family is a claim that is checked, not an order."""
    with pytest.raises(UnknownFamily, match=name):
        family_of(read_source(folders["lcm"][1]), name)


def test_the_default_step_count_can_be_moved_within_the_contract(folders: Folders) -> None:
    """--steps picks another legal default; a count the model was not distilled for is refused with the legal ones."""
    source = read_source(folders["sd-turbo"][1])
    plan_diffusion(source, DiffusionOptions(steps=2))
    with pytest.raises(IllegalSteps, match="1, 2, 3, 4"):
        plan_diffusion(source, DiffusionOptions(steps=50))


def test_other_precisions_are_refused_with_advice() -> None:
    """An image model is exported in fp32; the refusal says what to do."""
    with pytest.raises(EdgekitError, match="Export fp32"):
        DiffusionOptions(precision="fp16")


def test_a_plan_reads_no_weight(folders: Folders) -> None:
    """Parts, shapes and bytes come from configs and headers: right to the byte, with axes by name."""
    pipeline, folder = folders["sdxl-turbo"]
    plan = plan_diffusion(read_source(folder), DiffusionOptions())
    parts = {part.name: part for part in plan.parts}
    assert parts["unet"].parameters == sum(p.numel() for p in pipeline.unet.parameters())
    assert parts["vae_decoder"].parameters == sum(
        p.numel() for module in (pipeline.vae.decoder, pipeline.vae.post_quant_conv) for p in module.parameters()
    )
    assert parts["unet"].inputs[0].shape == ("batch", 4, "height", "width")
    assert plan.disk_bytes == 4 * sum(part.parameters for part in plan.parts)
    assert plan.peak_bytes > max(part.bytes for part in plan.parts)


def test_a_plan_needs_no_torch() -> None:
    """Planning imports neither torch nor what imports it."""
    import subprocess

    code = (
        "import sys; from pathlib import Path; from edgekit.export.sources import read_source;"
        "from edgekit.export.families.export import *;"
        f"plan_diffusion(read_source(Path({str(EMOJI)!r})), DiffusionOptions());"
        "sys.exit(bool({'torch', 'transformers', 'diffusers', 'onnx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=EMOJI.parents[1], check=False).returncode == 0


def test_a_missing_component_is_named(folders: Folders, tmp_path: Path) -> None:
    """An index without a vae, and a folder without its weights, are incomplete sources."""
    index = edited(folders["lcm"][1], tmp_path / "a", {"model_index.json": {"vae": [None, None]}})
    with pytest.raises((BadSource, UnsupportedModel), match="vae"):
        plan_diffusion(read_source(index), DiffusionOptions())
    bare = shutil.copytree(folders["lcm"][1], tmp_path / "b")
    (bare / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BadSource, match="unet"):
        plan_diffusion(read_source(bare), DiffusionOptions())
