"""From a finished sample to what people look at or listen to: decoders, tiles, frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from edgekit.bundle.recipe import Decode, Stage, Tiles
from edgekit.errors import BadManifest
from edgekit.runtime.backends import Array
from edgekit.runtime.diffusion.networks import Meter, Networks
from edgekit.runtime.diffusion.sources import Sources
from edgekit.runtime.diffusion.tiles import Box, needed, tiled

F32 = npt.NDArray[np.float32]

DECODER_TILES = Tiles(size=64, overlap=16)  # of latents: 512 pixels of an eightfold decoder, a quarter shared


def frames_axis(stage: Stage) -> int | None:
    """The axis of a stage's sample that counts frames, the batch being axis 0."""
    return 1 + stage.init.shape.index("frames") if "frames" in stage.init.shape else None


def small_decoder(decode: Decode | None) -> Decode | None:
    """The decoder for previews and quick pictures: the tiny one where there is one."""
    return decode.preview or decode if decode is not None else None


def decoded(
    stage: Stage,
    decode: Decode | None,
    x: Array,
    sources: Sources,
    networks: Networks,
    meter: Meter,
    tile: int | None = None,
    at_once: int | None = None,
) -> Array:
    """A sample through a decoder, (batch, ...); as it is where there is none.

    Args:
        stage: whose sample x is.
        decode: the decoder to use.
        x: the sample.
        sources: what else the decoder may be fed.
        networks, meter: where it runs.
        tile: side of a tile in latent pixels, None for what the decoder's own `tiles` say.
        at_once: frames that go through a video's decoder at a time, None for what its `chunk` says.

    Raises:
        SessionFailed, BadRequest, BadManifest: as of any part.
    """
    if decode is None:
        return x
    latent, axis = _unscaled(decode, x), frames_axis(stage)
    if axis is None and (decode.per_frame or decode.chunk):
        raise BadManifest(f"stage {stage.name!r} decodes frame by frame or in chunks and its sample has no frames")
    tiles = _tiles(decode, tile)
    feeds = {name: sources.images(source) for name, source in decode.feeds.items() if source != "@latent"}

    def run(piece: F32) -> Array:
        values = {**feeds, **{name: piece for name, source in decode.feeds.items() if source == "@latent"}}
        return networks.run(decode.part, values, meter)[decode.output]

    def draw(piece: F32) -> Array:
        if tiles is not None and needed(piece, tiles, video=axis is not None):
            return tiled(piece, tiles, lambda box: run(_cut(piece, box)))
        return run(piece)

    if axis is None:
        return draw(latent)
    if decode.per_frame:
        latent, axis = np.moveaxis(latent, axis, 1), 1
    count = latent.shape[axis]
    step = at_once or decode.chunk or count
    pieces = np.split(latent, range(step, count, step), axis)
    return np.concatenate([_by_frame(piece, draw) if decode.per_frame else draw(piece) for piece in pieces], axis=1)


def _by_frame(piece: F32, draw: Callable[[F32], Array]) -> Array:
    """(batch, frames, ...) through a decoder of pictures."""
    out = draw(piece.reshape(-1, *piece.shape[2:]))
    return out.reshape(-1, piece.shape[1], *out.shape[1:])


def _tiles(decode: Decode, tile: int | None) -> Tiles | None:
    """The recipe's tiles where it wants them always; a request's own size else."""
    if tile is not None:
        return Tiles(size=tile, overlap=max(tile // 4, 1))
    return decode.tiles if decode.tiles is not None and decode.tiles.always else None


def _unscaled(decode: Decode, x: Array) -> Array:
    """What the decoder takes: by one scale and shift, or by a mean and a spread per channel."""
    if not decode.mean and not decode.std:
        if x.dtype.kind != "f" or (decode.scale == 1 and decode.shift == 0):
            return x
        return np.asarray(x / decode.scale + decode.shift, np.float32)
    shape = (-1, *[1] * (x.ndim - 2))
    mean = np.asarray(decode.mean or (0.0,), np.float32).reshape(shape)
    std = np.asarray(decode.std or (1.0,), np.float32).reshape(shape)
    return np.asarray(x * std + mean, np.float32)


def _cut(x: F32, box: Box) -> F32:
    top, left, bottom, right = box
    return np.ascontiguousarray(x[..., top:bottom, left:right])


def scaled(values: Mapping[str, Array], scale: float, shift: float) -> F32:
    """An encoder's only output as the sample's own units: (z - shift) * scale."""
    encoded: F32 = next(iter(values.values()))
    return (encoded - shift) * scale
