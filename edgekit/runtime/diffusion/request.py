"""What a person asks for, and what came of it once every choice is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgekit.errors import BadRequest
from edgekit.runtime.random import NOISE

F32 = npt.NDArray[np.float32]

LARGEST_SIDE = 65536  # pixels
LONGEST = 3600.0  # seconds


@dataclass(frozen=True, eq=False)
class DrawRequest:
    """One call of `generate`; None leaves a choice to the bundle.

    `width` and `height` are those of the finished picture, `frames` of a video, `seconds` of sound. `latents`
    replaces the initial unit noise, in the shape of the sample. `mask` is white where to paint, `control` a picture
    to follow and `control_scale` how closely, `reference` one to draw something like and `reference_scale` how
    alike. `inputs` are arrays for the recipe's @input sources, (batch, ...) or (1, ...). `first_image` is the batch
    index of the first image: image k of a batch is `batch=1, first_image=k`. `tiny` decodes by the small decoder,
    `tile` by tiles of so many pixels.
    """

    prompt: str = ""
    negative: str = ""
    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    batch: int = 1
    seed: int = 0
    seed_mode: str = "philox"
    image: Image.Image | None = None
    strength: float | None = None
    latents: F32 | None = None
    first_image: int = 0
    mask: Image.Image | None = None
    control: Image.Image | None = None
    control_scale: float | None = None
    reference: Image.Image | None = None
    reference_scale: float | None = None
    frames: int | None = None
    seconds: float | None = None
    inputs: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    tiny: bool = False
    tile: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no bundle could honour. Raises BadRequest."""
        if self.seed_mode not in NOISE:
            raise BadRequest(f"no seed mode {self.seed_mode!r}; known: {', '.join(NOISE)}")
        bounds = {"seed": (0, 2**64 - 1), "batch": (1, 2**16), "first_image": (0, 2**31)}
        bounds |= {"width": (1, LARGEST_SIDE), "height": (1, LARGEST_SIDE)}
        bounds |= {"frames": (1, 4096), "tile": (64, LARGEST_SIDE)}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise BadRequest(f"{name} is {value}; it must be from {low} to {high}")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise BadRequest(f"guidance is {self.guidance}; it must be a finite number")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise BadRequest(f"strength is {self.strength}; it must be above 0 and at most 1")
        if self.seconds is not None and not 0 < self.seconds <= LONGEST:
            raise BadRequest(f"seconds is {self.seconds}; it must be above 0 and at most {LONGEST:g}")
        for name in ("control_scale", "reference_scale"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise BadRequest(f"{name} is {value}; it must be a finite number")
        if self.latents is not None and not np.isfinite(self.latents).all():
            raise BadRequest("latents hold a value that is not finite")


@dataclass(frozen=True)
class Settled:
    """A request with every choice made: what was really used, and all it takes to draw the picture again."""

    prompt: str
    negative: str
    steps: int
    guidance: float
    width: int
    height: int
    batch: int
    seed: int
    seed_mode: str
    strength: float | None
    first_image: int
    frames: int | None = None
    seconds: float | None = None
    control_scale: float | None = None
    reference_scale: float | None = None
    inpaint: bool = False
    tiny: bool = False
    tile: int | None = None
