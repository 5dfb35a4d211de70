"""What the caller gives, as sources: pictures, masks, arrays, sizes, constants; and the shape of a sample."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgekit.bundle.recipe import Stage
from edgekit.errors import BadRequest
from edgekit.runtime.diffusion.contract import Contract
from edgekit.runtime.diffusion.image import from_image, middle_square
from edgekit.runtime.diffusion.request import DrawRequest, Settled
from edgekit.runtime.diffusion.sources import IMAGE, Sources

F32 = npt.NDArray[np.float32]


def put_given(sources: Sources, contract: Contract, request: DrawRequest, used: Settled) -> None:
    """Put every source that needs no network.

    Raises:
        BadRequest: a picture and its mask differ in size.
    """
    width, height = (side // contract.enlarge for side in (used.width, used.height))
    if contract.main.init.resize is not None:
        width, height = (side // contract.main.init.resize.factor for side in (width, height))
    numbers = {
        "@time_ids": [[height, width, 0, 0, height, width]],
        "@size": [[height, width]],
        "@aspect": [[height / width]],
    }
    for source, value in numbers.items():
        sources.put(source, IMAGE, np.array(value, np.float32))
    for name, row in contract.recipe.constants.items():
        sources.put(f"@const.{name}", IMAGE, np.array([row], np.float32))
    for name, array in request.inputs.items():
        sources.put(f"@input.{name}", IMAGE, array)
    if used.seconds is not None:
        sources.put("@seconds", IMAGE, np.array([used.seconds], np.float32))
    if used.control_scale is not None:
        picture = np.zeros((1, 3, height, width), np.float32)  # of which nothing is followed, at scale 0
        if request.control is not None:
            picture = from_image(request.control, (width, height)) * np.float32(0.5) + np.float32(0.5)
        sources.put("@control", IMAGE, picture)
        sources.put("@control_scale", IMAGE, np.array([used.control_scale], np.float32))
    if used.reference_scale is not None:
        sources.put("@reference_scale", IMAGE, np.array([used.reference_scale], np.float32))
    if request.image is not None:
        picture = from_image(request.image, (width, height))
        sources.put("@image", IMAGE, picture)
        if "@original" in set(contract.sources()):
            sources.put("@original", IMAGE, from_image(request.image))
        if request.mask is not None:
            _put_mask(sources, contract, request.image, request.mask, picture)


def put_reference(sources: Sources, picture: Image.Image | None, side: int) -> None:
    """The reference picture as a graph takes it; none is black, of which nothing is seen at scale 0."""
    seen = np.zeros((1, 3, side, side), np.float32) if picture is None else middle_square(picture, side)
    sources.put("@reference", IMAGE, seen)


def _put_mask(sources: Sources, contract: Contract, image: Image.Image, mask: Image.Image, picture: F32) -> None:
    """The mask at the size of the sample, and the picture without what it covers (diffusers' in-painting)."""
    if mask.size != image.size:
        raise BadRequest(f"the mask is {mask.size[0]} x {mask.size[1]}, the picture {image.size[0]} x {image.size[1]}")
    height, width = picture.shape[2:]
    grey = mask.convert("L").resize((width, height), Image.Resampling.LANCZOS)
    paint = (np.asarray(grey, np.float32) / np.float32(255) >= 0.5)[None, None].astype(np.float32)
    step = contract.main.init.downscale
    sources.put("@inpaint_mask", IMAGE, np.ascontiguousarray(paint[..., ::step, ::step]))
    sources.put("@masked_image", IMAGE, picture * (paint < 0.5))


def sample_shape(stage: Stage, contract: Contract, used: Settled, sources: Sources) -> tuple[int, ...]:
    """The shape of a stage's sample, (batch, ...): main's by the request, a later one's by the picture before it."""
    init = stage.init
    if stage is contract.main:
        width, height = used.width // contract.enlarge, used.height // contract.enlarge
    elif "@previous" in sources and sources.value("@previous").ndim == 4:
        height, width = sources.value("@previous").shape[2:]
    else:
        width, height = init.width, init.height
    length = init.length
    if used.seconds is not None and contract.recipe.media.rate:
        length = math.ceil(used.seconds * contract.recipe.media.rate / init.downscale)
        length = init.length if init.fixed_size else length
    sizes = {
        "height": height // init.downscale,
        "width": width // init.downscale,
        "frames": used.frames or init.frames,
        "length": length,
    }
    shape = init.shape or (init.channels, "height", "width")
    return (used.batch, *(sizes[axis] if isinstance(axis, str) else axis for axis in shape))
