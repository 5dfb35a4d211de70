"""The sample before the first row, and what is put back into it later."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgekit.bundle.recipe import Call, Init, Resize, Stage, Table
from edgekit.errors import BadManifest, BadRequest
from edgekit.runtime.backends import Array
from edgekit.runtime.diffusion.finish import scaled
from edgekit.runtime.diffusion.sources import IMAGE, Sources
from edgekit.runtime.random import NoiseSource

F32 = npt.NDArray[np.float32]
Run = Callable[[Call], dict[str, Array]]

RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}


class Started(NamedTuple):
    """The sample at the first row's noise level, the unit noise in it, and the clean part (None: pure noise)."""

    x: F32
    noise: F32 | None
    clean: F32 | None


def start(
    stage: Stage,
    table: Table,
    shape: tuple[int, ...],
    sources: Sources,
    run: Run,
    noise: NoiseSource,
    *,
    from_image: bool,
    latents: F32 | None,
    draw: int = 0,
) -> Started:
    """Where a stage of a continuous sampler begins.

    Args:
        stage, table: what it starts for.
        shape: of the sample, the batch first; an encoder decides it where one runs.
        sources: has @image or @previous where a picture is needed; @start is put there.
        run: runs a call and gives its outputs.
        noise: unit normals by draw.
        from_image: whether a `noise` start is image-to-image here.
        latents: unit noise of the caller's own.
        draw: number of the draw that the noise is.

    Raises:
        BadRequest, BadManifest: latents or an encoder's answer of another shape.
    """
    init = stage.init
    clean = _clean(stage, shape, sources, run, from_image)
    if init.kind == "noise" and init.mean is not None:
        shape = sources.images(init.mean).shape
    if clean is not None:
        shape = (shape[0], *clean.shape[1:])
        sources.put("@start", IMAGE, clean)
    if latents is not None and latents.shape != shape:
        raise BadRequest(f"latents are {latents.shape}; this request needs {shape}")
    if not table.init_scale and init.kind != "gaussian":
        assert clean is not None, "only a picture starts without noise"
        return Started(np.repeat(clean, shape[0], axis=0) if len(clean) == 1 else clean, None, clean)
    drawn = latents if latents is not None else noise.normal(shape, draw)
    if init.kind == "gaussian":
        return Started(_gaussian(init, drawn, sources), drawn, None)
    x: F32 = table.init_scale * np.asarray(drawn, np.float32)
    if clean is not None:
        x = np.asarray(table.init_keep * clean + x, np.float32)
    elif init.mean is not None:
        x = np.asarray(x + table.init_scale * sources.images(init.mean), np.float32)
    return Started(x, drawn, clean)


def _clean(stage: Stage, shape: tuple[int, ...], sources: Sources, run: Run, from_image: bool) -> F32 | None:
    """The picture a stage starts from, in the sample's own units; one for all pictures, or one each."""
    init = stage.init
    if init.kind == "noise" and not from_image:
        return None
    if init.kind in ("noise", "encode") and init.encode is None:
        raise BadManifest(f"stage {stage.name!r} starts from an encoded picture and names no encoder")
    if init.kind in ("gaussian", "mask", "random", "rigid"):
        return None
    given = "@previous" if init.kind == "previous" else "@image"
    as_given = sources.value(given) if given in sources else None
    if init.resize is not None and as_given is not None:
        sources.put(given, IMAGE, resized(as_given, init.resize))
    if init.encode is not None:
        encoded = scaled(run(init.encode), init.scale, init.shift)
        if as_given is not None:  # enlarged for the encoder alone
            sources.put(given, IMAGE, as_given)
        if init.kind == "noise" and encoded.shape[1:] != shape[1:]:
            raise BadManifest(f"the encoder gives {encoded.shape[1:]} per picture; the sample is {shape[1:]}")
        return encoded
    source = init.mean if init.kind == "input" and init.mean is not None else given
    return np.asarray(sources.value(source), np.float32)


def resized(pictures: F32, resize: Resize) -> F32:
    """(batch, channels, height, width) enlarged by `factor`, channel by channel in float32."""
    width, height = (side * resize.factor for side in (pictures.shape[3], pictures.shape[2]))
    planes: list[F32] = [
        np.asarray(Image.fromarray(plane).resize((width, height), RESAMPLING[resize.mode]), np.float32)
        for plane in np.asarray(pictures, np.float32).reshape(-1, *pictures.shape[2:])
    ]
    return np.stack(planes).reshape(*pictures.shape[:2], height, width)


def _gaussian(init: Init, drawn: F32, sources: Sources) -> F32:
    """mean + chol z, over the flat sample."""
    if init.mean is None or init.chol is None:
        raise BadManifest("a gaussian start needs `mean` and `chol`")
    flat = drawn.reshape(len(drawn), -1)
    spread = np.einsum("bij,bj->bi", sources.images(init.chol), flat)
    return np.asarray(sources.images(init.mean) + spread.reshape(drawn.shape), np.float32)


def blend(started: Started, levels: list[tuple[float, float]], mask: F32) -> Callable[[int, F32], F32]:
    """In-painting with a plain denoiser, as diffusers does it.

    Before every row but the first, and at the end, what lies outside the mask is the given picture at that row's noise
    level, with the noise the run started from.

    Args:
        started: with its clean part and noise.
        levels: (keep, add) before each row, and after the last.
        mask: 1 where to paint, (batch or 1, 1, height, width) at the sample's size.
    """
    clean, noise = started.clean, started.noise
    assert clean is not None, "in-painting starts from a picture"
    assert noise is not None, "in-painting starts from noise"

    def impose(row: int, x: F32) -> F32:
        if row == 0:
            return x
        keep, add = levels[row]
        known = keep * clean + add * noise
        return np.asarray((1 - mask) * known + mask * x, np.float32)

    return impose


def hold(fixed: F32, shape: tuple[int, ...]) -> Callable[[int, F32], F32]:
    """Entries that are known stay: `fixed` is NaN where the sample, of `shape`, is free.

    Raises:
        BadRequest: the known entries are of another shape.
    """
    if fixed.shape != shape:
        raise BadRequest(f"the known entries are {fixed.shape}; the sample is {shape}")
    known = np.isfinite(fixed)

    def impose(_: int, x: F32) -> F32:
        return np.where(known, fixed, x).astype(np.float32)

    return impose
