"""Videos made from a picture: what is seen of it, noise on it, and frames through a decoder a few at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from edgekit.bundle.recipe import Call, Decode, Denoise, Init, Media, Recipe, Select
from edgekit.errors import BadManifest, BadRequest, UnfedInput
from edgekit.runtime.diffusion import networks
from edgekit.runtime.diffusion.drawing import CONDITION_DRAWS
from edgekit.runtime.diffusion.image import from_image
from edgekit.runtime.diffusion.pipeline import FewStepPipeline
from edgekit.runtime.random import TorchNoise
from tests.runtime.diffusion.bench import ARRAY, PICTURE, PLAIN, Network, noise, stage, studio
from tests.runtime.diffusion.fakes import Arrays, Studio, spec

VIDEO = Init(downscale=2, width=8, height=4, shape=("frames", 2, "height", "width"), frames=5)
NET = Denoise("net", {"x": "@x"}, "m")
SHAPE = (1, 5, 2, 2, 4)  # of one sample of VIDEO
BYTES_PER_FRAME = networks.BYTES_PER_PIXEL[False] * 8 * 4


def smoothed(feeds: Arrays) -> Arrays:
    """Frames of three channels at twice the size; each is drawn towards the mean of those that come with it."""
    mixed = feeds["z"] + feeds["z"].mean(1, keepdims=True)
    return {"p": np.tanh(mixed[:, :, [0, 1, 0]]).repeat(2, 3).repeat(2, 4).astype(np.float32)}


def alone(feeds: Arrays) -> Arrays:
    """Pictures of three channels at twice the size."""
    return {"p": np.tanh(feeds["z"][:, [0, 1, 0]]).repeat(2, 2).repeat(2, 3).astype(np.float32)}


X = spec("x", "a", "b", "h", "w")  # frames and channels, or the other way round
MOVES: dict[str, Network] = {"net": (lambda feeds: {"m": 0.3 * feeds["x"]}, (X,), (spec("m", "a", "b", "h", "w"),))}
SMOOTHS: Network = (smoothed, (spec("z", "f", 2, "h", "w"),), (spec("p", "f", 3, "H", "W"),))
ALONE: Network = (alone, (spec("z", 2, "h", "w"),), (spec("p", 3, "H", "W"),))
AUGMENTS: Network = (
    lambda feeds: {"z": feeds["image"] + feeds["noise"]},
    (spec("image", 3, "h", "w"), spec("noise", 3, "h", "w")),
    (spec("z", 3, "h", "w"),),
)
LOOKS: Network = (
    lambda feeds: {"e": feeds["image"].mean((2, 3))},
    (spec("image", 3, "H", "W"),),
    (spec("e", 3),),
)


def video(root: Path, decoder: Network = SMOOTHS, init: Init = VIDEO, **decode: Any) -> Studio:
    """A video of five frames from noise, decoded as said."""
    draw = stage(init=init, denoise=NET, decode=Decode("decoder", {"z": "@latent"}, "p", **decode))
    recipe = Recipe((draw,), media=Media("video", 8.0))
    return studio(root, recipe, {**MOVES, "decoder": decoder}, "text-to-video")


def frames_of(result: Any) -> np.ndarray:
    """(batch, frames, 3, height, width) in [-1, 1]."""
    shown = np.stack([np.stack([np.asarray(frame) for frame in one]) for one in result.videos])
    return np.asarray(shown.transpose(0, 1, 4, 2, 3) / 127.5 - 1)


def augmented(root: Path) -> Studio:
    """A picture with noise on it, told to a network beside its sample."""
    net = Denoise("net", {"x": "@x", "t": "@t"}, "m")
    feeds = {"image": "@image", "noise": "@random.augmentation"}
    recipe = Recipe((stage(denoise=net),), (Call("encoder", feeds),), media=ARRAY)
    return studio(root, recipe, {**PLAIN, "encoder": AUGMENTS})


def test_a_condition_may_be_fed_noise(tmp_path: Path) -> None:
    """Of the shape of what it is laid on, at an address of its own, and each picture's: two of a batch differ."""
    made = augmented(tmp_path)
    made.pipeline().generate(image=PICTURE, seed=4, batch=2)
    (call,) = made.calls["encoder"]
    wanted = noise(4, CONDITION_DRAWS, (2, 3, 4, 4))
    assert np.array_equal(call["noise"], wanted)
    assert np.abs(wanted[0] - wanted[1]).min() > 0
    assert np.array_equal(call["image"], np.repeat(from_image(PICTURE), 2, axis=0))
    made.pipeline().generate(image=PICTURE, seed=4, first_image=1)
    assert np.array_equal(made.calls["encoder"][1]["noise"][0], wanted[1])


def test_the_noise_of_conditions_comes_before_the_samples(tmp_path: Path) -> None:
    """As one torch generator gives them to diffusers' pipeline: the picture's first, then the start."""
    made = augmented(tmp_path)
    made.pipeline().generate(image=PICTURE, seed=4, seed_mode="torch-cpu")
    stream = TorchNoise(4)
    assert np.array_equal(made.calls["encoder"][0]["noise"], stream.normal((1, 3, 4, 4), 0))
    assert np.abs(made.calls["net"][0]["x"] - stream.normal((1, 2, 4, 4), 0)).max() <= 1e-6


def test_a_choice_of_steps_is_not_left_to_noise(tmp_path: Path) -> None:
    """A policy is fed what the request says; @random there is refused as the bundle is read."""
    select = Select("encoder", {"image": "@image", "noise": "@random.z"}, "z", (2,))
    with pytest.raises(UnfedInput, match=r"recipe\.select feeds 'noise'"):
        studio(tmp_path, Recipe((stage(),), select=select, media=ARRAY), {**PLAIN, "encoder": AUGMENTS})


def test_a_picture_may_be_looked_at_as_it_was_given(tmp_path: Path) -> None:
    """@original has the size it came in and @image the one that is drawn; both belong to the result's metadata."""
    given = PICTURE.resize((7, 5))
    calls = (Call("looks", {"image": "@original"}), Call("encoder", {"image": "@image", "noise": "@random.z"}))
    made = studio(tmp_path, Recipe((stage(),), calls, media=ARRAY), {**PLAIN, "looks": LOOKS, "encoder": AUGMENTS})
    result = made.pipeline().generate(image=given, width=4, height=4)
    assert np.array_equal(made.calls["looks"][0]["image"], from_image(given))
    assert made.calls["encoder"][0]["image"].shape == (1, 3, 4, 4)
    assert result.metadata["given_original"] != result.metadata["given_image"]


def test_a_recipe_that_only_looks_at_a_picture_needs_one(tmp_path: Path) -> None:
    """The error asks for it before anything runs."""
    recipe = Recipe((stage(),), (Call("looks", {"image": "@original"}),), media=ARRAY)
    made = studio(tmp_path, recipe, {**PLAIN, "looks": LOOKS})
    with pytest.raises(BadRequest, match="give one"):
        made.pipeline().generate()


def test_a_video_is_drawn_at_its_own_size(tmp_path: Path) -> None:
    """Not at that of the picture it starts from, which may be any; a size that is asked for counts."""
    draw = stage(init=VIDEO, denoise=NET)
    recipe = Recipe((draw,), (Call("looks", {"image": "@original"}),), media=ARRAY)
    made = studio(tmp_path, recipe, {**MOVES, "looks": LOOKS})
    large = Image.new("RGB", (400, 300))
    assert made.pipeline().generate(image=large).arrays.shape == SHAPE
    assert made.pipeline().generate(image=large, width=12, height=8).arrays.shape == (1, 5, 2, 4, 6)


@pytest.mark.parametrize("chunk", [0, 1, 2, 5, 9])
def test_frames_are_decoded_in_chunks(tmp_path: Path, chunk: int) -> None:
    """Every chunk is smoothed within itself, the last may be shorter, 0 is all at once; frames keep their order."""
    made = video(tmp_path, chunk=chunk)
    result = made.pipeline().generate(batch=2, seed=8)
    sizes = [call["z"].shape[1] for call in made.calls["decoder"]]
    step = chunk or 5
    assert sizes == [min(step, 5 - at) for at in range(0, 5, step)]
    assert result.latents is not None
    wanted = [smoothed({"z": result.latents[:, at : at + step]})["p"] for at in range(0, 5, step)]
    assert np.abs(frames_of(result) - np.concatenate(wanted, axis=1)).max() <= 0.01


def test_chunks_of_single_pictures_change_nothing(tmp_path: Path) -> None:
    """A decoder of pictures, frames behind the channels: two frames of both videos at a time give the same video."""
    init = msgspec.structs.replace(VIDEO, shape=(2, "frames", "height", "width"))
    whole, parted = (video(tmp_path, ALONE, init, per_frame=True, chunk=chunk) for chunk in (0, 2))
    wanted, drawn = (each.pipeline().generate(batch=2, seed=8) for each in (whole, parted))
    assert [len(call["z"]) for call in whole.calls["decoder"]] == [10]
    assert [len(call["z"]) for call in parted.calls["decoder"]] == [4, 4, 2]
    assert np.array_equal(frames_of(wanted), frames_of(drawn))


@pytest.mark.parametrize(("per_frame", "chunk"), [(True, 0), (False, 4)])
def test_a_limit_of_memory_makes_chunks_shorter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_frame: bool, chunk: int
) -> None:
    """As many frames go through the decoder as fit, for every video of the batch."""
    made = video(tmp_path, ALONE if per_frame else SMOOTHS, per_frame=per_frame, chunk=chunk)
    monkeypatch.setattr(networks, "resident_bytes", lambda: 0)
    limit = 1000 + 2 * 3 * BYTES_PER_FRAME  # the decoder's file, and three frames of two videos
    tight = FewStepPipeline(made.bundle, max_memory=limit, open_session=made.open_session)
    tight.generate(batch=2)
    axis = 0 if per_frame else 1
    assert [call["z"].shape[axis] for call in made.calls["decoder"]] == ([6, 4] if per_frame else [3, 2])


def test_a_decoder_that_says_nothing_of_chunks_is_given_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of memory cuts no video whose decoder may need every frame."""
    made = video(tmp_path)
    monkeypatch.setattr(networks, "resident_bytes", lambda: 0)
    limit = 1000 + BYTES_PER_FRAME
    FewStepPipeline(made.bundle, max_memory=limit, open_session=made.open_session).generate()
    assert [call["z"].shape[1] for call in made.calls["decoder"]] == [5]


def test_frames_are_drawn_in_tiles_too(tmp_path: Path) -> None:
    """A tile is cut out of every frame of a chunk; where a decoder looks at single pixels, nothing is seen of it."""
    init = msgspec.structs.replace(VIDEO, width=96)
    made = video(tmp_path, init=init, chunk=2)
    wanted = made.pipeline().generate(seed=8)
    untiled = len(made.calls["decoder"])
    drawn = made.pipeline().generate(seed=8, tile=64)
    tiles = [call["z"].shape for call in made.calls["decoder"][untiled:]]
    assert {shape[-1] for shape in tiles} == {32}
    assert [shape[1] for shape in tiles] == [2, 2, 2, 2, 1, 1]
    assert np.abs(frames_of(wanted) - frames_of(drawn)).max() <= 0.01


def test_a_frame_that_does_not_fit_is_drawn_in_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a limit of memory one frame at a time, cut into the largest tiles that fit; the video keeps its size."""
    init = msgspec.structs.replace(VIDEO, width=256, height=128, frames=2)
    made = video(tmp_path, init=init, chunk=2)
    monkeypatch.setattr(networks, "resident_bytes", lambda: 0)
    limit = 1000 + networks.BYTES_PER_PIXEL[False] * 128**2  # the decoder's file, and half a frame
    result = FewStepPipeline(made.bundle, max_memory=limit, open_session=made.open_session).generate(seed=8)
    assert result.videos[0][0].size == (256, 128)
    assert {call["z"].shape for call in made.calls["decoder"]} == {(1, 1, 2, 64, 64)}


def test_chunks_of_no_frames_are_the_manifests_fault(tmp_path: Path) -> None:
    """`chunk` on a picture's decoder says that the recipe means something else."""
    draw = stage(decode=Decode("decoder", {"z": "@latent"}, "p", chunk=2))
    made = studio(tmp_path, Recipe((draw,)), {**PLAIN, "decoder": ALONE}, "text-to-image")
    with pytest.raises(BadManifest, match="in chunks"):
        made.pipeline().generate()
