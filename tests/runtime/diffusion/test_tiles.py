"""Tiles cover every pixel, blend without seams, and change nothing where the network is local."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.bundle.recipe import Tiles
from edgekit.errors import BadManifest
from edgekit.runtime.diffusion.tiles import Box, boxes, needed, tiled
from tests.runtime.diffusion.cases import LAW

SIDES = st.integers(8, 70)
TILES = st.builds(
    lambda size, share, blend: Tiles(size, int(size * share), blend),
    st.integers(8, 32),
    st.sampled_from([0.0, 0.25, 0.5]),
    st.sampled_from(["linear", "gaussian"]),
)


@LAW
@given(SIDES, SIDES, TILES)
def test_every_pixel_is_covered_and_tiles_overlap_as_asked(height: int, width: int, tiles: Tiles) -> None:
    """Boxes stay inside, have one size where the picture is larger, cover all, and share `overlap` pixels at least."""
    covered = np.zeros((height, width), int)
    found = list(boxes(height, width, tiles))
    for top, left, bottom, right in found:
        assert 0 <= top < bottom <= height
        assert 0 <= left < right <= width
        assert bottom - top == min(tiles.size, height)
        assert right - left == min(tiles.size, width)
        covered[top:bottom, left:right] += 1
    assert covered.min() >= 1
    for axis in (0, 1):
        starts = sorted({box[axis] for box in found})
        assert all(tiles.size - (b - a) >= tiles.overlap for a, b in pairwise(starts))


@LAW
@given(SIDES, SIDES, TILES, st.sampled_from([1, 4]))
def test_a_network_that_looks_at_single_pixels_is_not_changed_by_tiles(
    height: int, width: int, tiles: Tiles, scale: int
) -> None:
    """Whatever the tiles and the blend, weights add to one: a pixelwise enlargement comes out as in one piece."""
    x = np.random.default_rng(0).standard_normal((2, 3, height, width)).astype(np.float32)

    def enlarge(piece: np.ndarray) -> np.ndarray:
        return np.tanh(piece).repeat(scale, 2).repeat(scale, 3)

    def run(box: Box) -> np.ndarray:
        top, left, bottom, right = box
        return enlarge(x[..., top:bottom, left:right])

    assert np.abs(tiled(x, tiles, run) - enlarge(x)).max() <= 1e-5


def test_a_seam_is_a_ramp() -> None:
    """Where one tile says 0 and the next says 1, the overlap rises evenly from one to the other."""
    x = np.zeros((1, 1, 8, 24), np.float32)
    out = tiled(x, Tiles(16, 8), lambda box: np.full((1, 1, 8, 16), float(box[1] > 0), np.float32))
    row = out[0, 0, 0]
    assert (row[:8] == 0).all()
    assert (row[16:] == 1).all()
    assert np.allclose(np.diff(row[8:16]), np.diff(row[8:16])[0])
    assert (np.diff(row[7:17]) > 0).all()


def test_only_pictures_larger_than_a_tile_are_cut() -> None:
    """One tile or less, no tiles at all, and arrays that are no pictures run whole."""
    picture = np.zeros((1, 3, 20, 10))
    assert needed(picture, Tiles(16))
    assert not needed(picture, Tiles(20))
    assert not needed(picture, None)
    assert not needed(np.zeros((1, 100)), Tiles(16))


def test_tiles_that_make_no_sense_are_refused() -> None:
    """An overlap of a whole tile has no next tile; an output that is no multiple of its tile has no place."""
    x = np.zeros((1, 1, 40, 40), np.float32)
    with pytest.raises(BadManifest, match="overlap"):
        tiled(x, Tiles(16, 16), lambda box: x)
    with pytest.raises(BadManifest, match="multiple"):
        tiled(x, Tiles(16), lambda box: np.zeros((1, 1, 17, 16), np.float32))
