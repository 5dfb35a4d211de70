"""Pictures in and out, and PNG files that know how they were made."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edgekit.errors import BadManifest, BadRequest, SessionFailed
from edgekit.runtime.diffusion.image import (
    from_image,
    middle_square,
    open_image,
    read_png_metadata,
    save_png,
    to_images,
)
from tests.runtime.diffusion.cases import LAW


def test_every_8_bit_value_survives_the_way_in_and_out() -> None:
    """All 256 levels of all three channels come back as they went in."""
    levels = np.stack([np.roll(np.arange(256, dtype=np.uint8).reshape(16, 16), k) for k in (0, 7, 99)], axis=-1)
    (back,) = to_images(from_image(Image.fromarray(levels)))
    assert np.array_equal(np.asarray(back), levels)


@LAW
@given(st.lists(st.floats(-3, 3, width=32), min_size=12, max_size=12))
def test_rounding_is_diffusers(values: list[float]) -> None:
    """(x / 2 + 1/2) cut to [0, 1], times 255, to the nearest, ties to even: numpy_to_pil after denormalize."""
    picture = np.array(values, np.float32).reshape(1, 3, 2, 2)
    unit = np.clip(picture / 2 + 0.5, 0, 1).astype(np.float32)
    wanted = np.rint(unit * 255).astype(np.uint8)[0].transpose(1, 2, 0)
    assert np.array_equal(np.asarray(to_images(picture)[0]), wanted)


@pytest.mark.torch
def test_both_ways_are_diffusers() -> None:
    """VaeImageProcessor gives the same numbers from an image, resized too, and the same image from numbers."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from tests.runtime.diffusion.reference import from_diffusers

    processor = from_diffusers("image_processor").VaeImageProcessor()
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8))
    for size in ((40, 24), (16, 32)):
        theirs = processor.preprocess(image, height=size[1], width=size[0]).numpy()
        assert np.abs(from_image(image, size) - theirs).max() < 1e-6
    drawn = rng.normal(0, 1, (2, 3, 8, 8)).astype(np.float32)
    for mine, theirs in zip(to_images(drawn), processor.postprocess(torch.from_numpy(drawn)), strict=True):
        assert np.array_equal(np.asarray(mine), np.asarray(theirs))


def test_one_channel_is_grey() -> None:
    """A single channel becomes a grey image."""
    (image,) = to_images(np.zeros((1, 1, 4, 6), np.float32))
    assert (image.mode, image.size) == ("L", (6, 4))


@pytest.mark.parametrize(
    ("picture", "error"),
    [(np.full((1, 3, 2, 2), np.nan), SessionFailed), (np.zeros((1, 4, 2, 2)), BadManifest)],
)
def test_what_is_no_picture_is_refused(picture: np.ndarray, error: type[Exception]) -> None:
    """Overflowed values and latents that nothing decoded do not become files."""
    with pytest.raises(error):
        to_images(picture.astype(np.float32))


def test_other_modes_and_rotations_come_in_upright() -> None:
    """A palette image with a rotation flag is read as a person sees it."""
    image = Image.new("RGB", (4, 2), "red")
    image.putpixel((0, 0), (0, 0, 255))
    exif = image.getexif()
    exif[0x0112] = 6  # turned right by a quarter
    image.info["exif"] = exif.tobytes()
    seen = from_image(image)
    assert seen.shape == (1, 3, 4, 2)
    assert seen[0, 2, 0, 1] == 1
    assert from_image(image.convert("P")).shape[1] == 3


def test_a_file_says_how_it_was_made(tmp_path: Path) -> None:
    """Any metadata, in any script, comes back equal; the file is a PNG of the picture and nothing else is left."""
    image = Image.new("RGB", (3, 3), "green")
    told = {"prompt": "ein roter Äpfel 🍎", "steps": 4, "guidance": 2.5, "nested": {"a": [1, None, True]}}
    save_png(image, tmp_path / "a.png", told)
    assert read_png_metadata(tmp_path / "a.png") == told
    with Image.open(tmp_path / "a.png") as back:
        assert back.getpixel((1, 1)) == (0, 128, 0)
        assert json.loads(back.text["edgekit"]) == told  # type: ignore[attr-defined]
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """Metadata that is no JSON, found out late, destroys nothing."""
    image = Image.new("RGB", (3, 3))
    save_png(image, tmp_path / "a.png", {"n": 1})
    image.mode_hidden = None  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        save_png(image, tmp_path / "a.png", {"n": object()})
    with pytest.raises(AttributeError):
        save_png(None, tmp_path / "a.png", {"n": 2})  # type: ignore[arg-type]
    assert read_png_metadata(tmp_path / "a.png") == {"n": 1}
    assert os.listdir(tmp_path) == ["a.png"]


def test_files_that_are_not_ours_are_told_so(tmp_path: Path) -> None:
    """A missing folder, a missing picture, a text file and a PNG without our chunk each have their sentence."""
    (tmp_path / "x.png").write_text("hello")
    Image.new("RGB", (1, 1)).save(tmp_path / "plain.png")
    with pytest.raises(BadRequest, match="not a folder"):
        save_png(Image.new("RGB", (1, 1)), tmp_path / "no" / "a.png", {})
    for name in ("x.png", "plain.png", "none.png"):
        with pytest.raises(BadRequest, match=name):
            read_png_metadata(tmp_path / name)
    for name in ("x.png", "none.png"):
        with pytest.raises(BadRequest, match=name):
            open_image(tmp_path / name)
    assert open_image(tmp_path / "plain.png").size == (1, 1)


@pytest.mark.parametrize("size", [(300, 410), (31, 7), (8, 8), (9, 200), (5, 4)])
def test_the_middle_square_is_what_clip_looks_at(size: tuple[int, int]) -> None:
    """Of any shape, larger or smaller: transformers' resizing and cutting, to the last bit of eight."""
    pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    clip = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, do_normalize=False)
    theirs = np.asarray(clip(image, return_tensors="np")["pixel_values"])
    ours = middle_square(image, 8)
    assert ours.shape == theirs.shape == (1, 3, 8, 8)
    assert np.abs(ours - theirs).max() <= 1e-7
