"""What drawing gives: an event per row, and at the end pictures, a video, sound or arrays, and how to redraw."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgekit.errors import BadManifest, BadRequest, SessionFailed
from edgekit.runtime.diffusion.contract import Contract
from edgekit.runtime.diffusion.image import to_images
from edgekit.runtime.diffusion.media import save_array, save_audio, save_picture, save_video
from edgekit.runtime.diffusion.request import Settled

F32 = npt.NDArray[np.float32]
Video = tuple[Image.Image, ...]


@dataclass(frozen=True, eq=False)
class StepEvent:
    """Row number `row` of `of` rows of a stage is done: at timestep `t`, after `seconds`.

    `clean` is the present estimate of the finished sample, (batch, ...), `x` the sample itself. `preview()` decodes the
    estimate by the small decoder where there is one; it costs time only when it is called.
    """

    stage: str
    row: int
    of: int
    t: float
    seconds: float
    clean: npt.NDArray[Any] = field(repr=False)
    x: npt.NDArray[Any] = field(repr=False)
    _decode: Callable[[npt.NDArray[Any]], npt.NDArray[Any]] = field(repr=False)

    def preview(self) -> tuple[Image.Image, ...]:
        """The estimate as pictures, one per sample (of a video, its middle frame); empty where it is no picture.

        Raises:
            SessionFailed: the decoder refused.
        """
        pictures = self._decode(self.clean)
        if pictures.ndim == 5:
            pictures = pictures[:, pictures.shape[1] // 2]
        if pictures.ndim != 4 or pictures.shape[1] not in (1, 3) or pictures.dtype.kind != "f":
            return ()
        return to_images(np.nan_to_num(pictures))


@dataclass(frozen=True)
class DrawStats:
    """Wall seconds in all, and of each part: running it, opening it; and how often it ran."""

    seconds: float
    parts: dict[str, float]
    opening: dict[str, float]
    runs: dict[str, int]


@dataclass(frozen=True, eq=False)
class DrawResult:
    """What was drawn, the samples it was decoded from (None where nothing was sampled), and how it went.

    One of `images`, `videos` (frames each, at `rate` a second), `audio` ((batch, channels, samples) in [-1, 1], at
    `rate` a second) and `arrays` is there, as the recipe's media says. `used` is the request with every choice made;
    `source` says of which bundle, and what else went in.
    """

    images: tuple[Image.Image, ...]
    latents: npt.NDArray[Any] | None
    stats: DrawStats
    used: Settled
    source: dict[str, Any]
    videos: tuple[Video, ...] = ()
    audio: F32 | None = None
    arrays: npt.NDArray[Any] | None = None
    rate: float = 0.0

    def __len__(self) -> int:
        """How many were drawn."""
        return self.used.batch

    @property
    def metadata(self) -> dict[str, Any]:
        """Bundle, prompt, options, sampler, hashes of given arrays: the same request on the same bundle draws this."""
        return {**self.source, **asdict(self.used)}

    def save(self, path: str | os.PathLike[str], number: int = 0) -> Path:
        """Write number `number` in the format of the suffix, with `metadata` and its own number inside if it can.

        Pictures: .png, .webp, .jpg; videos: .gif, .webp, .png (animated), .mp4 (with edgekit[video]); sound: .wav;
        arrays: .npy.

        Raises:
            BadRequest: the folder does not exist, or a suffix this cannot be written as. MissingPackage: mp4 without
                PyAV. OSError: it cannot be written.
        """
        told = {**self.metadata, "image": self.used.first_image + number}
        if self.videos:
            save_video(self.videos[number], self.rate, path, told)
        elif self.audio is not None:
            save_audio(self.audio[number], round(self.rate), path, told)
        elif self.arrays is not None:
            save_array(self.arrays[number], path)
        elif self.images:
            save_picture(self.images[number], path, told)
        else:
            raise BadRequest("nothing was drawn")
        return Path(path)


def presented(
    x: npt.NDArray[Any],
    latents: npt.NDArray[Any] | None,
    contract: Contract,
    stats: DrawStats,
    used: Settled,
    source: dict[str, Any],
) -> DrawResult:
    """The last stage's answer as the recipe's media says.

    Raises:
        BadManifest: it has another shape than that media. SessionFailed: a value that is not finite.
    """
    media = contract.recipe.media
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise SessionFailed("the network drew values that are not finite; a float16 part may overflow, try float32")
    found: dict[str, Any] = {"images": ()}
    if media.kind == "array":
        found["arrays"] = x
    elif media.kind == "audio":
        found["audio"] = _sound(x, used, media.rate)
    elif media.kind == "video":
        if x.ndim != 5:
            raise BadManifest(
                f"the recipe ends in shape {x.shape}; a video is (batch, frames, channels, height, width)"
            )
        found["videos"] = tuple(to_images(one) for one in x)
    else:
        if x.shape[2:] != (used.height, used.width):
            raise BadManifest(
                f"the last stage drew {' x '.join(map(str, x.shape[:1:-1]))} pixels; by the recipe they are "
                f"{used.width} x {used.height}: check `downscale` and `upscale`"
            )
        found["images"] = to_images(x)
    return DrawResult(latents=latents, stats=stats, used=used, source=source, rate=media.rate, **found)


def _sound(x: npt.NDArray[Any], used: Settled, rate: float) -> F32:
    """(batch, channels, samples), cut to the seconds asked for."""
    wave = x[:, None] if x.ndim == 2 else x
    if wave.ndim != 3:
        raise BadManifest(f"the recipe ends in shape {x.shape}; sound is (batch, channels, samples)")
    wanted = round((used.seconds or 0) * rate) or wave.shape[-1]
    return np.asarray(wave[..., :wanted], np.float32)
