"""Where a stage may start: noise around a mean, a Gaussian, an encoded picture, a masked one."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from edgekit.bundle.recipe import (
    Call,
    Denoise,
    Init,
    Recipe,
    Resize,
    Sampler,
)
from edgekit.errors import BadRequest
from tests.runtime.diffusion.bench import (
    ARRAY,
    ENCODER,
    FEEDS,
    PICTURE,
    PLAIN,
    SMALL,
    M,
    Network,
    T,
    X,
    noise,
    plain,
    stage,
    studio,
)
from tests.runtime.diffusion.fakes import spec


def test_noise_is_drawn_around_a_mean(tmp_path: Path) -> None:
    """CoMoSpeech: the mean is in the first noise and in every later one."""
    sampler = Sampler("flow_stochastic", 2, (2,), prediction="flow", sigmas=(1.0, 0.5))
    init = msgspec.structs.replace(SMALL, mean="@input.mu")
    networks: dict[str, Network] = {"net": (lambda feeds: {"m": feeds["x"] * 0}, (X, T), (M,))}
    made = studio(tmp_path, Recipe((stage(init=init, sampler=sampler),), media=ARRAY), networks)
    mu = np.full((1, 2, 4, 4), 10, np.float32)  # its shape is the sample's, whatever size the recipe has
    made.pipeline().generate(seed=3, inputs={"mu": mu})
    first, second = (call["x"] for call in made.calls["net"])
    assert np.abs(first - (noise(3) + 10)).max() <= 1e-5
    assert np.abs(second - (0.5 * first + 0.5 * (noise(3, 1) + 10))).max() <= 1e-5


def test_a_gaussian_start_has_its_mean_and_spread(tmp_path: Path) -> None:
    """mean + chol z over the flat sample."""
    init = Init("gaussian", shape=(3,), mean="@input.mean", chol="@input.chol")
    networks: dict[str, Network] = {"net": (lambda feeds: {"m": feeds["x"] * 0}, (spec("x", 3), T), (spec("m", 3),))}
    made = studio(tmp_path, Recipe((stage(init=init),), media=ARRAY), networks)
    mean, chol = np.array([[1, 2, 3]], np.float32), np.tril(np.arange(1, 10, dtype=np.float32).reshape(1, 3, 3))
    made.pipeline().generate(seed=5, inputs={"mean": mean, "chol": chol})
    z = noise(5, 0, (1, 3))
    assert np.abs(made.calls["net"][0]["x"] - (mean + (chol[0] @ z[0]))).max() <= 1e-5


@pytest.mark.parametrize("noised", [False, True])
def test_a_stage_may_start_from_the_encoded_picture(tmp_path: Path, noised: bool) -> None:
    """As it is, or brought to the first row's noise level; enlarged before, in the sample's own units."""
    sampler = Sampler("one_step", 1, (1,), prediction="flow", sigmas=(0.25,))
    init = Init(
        "encode",
        channels=2,
        downscale=1,
        encode=Call("encoder", {"image": "@image"}),
        scale=0.5,
        shift=1.0,
        resize=Resize(2, "nearest"),
        noised=noised,
    )
    recipe = Recipe((stage(init=init, sampler=sampler),), media=ARRAY)
    made = studio(tmp_path, recipe, {**PLAIN, "encoder": ENCODER})
    result = made.pipeline().generate(image=PICTURE, seed=6)
    clean = (np.asarray(PICTURE).transpose(2, 0, 1)[None, :2] / 127.5 - 1).repeat(2, 2).repeat(2, 3)
    wanted = 0.75 * clean + 0.25 * noise(6, 0, (1, 2, 8, 8)) if noised else clean
    assert np.abs(made.calls["net"][0]["x"] - wanted).max() <= 1e-5
    assert (result.used.width, result.used.height) == (8, 8)
    with pytest.raises(BadRequest, match="give one"):
        made.pipeline().generate()


def test_painting_inside_a_mask_leaves_the_rest(tmp_path: Path) -> None:
    """With a plain denoiser, what lies outside the mask ends as the encoded picture and is at each row's level."""
    init = msgspec.structs.replace(SMALL, encode=Call("encoder", {"image": "@image"}))
    made = studio(tmp_path, Recipe((stage(init=init),), media=ARRAY), {**PLAIN, "encoder": ENCODER})
    mask = Image.new("L", (4, 4), 0)
    mask.paste(255, (0, 0, 2, 4))
    result = made.pipeline().generate(image=PICTURE, mask=mask, seed=7)
    clean = (np.asarray(PICTURE).transpose(2, 0, 1)[None, :2] / 127.5 - 1) * 2 + 1
    assert np.abs(result.arrays[..., 2:] - clean[..., 2:]).max() <= 1e-5
    assert np.abs(result.arrays[..., :2] - clean[..., :2]).max() > 0.1
    second = made.calls["net"][1]["x"]
    assert np.abs(second[..., 2:] - (0.5 * clean + 0.5 * noise(7))[..., 2:]).max() <= 1e-5
    assert result.used.strength == 1.0
    with pytest.raises(BadRequest, match="2 x 2"):
        made.pipeline().generate(image=PICTURE, mask=mask.resize((2, 2)))
    with pytest.raises(BadRequest, match="give one"):
        made.pipeline().generate(mask=mask)


def test_a_network_that_knows_masks_is_told(tmp_path: Path) -> None:
    """Mask at the sample's size, picture without what it covers; nothing is put back behind the network's back."""
    networks: dict[str, Network] = {
        "net": (plain, (X, T, spec("mask", 1, "h", "w"), spec("hole", 3, "H", "W")), (M,)),
    }
    init = msgspec.structs.replace(SMALL, downscale=2, width=4, height=4)
    net = Denoise("net", {**FEEDS, "mask": "@inpaint_mask", "hole": "@masked_image"}, "m")
    made = studio(tmp_path, Recipe((stage(init=init, denoise=net),), media=ARRAY), networks)
    mask = Image.new("L", (4, 4), 0)
    mask.paste(255, (0, 0, 2, 4))
    made.pipeline().generate(image=PICTURE, mask=mask)
    fed = made.calls["net"][0]
    assert fed["mask"][0, 0].tolist() == [[1, 0], [1, 0]]
    assert (fed["hole"][..., :2] == 0).all()
    assert np.abs(fed["hole"][..., 2:]).max() > 0
    with pytest.raises(BadRequest, match="give one"):
        made.pipeline().generate(image=PICTURE)


def test_rows_that_build_on_each_other_are_all_walked(tmp_path: Path) -> None:
    """A recipe that carries tensors has no picture to start from: the rows skipped would have filled the cache."""
    init = msgspec.structs.replace(SMALL, encode=Call("encoder", {"image": "@image"}))
    cache = spec("cache", 2, "h", "w")
    networks: dict[str, Network] = {
        "net": (lambda feeds: {"m": feeds["cache"], "cache": feeds["cache"]}, (X, cache), (M, cache)),
        "encoder": ENCODER,
    }
    net = Denoise("net", {"x": "@x"}, "m", carry=("cache",))
    made = studio(tmp_path, Recipe((stage(init=init, denoise=net),), media=ARRAY), networks)
    with pytest.raises(BadRequest, match="none can be skipped"):
        made.pipeline().generate(image=PICTURE)


def test_the_network_sees_the_picture_as_it_was_given(tmp_path: Path) -> None:
    """`resize` enlarges for the encoder; whatever else is fed the picture gets it in its own size (ResShift)."""
    init = Init("encode", channels=2, downscale=1, encode=Call("encoder", {"image": "@image"}), resize=Resize(2))
    networks: dict[str, Network] = {
        "net": (plain, (X, T, spec("given", 3, "H", "W")), (M,)),
        "encoder": ENCODER,
    }
    net = Denoise("net", {**FEEDS, "given": "@image"}, "m")
    sampler = Sampler("one_step", 1, (1,), prediction="flow", sigmas=(0.25,))
    made = studio(tmp_path, Recipe((stage(init=init, sampler=sampler, denoise=net),), media=ARRAY), networks)
    made.pipeline().generate(image=PICTURE)
    assert made.calls["encoder"][0]["image"].shape == (1, 3, 8, 8)
    assert made.calls["net"][0]["given"].shape == (1, 3, 4, 4)
    assert made.calls["net"][0]["x"].shape == (1, 2, 8, 8)
