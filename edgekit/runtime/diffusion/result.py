"""What drawing gives: an event per row, and at the end the pictures with all it takes to draw them again."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgekit.runtime.diffusion.image import save_png
from edgekit.runtime.diffusion.request import Settled

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class StepEvent:
    """Row number `row` of `of` rows of a stage is done: at timestep `t`, after `seconds`.

    `clean` is the present estimate of the finished sample, (batch, channels, height, width): what a preview shows.
    """

    stage: str
    row: int
    of: int
    t: float
    seconds: float
    clean: F32 = field(repr=False)


@dataclass(frozen=True)
class ImageStats:
    """Wall seconds in all, and of each part: running it, opening it; and how often it ran."""

    seconds: float
    parts: dict[str, float]
    opening: dict[str, float]
    runs: dict[str, int]


@dataclass(frozen=True, eq=False)
class ImageResult:
    """Finished pictures, the samples they were decoded from (None where nothing was sampled), and how it went.

    `used` is the request with every choice made; `source` says of which bundle, and what else went in.
    """

    images: tuple[Image.Image, ...]
    latents: F32 | None
    stats: ImageStats
    used: Settled
    source: dict[str, Any]

    @property
    def metadata(self) -> dict[str, Any]:
        """Bundle, prompt, options, sampler, hashes of given arrays: the same request on the same bundle draws this."""
        return {**self.source, **asdict(self.used)}

    def save(self, path: str | os.PathLike[str], number: int = 0) -> Path:
        """Write picture `number` as PNG, with `metadata` and its own number in the batch inside.

        Raises:
            BadRequest: the folder does not exist. OSError: it cannot be written.
        """
        save_png(self.images[number], path, {**self.metadata, "image": self.used.first_image + number})
        return Path(path)
