"""Which few-step contract a folder has by its scheduler, by name, and by a LoRA on a base model; from configs alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from edgekit.errors import UnknownFamily, UnsupportedModel
from edgekit.export.families import Family, family_of
from edgekit.export.families.distilled import BASES, distilled
from edgekit.export.families.export import DiffusionOptions, plan_diffusion
from edgekit.export.sources import Source, read_source
from edgekit.export.worker import Lora
from tests.export.diffusion.tiny_pipelines import BETAS, FOREIGN

pytestmark = FOREIGN

Folders = dict[str, tuple[Any, Path]]
TRAILING = {"timestep_spacing": "trailing"}
V_ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def under(folder: Path, to: Path, scheduler: Any) -> Source:
    """A copy of a folder with another scheduler."""
    shutil.copytree(folder, to)
    scheduler.save_pretrained(to / "scheduler")
    index = json.loads((to / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (to / "model_index.json").write_text(json.dumps(index))
    return read_source(to)


SCHEDULERS = {
    "tcd": ("sd-turbo", "TCDScheduler", {}, "tcd", (1, 2, 3, 4, 5, 6, 7, 8), 4),
    "hyper-sd": ("sdxl-turbo", "DDIMScheduler", TRAILING, "hyper-sd", (1, 2, 4, 8, 12, 16), 4),
    "zero-snr": ("sd-turbo", "DDIMScheduler", TRAILING | V_ZERO, "zero-snr", (5, 10, 15, 20, 25, 30, 40, 50), 25),
    "turbo": ("sd-turbo", "EulerDiscreteScheduler", TRAILING, "turbo", (1, 2, 3, 4), 1),
    "lightning": ("sdxl-turbo", "EulerDiscreteScheduler", TRAILING, "lightning", (1, 2, 4, 8), 4),
    "one-step lightning": (
        "sdxl-turbo",
        "EulerDiscreteScheduler",
        TRAILING | {"prediction_type": "sample"},
        "lightning",
        (1,),
        1,
    ),
}


@pytest.mark.parametrize("what", SCHEDULERS)
def test_a_scheduler_tells_the_family(folders: Folders, tmp_path: Path, what: str) -> None:
    """Class, grid and prediction of the saved scheduler decide the family, its step counts and its default."""
    name, kind, fields, family, legal, steps = SCHEDULERS[what]
    source = under(folders[name][1], tmp_path / "m", getattr(diffusers, kind)(**BETAS, **fields))
    found = family_of(source)
    (stage,) = found.recipe(source).stages
    assert found.name == family
    assert (stage.sampler.legal_steps, stage.sampler.steps) == (legal, steps)
    assert stage.sampler.prediction == fields.get("prediction_type", "epsilon")


def test_zero_terminal_snr_comes_with_rescaled_guidance(folders: Folders, tmp_path: Path) -> None:
    """The schedule, the guidance and its rescaling are the paper's; a prediction that is undefined there is refused."""
    scheduler = diffusers.DDIMScheduler(**BETAS, **TRAILING, **V_ZERO)
    source = under(folders["sd-turbo"][1], tmp_path / "m", scheduler)
    (stage,) = family_of(source).recipe(source).stages
    assert stage.sampler.noise_schedule is not None
    assert stage.sampler.noise_schedule.zero_snr
    assert (stage.guidance.scale, stage.guidance.rescale) == (7.5, 0.7)
    wrong = diffusers.DDIMScheduler(**BETAS, **TRAILING, rescale_betas_zero_snr=True)
    source = under(folders["sd-turbo"][1], tmp_path / "w", wrong)
    with pytest.raises(UnsupportedModel, match="prediction_type is 'epsilon'"):
        family_of(source).recipe(source)


def test_names_tell_apart_what_a_folder_cannot(folders: Folders, tmp_path: Path) -> None:
    """The same folder is TCD, or Hyper-SD's unified LoRA; LCM, or DMD2 at its own timesteps; SDXL-Turbo, if asked."""
    tcd = under(folders["sd-turbo"][1], tmp_path / "tcd", diffusers.TCDScheduler(**BETAS))
    lcm = under(folders["sdxl-turbo"][1], tmp_path / "lcm", diffusers.LCMScheduler(**BETAS))
    euler = under(folders["sdxl-turbo"][1], tmp_path / "euler", diffusers.EulerDiscreteScheduler(**BETAS, **TRAILING))
    assert sampler(tcd, None).gamma == 0.3
    assert sampler(tcd, "hyper-sd-unified").gamma == 1.0
    assert sampler(lcm, None).timesteps is None
    assert sampler(lcm, "dmd2").timesteps == (999.0, 749.0, 499.0, 249.0)
    assert sampler(euler, "turbo").legal_steps == (1, 2, 3, 4)


def sampler(source: Source, name: str | None) -> Any:
    """The sampler of the only stage of a folder's recipe."""
    return family_of(source, name).recipe(source).stages[0].sampler


@pytest.mark.parametrize("kind", ["RectifiedFlowPipeline", "StableDiffusionPipeline"])
def test_instaflow_is_its_own_pipeline_or_is_asked_for(folders: Folders, tmp_path: Path, kind: str) -> None:
    """A flow of the opposite sign, whatever scheduler lies beside it."""
    source = under(folders["sd-turbo"][1], tmp_path / "m", diffusers.PNDMScheduler(**BETAS))
    source.index["_class_name"] = kind
    asked = None if kind == "RectifiedFlowPipeline" else "instaflow"
    found = sampler(source, asked)
    assert (found.kind, found.sign, found.prediction, found.steps) == ("flow_euler", -1, "flow", 1)


BASE = {"beta_start": 0.0009, "beta_end": 0.013, "beta_schedule": "scaled_linear"}
FAMILIES_OF_LORAS = ("lcm", "tcd", "hyper-sd", "hyper-sd-unified", "lightning", "dmd2")


@pytest.mark.parametrize("base", ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("name", FAMILIES_OF_LORAS)
def test_a_lora_brings_its_scheduler_to_a_base_model(folders: Folders, tmp_path: Path, base: str, name: str) -> None:
    """The base's betas and prediction type under the family's sampler, as diffusers' `from_config` would have it."""
    kind = getattr(diffusers, base)
    source = under(folders["sdxl-turbo"][1], tmp_path / "m", kind(**BASE, prediction_type="v_prediction"))
    scheduler = kind.from_pretrained(tmp_path / "m" / "scheduler")
    changed = distilled(source, name)
    family = family_of(changed, name)
    ours, distils = family.recipe(changed).stages[0].sampler, family.distils
    assert distils is not None
    theirs = getattr(diffusers, distils["_class_name"]).from_config(
        scheduler.config, **{key: value for key, value in distils.items() if key != "_class_name"}
    )
    assert ours.noise_schedule is not None
    assert {key: getattr(ours.noise_schedule, key) for key in ("beta_start", "beta_end")} == {
        key: theirs.config[key] for key in ("beta_start", "beta_end")
    }
    assert (ours.noise_schedule.kind, ours.prediction) == (theirs.config.beta_schedule, theirs.config.prediction_type)
    if name == "hyper-sd":
        assert ours.final_alpha_one == theirs.config.set_alpha_to_one
    assert changed.config("unet") == source.config("unet")


@pytest.mark.parametrize("kind", BASES)
def test_every_base_scheduler_is_one_of_diffusers(kind: str) -> None:
    """Class names have no typing errors, and none is a few-step scheduler."""
    assert hasattr(diffusers, kind)
    assert kind not in ("LCMScheduler", "TCDScheduler")


def test_a_folder_already_distilled_keeps_its_scheduler(folders: Folders) -> None:
    """A style LoRA on SD-Turbo changes no contract, nor does a LoRA without a family."""
    source = read_source(folders["sd-turbo"][1])
    assert distilled(source, None) is source
    assert distilled(source, "turbo") is source
    assert distilled(read_source(folders["lcm"][1]), "lcm").config("scheduler", "scheduler_config.json")


def test_a_base_model_without_its_lora_is_refused_with_advice(folders: Folders, tmp_path: Path) -> None:
    """--family alone distils nothing: the error says to give the LoRA too; with it, a plan is made."""
    source = under(folders["sd-turbo"][1], tmp_path / "m", diffusers.PNDMScheduler(**BETAS))
    for name in (None, "tcd"):
        with pytest.raises(UnknownFamily, match=r"--lora FILE.*--family"):
            plan_diffusion(source, DiffusionOptions(family=name))
    lora = tmp_path / "tcd.safetensors"
    keys = {
        f"unet.conv_in.lora_{side}.weight": torch.zeros(shape)
        for side, shape in (("A", (2, 4, 3, 3)), ("B", (8, 2, 1, 1)))
    }
    save_file(keys, lora)
    plan = plan_diffusion(source, DiffusionOptions(family="tcd", loras=(Lora(str(lora)),)))
    assert plan.family == "tcd"
    with pytest.raises(UnknownFamily, match="--lora FILE"):
        plan_diffusion(source, DiffusionOptions(loras=(Lora(str(lora)),)))


def test_a_family_claims_by_name_no_less_than_it_matches(folders: Folders) -> None:
    """What is found without a name is found with it."""
    for _, folder in folders.values():
        source = read_source(folder)
        family: Family = family_of(source)
        assert family_of(source, family.name) is family
