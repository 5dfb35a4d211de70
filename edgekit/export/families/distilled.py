"""A LoRA that distils a model changes how it is sampled, while the folder still says how the base model is.

LCM-LoRA, TCD, Hyper-SD, SDXL-Lightning and DMD2 come as LoRA files for an unchanged base. With `--lora` and `--family`
the folder is read as if its scheduler were the family's, on the base's own noise schedule, as
`Scheduler.from_config(base.config)` would make it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgekit.export.families import named_family
from edgekit.export.sources import Source

# Schedulers of undistilled models, all of which add noise on the same kind of schedule, and whose defaults are these.
BASES = (
    "PNDMScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "clip_sample_range": 1.0,
    "thresholding": False,
}
CLIPPING = ("DDIMScheduler", "DDPMScheduler")  # clip where their config says nothing; no other base does


@dataclass(frozen=True)
class Rescheduled(Source):
    """A model folder whose scheduler is another than the one saved in it."""

    scheduler: Mapping[str, Any] = field(default_factory=dict)

    def config(self, component: str, name: str = "config.json") -> dict[str, Any]:
        """As Source, but for the scheduler. Raises BadSource."""
        return dict(self.scheduler) if component == "scheduler" else super().config(component, name)


def distilled(source: Source, name: str | None) -> Source:
    """The folder under a family's scheduler, where it has a base model's and the family has LoRAs; else as it is.

    Args:
        source: a base model's folder, onto which a LoRA will be folded.
        name: the family that was asked for.

    Raises:
        UnknownFamily: no family has this name. BadSource: the scheduler's config cannot be read.
    """
    kind = source.class_of("scheduler")
    family = named_family(name) if name is not None else None
    if family is None or family.distils is None or kind not in BASES or family.claims(source):
        return source
    base = source.config("scheduler", "scheduler_config.json")
    kept = {field: base.get(field, default) for field, default in SCHEDULE.items()}
    kept["clip_sample"] = base.get("clip_sample", kind in CLIPPING)
    kept["set_alpha_to_one"] = base.get("set_alpha_to_one", True)
    scheduler = {**kept, **family.distils}
    index = {**source.index, "scheduler": ["diffusers", scheduler["_class_name"]]}
    return Rescheduled(source.root, source.kind, index, source.weights, scheduler)
