"""Pictures of any size through a network of bounded memory: overlapping tiles, blended."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from edgekit.bundle.recipe import Tiles
from edgekit.errors import BadManifest

F32 = npt.NDArray[np.float32]
Box = tuple[int, int, int, int]  # top, left, bottom, right


def boxes(height: int, width: int, tiles: Tiles) -> Iterator[Box]:
    """Tiles of one size that cover (height, width), evenly spread, each overlapping the next by `overlap` or more."""
    down, across = _starts(height, tiles), _starts(width, tiles)
    for top in down:
        for left in across:
            yield top, left, min(top + tiles.size, height), min(left + tiles.size, width)


def needed(x: npt.NDArray[np.generic], tiles: Tiles | None, *, video: bool = False) -> bool:
    """Whether pictures (batch, channels, height, width) are larger than one tile; other arrays are never cut.

    With `video`, arrays of five axes are pictures too, with frames before or behind their channels.
    """
    return tiles is not None and (x.ndim == 4 or (video and x.ndim == 5)) and max(x.shape[-2:]) > tiles.size


def tiled(x: F32, tiles: Tiles, run: Callable[[Box], F32]) -> F32:
    """Run on every tile and blend: each output pixel is the weighted mean of the tiles it lies in.

    Args:
        x: what is cut, (..., height, width); only its size is looked at.
        tiles: size and overlap in pixels of x.
        run: a box to that tile's output, (..., scale * height, scale * width) with one integer scale for all.

    Raises:
        BadManifest: an output that is no whole multiple of its tile.
    """
    height, width = x.shape[-2:]
    total: F32 | None = None
    weights: F32 | None = None
    for box in boxes(height, width, tiles):
        top, left, bottom, right = box
        out = run(box)
        scale = out.shape[-1] // (right - left)
        if out.shape[-2:] != (scale * (bottom - top), scale * (right - left)) or not scale:
            raise BadManifest(
                f"a tile of {bottom - top} x {right - left} came back as {out.shape[-2]} x {out.shape[-1]}: no whole "
                f"multiple, so this network cannot be tiled"
            )
        if total is None or weights is None:
            total = np.zeros((*out.shape[:-2], scale * height, scale * width), np.float32)
            weights = np.zeros((scale * height, scale * width), np.float32)
        window = np.outer(
            _profile(bottom - top, tiles, (top > 0, bottom < height), scale),
            _profile(right - left, tiles, (left > 0, right < width), scale),
        ).astype(np.float32)
        down, across = slice(scale * top, scale * bottom), slice(scale * left, scale * right)
        total[..., down, across] += window * out
        weights[down, across] += window
    assert total is not None, "a picture has at least one tile"
    assert weights is not None, "and every tile its weights"
    return total / weights


def _starts(length: int, tiles: Tiles) -> list[int]:
    if tiles.overlap >= tiles.size:
        raise BadManifest(f"tiles of {tiles.size} cannot overlap by {tiles.overlap}")
    if length <= tiles.size:
        return [0]
    count = math.ceil((length - tiles.overlap) / (tiles.size - tiles.overlap))
    return [round(i * (length - tiles.size) / (count - 1)) for i in range(count)]


def _profile(length: int, tiles: Tiles, inner: tuple[bool, bool], scale: int) -> npt.NDArray[np.float64]:
    """Weights along one axis: 1 in the middle, falling towards the sides where another tile takes over."""
    n = scale * length
    if tiles.blend == "gaussian":
        middle = (np.arange(n) - (n - 1) / 2) / (n / 2)
        bell: npt.NDArray[np.float64] = np.exp(-(middle**2) / (2 * 0.4**2))
        return bell
    ramp = np.ones(n)
    fade = scale * tiles.overlap
    rise = (np.arange(fade) + 1) / (fade + 1)
    if inner[0]:
        ramp[:fade] = np.minimum(ramp[:fade], rise)
    if inner[1]:
        ramp[n - fade :] = np.minimum(ramp[n - fade :], rise[::-1])
    return ramp
