"""Pictures, videos, sound and arrays as files: each appears whole or not at all."""

from __future__ import annotations

import io
import json
import os
import wave
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from edgekit.bundle.files import write_atomically
from edgekit.errors import BadRequest, MissingPackage
from edgekit.runtime.diffusion.image import METADATA_KEY, save_png

PICTURES = (".png", ".webp", ".jpg", ".jpeg")
VIDEOS = (".gif", ".webp", ".png", ".mp4")
SOUNDS = (".wav",)
ARRAYS = (".npy",)


def save_picture(image: Image.Image, path: str | os.PathLike[str], metadata: Mapping[str, Any]) -> None:
    """PNG with `metadata` inside, or lossless WebP, or JPEG (both carry it as EXIF's user comment).

    Raises:
        BadRequest: another suffix, or the folder does not exist. OSError: it cannot be written.
    """
    suffix = checked(path, PICTURES, "a picture")
    if suffix == ".png":
        save_png(image, path, metadata)
        return
    exif = Image.Exif()
    exif[0x9286] = json.dumps(metadata, ensure_ascii=True, sort_keys=True)
    options: dict[str, Any] = {"lossless": True} if suffix == ".webp" else {"quality": 95}
    content = io.BytesIO()
    image.save(content, format="WEBP" if suffix == ".webp" else "JPEG", exif=exif.tobytes(), **options)
    write_atomically(Path(path), content.getvalue())


def save_video(
    frames: Sequence[Image.Image], rate: float, path: str | os.PathLike[str], metadata: Mapping[str, Any]
) -> None:
    """Frames as GIF, animated WebP or PNG by Pillow, or H.264 in MP4 by PyAV.

    Raises:
        BadRequest: another suffix, or the folder does not exist. MissingPackage: MP4 without PyAV.
    """
    suffix = checked(path, VIDEOS, "a video")
    if suffix == ".mp4":
        write_atomically(Path(path), _mp4(frames, rate))
        return
    first, *rest = frames
    content = io.BytesIO()
    options: dict[str, Any] = {"save_all": True, "append_images": rest, "duration": 1000 / rate, "loop": 0}
    if suffix == ".webp":
        options |= {"lossless": True}
    elif suffix == ".png":
        info = PngInfo()
        info.add_itxt(METADATA_KEY, json.dumps(metadata, ensure_ascii=False, sort_keys=True))
        options |= {"pnginfo": info}
    first.save(content, format={".gif": "GIF", ".webp": "WEBP", ".png": "PNG"}[suffix], **options)
    write_atomically(Path(path), content.getvalue())


def _mp4(frames: Sequence[Image.Image], rate: float) -> bytes:
    """H.264 in yuv420p, which every player takes: odd sides lose a pixel."""
    try:
        import av
    except ImportError as why:
        raise MissingPackage(
            "writing mp4 needs PyAV; install edgekit[video], or name the output .gif or .webp"
        ) from why
    content = io.BytesIO()
    width, height = (side // 2 * 2 for side in frames[0].size)
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "18"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.asarray(frame.convert("RGB"))[:height, :width], format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return content.getvalue()


def save_audio(
    sound: npt.NDArray[np.float32],
    rate: int,
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],  # noqa: ARG001 - WAV has no room that players agree on
) -> None:
    """(channels, samples) in [-1, 1] as 16-bit PCM WAV.

    Raises:
        BadRequest: another suffix, or the folder does not exist.
    """
    checked(path, SOUNDS, "sound")
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(sound.shape[0])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(sound.T, -1, 1) * 32767).round().astype("<i2").tobytes())
    write_atomically(Path(path), content.getvalue())


def save_array(array: npt.NDArray[Any], path: str | os.PathLike[str]) -> None:
    """One array as .npy. Raises BadRequest: another suffix, or the folder does not exist."""
    checked(path, ARRAYS, "an array")
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    write_atomically(Path(path), content.getvalue())


def checked(path: str | os.PathLike[str], suffixes: Sequence[str], what: str) -> str:
    """The suffix of a path, in lower case. Raises BadRequest where it is none of `suffixes`."""
    suffix = Path(path).suffix.lower()
    if suffix not in suffixes:
        raise BadRequest(f"{path}: {what} is written as {', '.join(suffixes)}; choose one of these endings")
    return suffix


def grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """A contact sheet: pictures of one size, row by row, as square as they go."""
    across = columns or int(np.ceil(np.sqrt(len(images))))
    down = -(-len(images) // across)
    width, height = images[0].size
    size = (across * width + gap * (across - 1), down * height + gap * (down - 1))
    sheet = Image.new("RGB", size, "white")
    for number, image in enumerate(images):
        row, column = divmod(number, across)
        sheet.paste(image.convert("RGB"), (column * (width + gap), row * (height + gap)))
    return sheet
