"""Pictures in and out: arrays in [-1, 1] on the inside, 8-bit images and PNG files on the outside."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from edgekit.bundle.files import write_atomically
from edgekit.errors import BadManifest, BadRequest, SessionFailed

F32 = npt.NDArray[np.float32]

METADATA_KEY = "edgekit"  # of the PNG text chunk


def to_images(pictures: F32) -> tuple[Image.Image, ...]:
    """(batch, 3 or 1, height, width) in [-1, 1] to 8-bit images, rounded as diffusers rounds.

    Raises:
        SessionFailed: a value that is not finite. BadManifest: another number of channels.
    """
    if not np.isfinite(pictures).all():
        raise SessionFailed("the network drew values that are not finite; a float16 part may overflow, try float32")
    unit = np.clip(pictures * np.float32(0.5) + np.float32(0.5), 0, 1).transpose(0, 2, 3, 1)
    pixels = (unit * np.float32(255)).round().astype(np.uint8)
    if pixels.shape[-1] not in (1, 3):
        raise BadManifest(f"the recipe ends in {pixels.shape[-1]} channels; a picture has 1 or 3: is `decode` missing?")
    return tuple(Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in pixels)


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture file. Raises BadRequest: it is missing, unreadable or no picture."""
    try:
        with Image.open(path) as image:
            picture: Image.Image = image.copy()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as why:
        raise BadRequest(f"cannot read the picture {path}: {why}") from why
    return picture


def from_image(image: Image.Image, size: tuple[int, int] | None = None) -> F32:
    """An image, upright, as (1, 3, height, width) in [-1, 1]; resized to `size` (width, height) by Lanczos if given."""
    upright = ImageOps.exif_transpose(image).convert("RGB")
    if size is not None and upright.size != size:
        upright = upright.resize(size, Image.Resampling.LANCZOS)
    unit = np.asarray(upright, np.uint8).astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(2 * unit.transpose(2, 0, 1)[None] - 1)


def middle_square(image: Image.Image, side: int) -> F32:
    """The middle of an image as (1, 3, side, side) in [0, 1], as CLIP looks at it: its shorter side is made `side` by
    cubic interpolation in eight bits, the longer one in proportion, rounded down, and cut."""
    upright = ImageOps.exif_transpose(image).convert("RGB")
    width, height = (side * each // min(upright.size) for each in upright.size)
    sized = upright.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    cut = np.asarray(sized.crop((left, top, left + side, top + side)), np.uint8)
    return np.ascontiguousarray(cut.astype(np.float32).transpose(2, 0, 1)[None] / np.float32(255))


def save_png(image: Image.Image, path: str | os.PathLike[str], metadata: Mapping[str, Any]) -> None:
    """Write a PNG that says how it was made: `metadata` as JSON in an iTXt chunk. The file appears whole or not at all.

    Raises:
        BadRequest: the folder does not exist. OSError: it cannot be written.
    """
    info = PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps(metadata, ensure_ascii=False, sort_keys=True))
    content = io.BytesIO()
    image.save(content, format="PNG", pnginfo=info)
    write_atomically(Path(path), content.getvalue())


def read_png_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save_png` wrote.

    Raises:
        BadRequest: no PNG, or one without the chunk.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            text = getattr(image, "text", {})
            found: dict[str, Any] = json.loads(text[METADATA_KEY])
    except (OSError, KeyError, ValueError, SyntaxError) as why:
        raise BadRequest(f"{path} is not a PNG that edgekit wrote: {why}") from why
    return found
