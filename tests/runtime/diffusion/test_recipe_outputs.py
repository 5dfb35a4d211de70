"""What may come out, and how: video, sound, small decoders, tiles, memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekit.bundle.recipe import (
    Call,
    Decode,
    Denoise,
    Guidance,
    Init,
    Media,
    Recipe,
    Sampler,
    Stage,
    Tiles,
)
from edgekit.errors import BadManifest, BadRequest, MemoryLimit
from edgekit.runtime.diffusion.networks import resident_bytes
from edgekit.runtime.diffusion.pipeline import FewStepPipeline
from tests.runtime.diffusion.bench import (
    ARRAY,
    DECODER,
    FEEDS,
    LATENT,
    PLAIN,
    SMALL_DECODER,
    TEXT,
    Arrays,
    M,
    Network,
    T,
    X,
    decoded_stage,
    noise,
    plain,
    stage,
    studio,
)
from tests.runtime.diffusion.fakes import LENGTH, spec

VIDEO = Init(downscale=2, width=8, height=4, shape=(2, "frames", "height", "width"), frames=3)


def test_a_video_is_decoded_frame_by_frame(tmp_path: Path) -> None:
    """Frames fold into the decoder's batch and come back in order, at the recipe's rate; `frames` sets how many."""
    v = spec("x", 2, "f", "h", "w")
    networks: dict[str, Network] = {
        "net": (lambda feeds: {"m": feeds["x"] * 0.1}, (v,), (spec("m", 2, "f", "h", "w"),)),
        "decoder": (
            lambda feeds: {"p": np.tanh(feeds["z"][:, [0, 1, 0]]).repeat(2, 2).repeat(2, 3)},
            (spec("z", 2, "h", "w"),),
            (spec("p", 3, "H", "W"),),
        ),
    }
    decode = Decode("decoder", {"z": "@latent"}, "p", per_frame=True)
    draw = stage(init=VIDEO, denoise=Denoise("net", {"x": "@x"}, "m"), decode=decode)
    made = studio(tmp_path, Recipe((draw,), media=Media("video", 8.0)), networks, "text-to-video")
    result = made.pipeline().generate(frames=5, batch=2, seed=8)
    assert result.latents is not None
    assert result.latents.shape == (2, 2, 5, 2, 4)
    assert [len(video) for video in result.videos] == [5, 5]
    assert result.videos[0][0].size == (8, 4)
    frame = np.tanh(result.latents[1, :, 4][[0, 1, 0]]).repeat(2, 1).repeat(2, 2)
    shown = np.asarray(result.videos[1][4]).transpose(2, 0, 1) / 127.5 - 1
    assert np.abs(shown - frame).max() <= 0.01
    saved = result.save(tmp_path / "v.gif", 1)
    with Image.open(saved) as video:
        assert video.n_frames == 5


def test_guidance_may_ramp_over_frames(tmp_path: Path) -> None:
    """SVD: the first frame is guided by `start`, the last by the scale, in equal steps."""
    v, h = spec("x", 2, "f", "h", "w"), spec("hidden", LENGTH, 3)
    networks: dict[str, Network] = {
        "net": (
            lambda feeds: {"m": feeds["x"] * 0 + feeds["hidden"].sum((1, 2)).reshape(-1, 1, 1, 1, 1)},
            (v, h),
            (spec("m", 2, "f", "h", "w"),),
        ),
        "text": TEXT,
    }
    net = Denoise("net", {"x": "@x", "hidden": "text.hidden"}, "m")
    guidance = Guidance("cfg", 3.0, ramp="frames", start=1.0, zero_negative=("text.hidden",))
    recipe = Recipe(
        (stage(init=VIDEO, denoise=net, guidance=guidance),), (Call("text", {"ids": "@tokens"}),), media=ARRAY
    )
    made = studio(tmp_path, recipe, networks)
    result = made.pipeline().generate("red apple", seed=9)
    negative, positive = made.calls["net"][0]["hidden"]
    assert (negative == 0).all()
    moved = noise(9, 0, (1, 2, 3, 2, 4)) - result.arrays
    assert np.abs(moved - positive.sum() * np.array([1, 2, 3]).reshape(1, 1, 3, 1, 1)).max() <= 1e-4


def test_sound_is_as_long_as_asked(tmp_path: Path) -> None:
    """Seconds become sample units rounded up; the wave is cut to the seconds, and saved as WAV."""
    networks: dict[str, Network] = {
        "net": (lambda feeds: {"m": feeds["x"] * 0.1}, (spec("x", 2, "n"),), (spec("m", 2, "n"),)),
        "decoder": (
            lambda feeds: {"wave": np.tanh(feeds["z"].mean(1)).repeat(100, 1)},
            (spec("z", 2, "n"),),
            (spec("wave", "samples"),),
        ),
    }
    init = Init(downscale=100, shape=(2, "length"), length=80)
    draw = stage(
        init=init, denoise=Denoise("net", {"x": "@x"}, "m"), decode=Decode("decoder", {"z": "@latent"}, "wave")
    )
    made = studio(tmp_path, Recipe((draw,), media=Media("audio", 8000.0)), networks, "text-to-audio")
    result = made.pipeline().generate(seconds=0.51, seed=1)
    assert result.latents is not None
    assert result.latents.shape == (1, 2, 41)
    assert result.audio is not None
    assert result.audio.shape == (1, 1, 4080)
    assert made.pipeline().generate().audio.shape == (1, 1, 8000)
    assert result.save(tmp_path / "a.wav").stat().st_size == 44 + 2 * 4080
    with pytest.raises(BadRequest, match="no picture"):
        made.pipeline().generate(width=64)


def test_a_spectrogram_on_the_way_to_sound_is_no_picture(tmp_path: Path) -> None:
    """Decoded in one piece under any memory limit, then made sound by a stage of its own; no previews, no tiles."""
    networks: dict[str, Network] = {
        "net": (lambda feeds: {"m": feeds["x"] * 0.1}, (spec("x", 2, "n", 4),), (spec("m", 2, "n", 4),)),
        "decoder": (
            lambda feeds: {"mel": feeds["z"].mean(1, keepdims=True).repeat(2, 2)},
            (spec("z", 2, "n", 4),),
            (spec("mel", 1, "frames", 4),),
        ),
        "vocoder": (
            lambda feeds: {"wave": np.tanh(feeds["mel"].mean((1, 3))).repeat(50, 1)},
            (spec("mel", 1, "frames", 4),),
            (spec("wave", "samples"),),
        ),
    }
    init = Init(downscale=100, shape=(2, "length", 4), length=80)
    draw = stage(init=init, denoise=Denoise("net", {"x": "@x"}, "m"), decode=Decode("decoder", {"z": "@latent"}, "mel"))
    net = Denoise("vocoder", {"mel": "@previous"}, "wave")
    sound = Stage("vocoder", Init("previous", downscale=1), Sampler("direct", 1, (1,)), net)
    made = studio(tmp_path, Recipe((draw, sound), media=Media("audio", 8000.0)), networks, "text-to-audio")
    shown: list[Image.Image] = []
    with FewStepPipeline(made.bundle, max_memory=resident_bytes() + 10**9, open_session=made.open_session) as model:
        result = model.generate(seconds=0.5, batch=2, on_step=lambda event: shown.extend(event.preview()))
        with pytest.raises(BadRequest, match="tile"):
            model.generate(tile=64)
    assert result.audio is not None
    assert result.audio.shape == (2, 1, 4000)
    assert result.audio.std() > 0.01
    assert not shown
    assert [call["z"].shape for call in made.calls["decoder"]] == [(2, 2, 40, 4)]
    assert result.latents is not None
    mel = result.latents.mean(1).repeat(2, 1)
    assert np.allclose(result.audio[:, 0], np.tanh(mel.mean(2)).repeat(50, 1), atol=1e-6)


def test_the_small_decoder_draws_previews_and_quick_pictures(tmp_path: Path) -> None:
    """Previews of every row come from it, at its own scale; `tiny` takes it for the picture as well."""
    networks = {**PLAIN, "decoder": DECODER, "small": SMALL_DECODER}
    made = studio(tmp_path, Recipe((decoded_stage(),)), networks, "text-to-image")
    shown: list[Image.Image] = []
    result = made.pipeline().generate(seed=2, on_step=lambda event: shown.extend(event.preview()))
    assert len(shown) == 2
    assert len(made.calls["decoder"]) == 1
    quick = made.pipeline().generate(seed=2, tiny=True)
    assert np.array_equal(np.asarray(shown[-1]), np.asarray(quick.images[0]))
    assert not np.array_equal(np.asarray(result.images[0]), np.asarray(quick.images[0]))
    assert result.latents is not None
    assert np.allclose(made.calls["small"][-1]["z"], result.latents / 2)


def test_a_decoder_without_a_small_one_has_no_quick_pictures(tmp_path: Path) -> None:
    """`tiny` is refused where there is nothing tiny, and previews then come from the decoder itself."""
    draw = stage(init=LATENT, decode=Decode("decoder", {"z": "@latent"}, "p"))
    made = studio(tmp_path, Recipe((draw,)), {**PLAIN, "decoder": DECODER}, "text-to-image")
    with pytest.raises(BadRequest, match="small decoder"):
        made.pipeline().generate(tiny=True)
    shown: list[Image.Image] = []
    result = made.pipeline().generate(on_step=lambda event: shown.extend(event.preview()))
    assert np.array_equal(np.asarray(shown[-1]), np.asarray(result.images[0]))


def test_a_decoder_may_work_in_tiles(tmp_path: Path) -> None:
    """Sixty-four pixels at a time: many runs, and the picture of a local decoder is the same."""
    made = studio(tmp_path, Recipe((decoded_stage(),)), {**PLAIN, "decoder": DECODER, "small": SMALL_DECODER})
    whole = made.pipeline().generate(width=200, height=160, seed=3)
    tiled = made.pipeline().generate(width=200, height=160, seed=3, tile=64)
    assert np.abs(np.asarray(whole.images[0]).astype(int) - np.asarray(tiled.images[0])).max() <= 1
    assert len(made.calls["decoder"]) > 10
    assert max(call["z"].shape[-1] for call in made.calls["decoder"][1:]) == 32


def test_an_upscaler_takes_any_size_in_tiles(tmp_path: Path) -> None:
    """A direct stage with tiles runs on pieces, and a local network draws what it draws in one."""
    networks: dict[str, Network] = {
        "net": (
            lambda feeds: {"m": np.tanh(feeds["image"]).repeat(2, 2).repeat(2, 3)},
            (spec("image", 3, "h", "w"),),
            (spec("m", 3, "H", "W"),),
        )
    }
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (45, 70, 3), dtype=np.uint8))
    images = []
    for tiles in (None, Tiles(32, 8, "gaussian")):
        net = Denoise("net", {"image": "@image"}, "m", tiles=tiles)
        draw = Stage("up", Init("input", channels=3), Sampler("direct", 1, (1,)), net, upscale=2)
        made = studio(tmp_path, Recipe((draw,)), networks, "super-resolution")
        images.append(np.asarray(made.pipeline().generate(image=picture).images[0]).astype(int))
    assert images[0].shape == (90, 140, 3)
    assert np.abs(images[0] - images[1]).max() <= 1
    assert len(made.calls["net"]) > 4


def test_a_latent_may_be_decoded_by_mean_and_spread_per_channel(tmp_path: Path) -> None:
    """sample * std + mean, channel by channel."""
    decode = Decode("decoder", {"z": "@latent"}, "p", mean=(1.0, 2.0), std=(0.5, 4.0))
    made = studio(tmp_path, Recipe((stage(init=LATENT, decode=decode),)), {**PLAIN, "decoder": DECODER})
    result = made.pipeline().generate(seed=1)
    wanted = result.latents * np.array([0.5, 4]).reshape(1, 2, 1, 1) + np.array([1, 2]).reshape(1, 2, 1, 1)
    assert np.allclose(made.calls["decoder"][0]["z"], wanted, atol=1e-6)


def test_parts_are_let_go_of_in_order_where_memory_is_short(tmp_path: Path) -> None:
    """Under a limit only the present phase stays open, so a second request opens every part anew."""
    networks = {**PLAIN, "decoder": DECODER, "small": SMALL_DECODER, "text": TEXT}
    networks["net"] = (plain, (X, T, spec("hidden", LENGTH, 3)), (M,))
    draw = decoded_stage(denoise=Denoise("net", {**FEEDS, "hidden": "text.hidden"}, "m"))
    made = studio(tmp_path, Recipe((draw,), (Call("text", {"ids": "@tokens"}),)), networks, "text-to-image")
    free = made.pipeline()
    for _ in range(2):
        free.generate("red apple")
    assert made.opened == ["text", "net", "decoder"]
    made.opened.clear()
    tight = FewStepPipeline(made.bundle, max_memory=1 << 40, open_session=made.open_session)
    for _ in range(2):
        tight.generate("red apple")
    assert made.opened == ["text", "net", "decoder"] * 2


def test_a_limit_below_what_a_part_needs_is_refused(tmp_path: Path) -> None:
    """The error names the part, what it needs and what is taken."""
    made = studio(tmp_path, Recipe((stage(),), media=ARRAY), PLAIN)
    with pytest.raises(MemoryLimit, match="'net'"):
        FewStepPipeline(made.bundle, max_memory=1000, open_session=made.open_session).generate()


def test_a_network_that_took_more_than_the_limit_is_the_last_to_run(tmp_path: Path) -> None:
    """What activations take is known after a run: over the limit, the request ends and says how much it was."""
    taken: list[np.ndarray] = []

    def greedy(feeds: Arrays) -> Arrays:
        taken.append(np.ones(64 << 20, np.uint8))
        return plain(feeds)

    networks = {**PLAIN, "net": (greedy, *PLAIN["net"][1:])}
    made = studio(tmp_path, Recipe((stage(),), media=ARRAY), networks)
    limit = resident_bytes() + (32 << 20)
    with pytest.raises(MemoryLimit, match=r"'net' at this size .* are taken"):
        FewStepPipeline(made.bundle, max_memory=limit, open_session=made.open_session).generate()
    assert len(taken) == 1


def test_a_recipe_that_ends_in_another_shape_is_refused(tmp_path: Path) -> None:
    """A video recipe whose last array is a picture is the manifest's fault, and says so."""
    made = studio(tmp_path, Recipe((stage(),), media=Media("video", 8.0)), PLAIN, "text-to-video")
    with pytest.raises(BadManifest, match="a video is"):
        made.pipeline().generate()
