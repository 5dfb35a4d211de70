"""The whole pipeline on networks that are Python functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edgekit.bundle.manifest import AxisRange, Manifest, Tokenizer
from edgekit.bundle.recipe import Recipe
from edgekit.errors import BadManifest, BadRequest, SessionFailed
from edgekit.runtime.diffusion.guidance import classifier_free, w_embedding
from edgekit.runtime.diffusion.image import from_image, read_png_metadata, to_images
from edgekit.runtime.diffusion.kernels import linear
from edgekit.runtime.diffusion.pipeline import DrawRequest, DrawResult, StepEvent
from edgekit.runtime.diffusion.tables import compile_stage
from edgekit.runtime.random import PhiloxNoise, TorchCPUNormal
from tests.runtime.diffusion.cases import LAW
from tests.runtime.diffusion.fakes import (
    RECIPES,
    TEXT,
    cfg_like,
    decode,
    denoise,
    emoji_like,
    encode,
    encode_text,
    enlarge,
    lcm_like,
    manifest_of,
    shuffle,
    studio,
    turbo_like,
    upscaler,
)

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
RED, GREEN = [1, 3, 4, 2, 0, 0], [1, 5, 6, 2, 0, 0]  # ids of "red apple" and "green pear"
EMPTY, BLURRY = [1, 2, 0, 0, 0, 0], [1, 7, 2, 0, 0, 0]


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """A studio for a recipe."""
    return lambda recipe, manifest=None: studio(tmp_path, recipe, manifest)


def hidden(ids: list[int], batch: int) -> np.ndarray:
    """What the text encoder says of a prompt, once per image."""
    return np.asarray(encode_text({"ids": np.array([ids] * batch)})["hidden"])


def plain_walk(recipe: Recipe, net: Any, x: np.ndarray, seed: int, strength: float | None = None) -> np.ndarray:
    """The first stage by hand."""
    stage = recipe.stages[0]
    table = compile_stage(stage, stage.sampler.steps, strength)
    timed = lambda x, row: net(x, table.rows[row][0])  # noqa: E731
    *_, last = linear(table.rows, x, timed, lambda row: PhiloxNoise(seed).normal(x.shape, 1 + row))
    return last.x


def test_two_stages_are_the_sum_of_their_parts(make: Any) -> None:
    """Prompt to ids to states, noise through the table with the embedded scale, pixels, upscaler, 8 bits: by hand."""
    result = make(emoji_like()).pipeline().generate("red apple", batch=2, seed=5)
    given_w = np.tile(w_embedding(2.0, 16), (2, 1))

    def net(x: np.ndarray, t: float) -> np.ndarray:
        return denoise({"x": x, "t": np.full(2, t, np.float32), "hidden": hidden(RED, 2), "w": given_w})["m"]

    x = plain_walk(emoji_like(), net, PhiloxNoise(5).normal((2, 12, 8, 8), 0), 5)
    picture = enlarge({"image": np.clip(shuffle({"z": x})["image"], -1, 1)})["image"]
    assert np.array_equal(result.latents, x)
    for mine, wanted in zip(result.images, to_images(picture), strict=True):
        assert mine.size == (64, 64)
        assert np.array_equal(np.asarray(mine), np.asarray(wanted))


@pytest.mark.parametrize(("negative", "ids"), [("", EMPTY), ("blurry", BLURRY)])
def test_guidance_runs_both_prompts_in_one_batch(make: Any, negative: str, ids: list[int]) -> None:
    """The negative half comes first, as in diffusers; the text encoder runs once, on both prompts."""
    fake = make(cfg_like(rescale=0.7))
    result = fake.pipeline().generate("red apple", negative=negative, batch=2, seed=1)
    assert fake.calls["text_encoder"][0]["ids"].tolist() == [ids, RED]
    assert [len(call["x"]) for call in fake.calls["unet"]] == [4] * 4

    def net(x: np.ndarray, t: float) -> np.ndarray:
        both = [denoise({"x": x, "t": np.full(2, t, np.float32), "hidden": hidden(i, 2)})["m"] for i in (ids, RED)]
        return classifier_free(both[0], both[1], 5.0, 0.7)

    x = plain_walk(cfg_like(), net, PhiloxNoise(1).normal((2, 4, 6, 8), 0), 1)
    assert np.abs(result.latents - x).max() < 1e-5 * np.abs(x).max()


def test_an_empty_negative_may_mean_zeros(make: Any) -> None:
    """SDXL pipelines feed zeros for it, and the encoded text once it says something."""
    fake = make(cfg_like(zero_empty=True))
    fake.pipeline().generate("red apple")
    fake.pipeline().generate("red apple", negative="blurry")
    empty, said = fake.calls["unet"][0], fake.calls["unet"][-1]
    assert not empty["hidden"][0].any()
    assert np.array_equal(empty["hidden"][1], hidden(RED, 1)[0])
    assert np.array_equal(said["hidden"][0], hidden(BLURRY, 1)[0])


def test_guidance_of_one_needs_one_prompt(make: Any) -> None:
    """At scale 1 the negative prompt has no weight, so it is not run."""
    fake = make(cfg_like())
    fake.pipeline().generate("red apple", guidance=1.0)
    assert fake.calls["text_encoder"][0]["ids"].tolist() == [RED]
    assert len(fake.calls["unet"][0]["x"]) == 1


def test_the_embedded_scale_follows_the_request(make: Any) -> None:
    """The network is fed the embedding of the scale that was asked for."""
    fake = make(lcm_like())
    fake.pipeline().generate("red apple", guidance=3.0, steps=1)
    assert np.array_equal(fake.calls["unet_w"][0]["w"], w_embedding(3.0, 16)[None])


def test_sizes_are_fed_as_the_network_learned_them(make: Any) -> None:
    """SDXL's time ids: height, width, no crop, height, width."""
    fake = make(turbo_like())
    fake.pipeline().generate("red apple", width=32, height=16)
    assert fake.calls["unet_xl"][0]["time_ids"].tolist() == [[16, 32, 0, 0, 16, 32]]
    assert fake.calls["unet_xl"][0]["x"].shape == (1, 4, 2, 4)


@pytest.mark.parametrize(("name", "strength"), [("lcm", 0.5), ("cfg", 0.5), ("lcm", None)])
def test_a_given_picture_is_encoded_noised_and_redrawn(make: Any, name: str, strength: float | None) -> None:
    """The start is keep * (z - shift) * scale + noise at the level of the first row that strength leaves."""
    recipe = RECIPES[name]()
    fake = make(recipe)
    options = {} if strength is None else {"strength": strength}
    result = fake.pipeline().generate("red apple", image=PICTURE, seed=3, batch=2, guidance=1.0, **options)
    table = compile_stage(recipe.stages[0], 4, strength or 0.8)
    z = (encode({"image": from_image(PICTURE)})["z"] - 0.1) * 0.5
    start = table.init_keep * z + table.init_scale * PhiloxNoise(3).normal((2, 4, 6, 8), 0)
    part = recipe.stages[0].denoise.part
    assert np.abs(fake.calls[part][0]["x"] - start).max() < 1e-5
    assert [call["t"].tolist() for call in fake.calls[part]] == [[row[0]] * 2 for row in table.rows]
    assert len(fake.calls["encoder"]) == 1
    assert result.used.strength == (strength or 0.8)
    assert result.metadata["given_image"].startswith("sha256:")


def test_super_resolution_is_one_network(make: Any) -> None:
    """The picture in, four times as large out; nothing is sampled, so there are no latents."""
    result = make(upscaler()).pipeline().generate(image=PICTURE)
    (wanted,) = to_images(enlarge({"image": from_image(PICTURE)})["image"])
    assert result.latents is None
    assert result.images[0].size == (256, 192)
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(wanted))


@pytest.mark.parametrize("name", ["emoji", "lcm", "cfg", "turbo"])
@LAW
@given(seed=st.integers(0, 2**64 - 1), batch=st.integers(1, 3), number=st.integers(0, 2))
def test_an_image_is_the_same_alone_and_in_any_batch(name: str, seed: int, batch: int, number: int, world: Any) -> None:
    """Image k of a batch is `batch=1, first_image=k`, for every sampler, in latents and pixels."""
    pipeline = world(name)
    together = pipeline.generate("red apple", seed=seed, batch=number + batch)
    alone = pipeline.generate("red apple", seed=seed, first_image=number)
    assert np.array_equal(alone.latents[0], together.latents[number])
    assert np.array_equal(np.asarray(alone.images[0]), np.asarray(together.images[number]))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Pipelines that live as long as the module."""
    made = {name: studio(tmp_path_factory.mktemp(name), recipe()).pipeline() for name, recipe in RECIPES.items()}
    return made.__getitem__


def test_torch_mode_draws_in_diffusers_order(make: Any) -> None:
    """One stream for the whole batch: the start, then each row that uses noise."""
    fake = make(turbo_like())
    fake.pipeline().generate("red apple", seed=9, seed_mode="torch-cpu", batch=2, steps=2)
    stream, shape = TorchCPUNormal(9), (2, 4, 6, 8)
    table = compile_stage(turbo_like().stages[0], 2)
    calls = fake.calls["unet_xl"]
    x = table.init_scale * stream.normal(shape)
    assert np.array_equal(calls[0]["x"], np.float32(table.rows[0][1]) * x)
    t = np.full(2, table.rows[0][0], np.float32)
    net = lambda x, row: denoise({**calls[0], "x": x, "t": t})["m"]  # noqa: E731
    ((_, x, _),) = linear(table.rows[:1], x, net, lambda row: stream.normal(shape))
    assert np.array_equal(calls[1]["x"], np.float32(table.rows[1][1]) * x)


def test_given_latents_take_the_place_of_the_first_noise(make: Any) -> None:
    """The noise of seed 4 given as latents draws what seed 4 draws, and the file says that latents were given."""
    pipeline = make(lcm_like()).pipeline()
    seeded = pipeline.generate("red apple", seed=4)
    handed = pipeline.generate("red apple", seed=4, latents=PhiloxNoise(4).normal((1, 4, 6, 8), 0))
    assert np.array_equal(seeded.latents, handed.latents)
    assert "given_latents" in handed.metadata
    assert "given_latents" not in seeded.metadata


def test_every_row_is_an_event_and_the_result_comes_last(make: Any) -> None:
    """Four rows of drawing, one of enlarging, then the result; `on_step` of generate sees the same events."""
    pipeline = make(emoji_like()).pipeline()
    *events, result = pipeline.stream(DrawRequest("red apple"))
    assert isinstance(result, DrawResult)
    rows = [(event.stage, event.row, event.of) for event in events]
    assert rows == [("draw", 0, 4), ("draw", 1, 4), ("draw", 2, 4), ("draw", 3, 4), ("enlarge", 0, 1)]
    assert [event.t for event in events[:4]] == [row[0] for row in compile_stage(emoji_like().stages[0], 4).rows]
    assert np.array_equal(events[3].clean, result.latents)
    assert all(event.seconds >= 0 for event in events)
    seen: list[StepEvent] = []
    again = pipeline.generate("red apple", on_step=seen.append)
    assert [(event.stage, event.row, event.of) for event in seen] == rows
    assert np.array_equal(again.latents, result.latents)


def test_a_result_tells_what_it_cost(make: Any) -> None:
    """Seconds and runs per part, within the seconds in all; opening is counted once."""
    fake = make(emoji_like())
    pipeline = fake.pipeline()
    first, second = pipeline.generate("red apple"), pipeline.generate("red apple", steps=2)
    assert first.stats.runs == {"text_encoder": 1, "unet_w": 4, "pixels": 1, "upscaler": 1}
    assert second.stats.runs["unet_w"] == 2
    assert set(first.stats.opening) == set(first.stats.parts) == set(first.stats.runs)
    assert second.stats.opening == {}
    assert sum(first.stats.parts.values()) <= first.stats.seconds


def test_parts_open_on_first_use_and_close_together(make: Any) -> None:
    """An encoder nobody needs is never opened; after `close` everything opens again."""
    fake = make(lcm_like())
    with fake.pipeline() as pipeline:
        assert fake.opened == []
        pipeline.generate("red apple")
        pipeline.generate("red apple")
        assert fake.opened == ["text_encoder", "unet_w", "decoder"]
    pipeline.generate("red apple", image=PICTURE)
    assert fake.opened[3:] == ["text_encoder", "encoder", "unet_w", "decoder"]


def test_a_saved_picture_can_be_drawn_again(make: Any, tmp_path: Path) -> None:
    """What the file says of picture 2 of a batch is enough to draw that picture alone."""
    pipeline = make(cfg_like()).pipeline()
    result = pipeline.generate("red apple", negative="blurry", batch=3, seed=2**63, steps=2, guidance=2.5, width=32)
    path = result.save(tmp_path / "third.png", 2)
    told = read_png_metadata(path)
    assert told["bundle"] == "sha256:" + "0" * 64
    assert told["sampler"] == "ddim"
    options = ("prompt", "negative", "steps", "guidance", "width", "height", "seed", "seed_mode")
    again = pipeline.generate(**{name: told[name] for name in options}, first_image=told["image"])
    with Image.open(path) as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(again.images[0]))


def with_part(recipe: Recipe, name: str, axes: dict[str, AxisRange] | None = None, **dims: Any) -> Manifest:
    """A manifest in which inputs of a part have other sizes: `x=(1, 4, 6, 8)`."""
    manifest = manifest_of(recipe, axes)
    part = manifest.parts[name]
    changed = [msgspec.structs.replace(s, shape=dims.get(s.name, s.shape)) for s in part.inputs]
    parts = {**manifest.parts, name: msgspec.structs.replace(part, inputs=tuple(changed))}
    return msgspec.structs.replace(manifest, parts=parts)


@pytest.mark.parametrize("rule", ["fixed", "range"])
def test_a_graph_that_takes_one_image_is_run_image_by_image(make: Any, rule: str) -> None:
    """Whether the batch axis is fixed at one or ends there: the pictures are the same, the runs are more."""
    recipe = cfg_like()
    wanted = make(recipe).pipeline().generate("red apple", batch=2)
    axes = {"one": AxisRange(1, 1)} if rule == "range" else None
    one: int | str = "one" if rule == "range" else 1
    fake = make(recipe, with_part(recipe, "unet", axes, x=(one, "c", "h", "w"), t=(one,), hidden=(one, 6, 3)))
    result = fake.pipeline().generate("red apple", batch=2)
    assert [len(call["x"]) for call in fake.calls["unet"]] == [1] * 16
    assert result.stats.runs["unet"] == 16
    assert np.abs(result.latents - wanted.latents).max() < 1e-5


def test_half_precision_inputs_are_cast(make: Any) -> None:
    """A float16 graph is fed float16; what comes back is float32 again."""
    manifest = manifest_of(lcm_like())
    part = manifest.parts["unet_w"]
    halves = tuple(msgspec.structs.replace(spec, dtype="float16") for spec in part.inputs)
    half = msgspec.structs.replace(part, inputs=halves)
    fake = make(lcm_like(), msgspec.structs.replace(manifest, parts={**manifest.parts, "unet_w": half}))
    result = fake.pipeline().generate("red apple", steps=1)
    assert {value.dtype.name for value in fake.calls["unet_w"][0].values()} == {"float16"}
    assert result.latents.dtype == np.float32


BROKEN_SIZES = {
    "a fixed side": ({"x": ("batch", "c", 6, 8)}, None, {"width": 32}, BadRequest, "axis 3 of 'x' would be 4; .* 8"),
    "a side out of range": ({}, {"w": AxisRange(5, 9)}, {"width": 32}, BadRequest, "exported for 5 to 9"),
    "a batch of two": ({"x": (2, "c", "h", "w")}, None, {}, BadRequest, "2 images at a time"),
    "another rank": ({"x": ("batch", "c", "h")}, None, {}, BadManifest, "3 axes"),
}


@pytest.mark.parametrize("name", BROKEN_SIZES)
def test_sizes_the_graph_was_not_exported_for_are_named(make: Any, name: str) -> None:
    """Part, axis, size and the legal ones, instead of an engine's stack of messages."""
    dims, axes, options, error, words = BROKEN_SIZES[name]
    fake = make(lcm_like(), with_part(lcm_like(), "unet_w", axes, **dims))
    with pytest.raises(error, match=words):
        fake.pipeline().generate("red apple", **options)


def test_a_source_has_no_brain_floats(make: Any) -> None:
    """An input of a type numpy does not have is refused by name."""
    manifest = manifest_of(lcm_like())
    part = manifest.parts["unet_w"]
    odd = msgspec.structs.replace(
        part, inputs=(msgspec.structs.replace(part.inputs[0], dtype="bfloat16"), *part.inputs[1:])
    )
    fake = make(lcm_like(), msgspec.structs.replace(manifest, parts={**manifest.parts, "unet_w": odd}))
    with pytest.raises(BadManifest, match="bfloat16"):
        fake.pipeline().generate("red apple")


def test_pictures_of_the_wrong_size_are_the_bundles_fault(make: Any) -> None:
    """An upscaler that enlarges by another factor than the recipe says is found out."""
    fake = make(emoji_like())
    fake.answers["upscaler"] = lambda feeds: {"image": feeds["image"]}
    with pytest.raises(BadManifest, match="16 x 16 pixels; by the recipe they are 64 x 64"):
        fake.pipeline().generate("red apple")


def test_an_encoder_of_another_shape_is_the_bundles_fault(make: Any) -> None:
    """Latents that do not fit the sample are named, not broadcast."""
    fake = make(lcm_like())
    fake.answers["encoder"] = lambda feeds: {"z": encode(feeds)["z"][:, :, :1]}
    with pytest.raises(BadManifest, match="the encoder gives"):
        fake.pipeline().generate("red apple", image=PICTURE)


def test_values_that_overflow_do_not_become_a_picture(make: Any) -> None:
    """NaN out of a decoder is an error with advice, not a black image."""
    fake = make(lcm_like())
    fake.answers["decoder"] = lambda feeds: {"image": decode(feeds)["image"] * np.float32(np.nan)}
    with pytest.raises(SessionFailed, match="float32"):
        fake.pipeline().generate("red apple")


def test_a_text_encoder_needs_a_fixed_length(make: Any) -> None:
    """Prompts of different lengths cannot share a batch; the bundle has to say how long an encoding is."""
    manifest = msgspec.structs.replace(
        manifest_of(lcm_like()), tokenizers={"default": Tokenizer("tokenizer/tokenizer.json", "0" * 64)}
    )
    with pytest.raises(BadManifest, match="fixed length"):
        make(lcm_like(), manifest).pipeline().generate("red apple")


def test_a_named_tokenizer_feeds_its_own_encoder(make: Any) -> None:
    """`@tokens.second` are the ids of the tokenizer called so."""
    second = msgspec.structs.replace(TEXT, feeds={"ids": "@tokens.second"})
    recipe = Recipe(lcm_like().stages, (second,))
    manifest = manifest_of(recipe)
    tokenizers = {**manifest.tokenizers, "second": Tokenizer("tokenizer/tokenizer.json", "0" * 64, 6, 7)}
    fake = make(recipe, msgspec.structs.replace(manifest, tokenizers=tokenizers))
    fake.pipeline().generate("green pear")
    assert fake.calls["text_encoder"][0]["ids"].tolist() == [[*GREEN[:4], 7, 7]]


def test_a_long_prompt_is_cut_and_keeps_its_end_token(make: Any) -> None:
    """As CLIP's pipelines do: the last id is the closing token."""
    fake = make(lcm_like())
    fake.pipeline().generate("red apple green pear red apple green pear")
    assert fake.calls["text_encoder"][0]["ids"].tolist() == [[1, 3, 4, 5, 6, 2]]
