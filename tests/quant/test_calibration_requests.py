"""What a bundle is calibrated on and checked on: how many requests, and none of them twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from edgekit.bundle.manifest import Manifest
from edgekit.bundle.store import Bundle
from edgekit.errors import BadRequest
from edgekit.quant.requests import PROMPTS, SIZES, SMALL_SIDE, deployed, digest, picture_requests


def of_size(bundle: Bundle, parameters: int, side: int | None = None) -> Bundle:
    """The same bundle with a denoiser that says to have so many parameters, and draws pictures of another size."""
    manifest = bundle.manifest
    part = msgspec.structs.replace(manifest.parts["unet"], parameters=parameters)
    changed = msgspec.structs.replace(manifest, parts=manifest.parts | {"unet": part})
    if side is not None:
        changed = with_init(changed, width=side, height=side)
    return replace(bundle, manifest=changed)


def with_init(manifest: Manifest, **changes: object) -> Manifest:
    """Another start of the only stage."""
    recipe = manifest.recipe
    assert recipe is not None
    stage = recipe.stages[0]
    stage = msgspec.structs.replace(stage, init=msgspec.structs.replace(stage.init, **changes))
    return msgspec.structs.replace(manifest, recipe=msgspec.structs.replace(recipe, stages=(stage,)))


@pytest.mark.parametrize(
    ("parameters", "count", "batch"),
    [(1000, 8, 2), (SIZES[0][0], 8, 2), (SIZES[0][0] + 1, 4, 1), (SIZES[1][0] + 1, 2, 1)],
)
def test_larger_denoisers_are_run_less(small_bundle: Bundle, parameters: int, count: int, batch: int) -> None:
    """The count follows the size of the denoiser alone, so that a plan is the same on every machine."""
    for half in picture_requests(of_size(small_bundle, parameters), None):
        assert len(half) == count
        assert {each.batch for each in half} == {batch}


def test_the_halves_share_nothing(small_bundle: Bundle) -> None:
    """No prompt and no seed that a plan is made on is one that it is checked on."""
    chosen, held_out = picture_requests(small_bundle, None)
    assert not {each.prompt for each in chosen} & {each.prompt for each in held_out}
    assert not {each.seed for each in chosen} & {each.seed for each in held_out}
    assert {each.prompt for each in (*chosen, *held_out)} == set(PROMPTS)
    assert digest(chosen) != digest(held_out)
    assert digest(chosen) == digest(picture_requests(small_bundle, None)[0])


def test_a_large_denoiser_is_tried_at_a_small_size_and_timed_at_its_own(small_bundle: Bundle) -> None:
    """Only where it draws larger pictures; the deployed request is one picture at the bundle's own size."""
    large = of_size(small_bundle, SIZES[1][0] + 1, side=4 * SMALL_SIDE)
    request = picture_requests(large, None)[0][0]
    assert (request.width, request.height) == (SMALL_SIDE, SMALL_SIDE)
    usual = deployed(replace(request, batch=2))
    assert (usual.batch, usual.width, usual.height) == (1, None, None)
    assert (usual.prompt, usual.seed) == (request.prompt, request.seed)
    for bundle in (of_size(small_bundle, SIZES[1][0] + 1), of_size(small_bundle, 1000, side=4 * SMALL_SIDE)):
        assert picture_requests(bundle, None)[0][0].width is None


def test_a_file_of_prompts(small_bundle: Bundle, tmp_path: Path) -> None:
    """A prompt on every line; blanks, comments and repetitions are passed over."""
    path = tmp_path / "prompts.txt"
    path.write_text("# mine\nred apple\n\n  green pear  \nred apple\npear\n", encoding="utf-8")
    chosen, held_out = picture_requests(small_bundle, path)
    assert {each.prompt for each in (*chosen, *held_out)} == {"red apple", "green pear", "pear"}


def test_prompts_that_cannot_be_used(small_bundle: Bundle, tmp_path: Path) -> None:
    """One prompt, no file, a folder, and bytes that are no text: each is refused by the option's name."""
    one, raw = tmp_path / "one.txt", tmp_path / "raw.txt"
    one.write_text("red apple\nred apple\n")
    raw.write_bytes(b"\xff\xfe\xff")
    for path, words in ((one, "has 1 prompts"), (tmp_path / "none.txt", "a prompt on"), (tmp_path, "a prompt on")):
        with pytest.raises(BadRequest, match=f"--calibration .*{words}"):
            picture_requests(small_bundle, path)
    with pytest.raises(BadRequest, match="--calibration"):
        picture_requests(small_bundle, raw)


def test_pictures_where_the_model_starts_from_one(small_bundle: Bundle, tmp_path: Path) -> None:
    """A folder of two at least; files of other kinds are not opened."""
    bundle = replace(small_bundle, manifest=with_init(small_bundle.manifest, kind="input"))
    (tmp_path / "notes.txt").write_text("no picture")
    for path in (None, tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(BadRequest, match=r"pictures?"):
            picture_requests(bundle, path)
    for number in range(3):
        Image.fromarray(np.full((16, 16, 3), 80 * number, np.uint8)).save(tmp_path / f"{number}.png")
    chosen, held_out = picture_requests(bundle, tmp_path)
    assert all(each.image is not None for each in (*chosen, *held_out))
    assert digest(chosen) != digest(held_out)


def test_a_model_that_takes_something_else_is_told_to_stay_in_floats(small_bundle: Bundle) -> None:
    """Conditioning that no prompt and no picture gives."""
    recipe = small_bundle.manifest.recipe
    assert recipe is not None
    stage = recipe.stages[0]
    feeds = {**stage.denoise.feeds, "encoder_hidden_states": "@input.pose"}
    stage = msgspec.structs.replace(stage, denoise=msgspec.structs.replace(stage.denoise, feeds=feeds))
    manifest = msgspec.structs.replace(
        small_bundle.manifest, recipe=msgspec.structs.replace(recipe, stages=(stage,), conditions=())
    )
    with pytest.raises(BadRequest, match=r"takes pose.*fp32"):
        picture_requests(replace(small_bundle, manifest=manifest), None)
