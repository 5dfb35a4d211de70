"""What a recipe may ask for in every row: networks, carried tensors, known entries, guidance."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgekit.bundle.recipe import (
    Call,
    Denoise,
    Dynamic,
    Guidance,
    Recipe,
)
from edgekit.errors import BadRequest
from edgekit.runtime.diffusion.guidance import dynamic_scale, w_embedding
from tests.runtime.diffusion.bench import (
    ARRAY,
    FEEDS,
    FLOW,
    NET,
    PICTURE,
    PLAIN,
    TEXT,
    M,
    Network,
    T,
    X,
    noise,
    plain,
    stage,
    studio,
)
from tests.runtime.diffusion.fakes import LENGTH, Arrays, encode_text, spec


def test_rows_may_have_networks_of_their_own(tmp_path: Path) -> None:
    """`nets` names the part of each row; a variant with fewer inputs is fed those it has."""
    networks: dict[str, Network] = {
        **PLAIN,
        "late": (lambda feeds: {"m": feeds["x"] * 0 + 1}, (X,), (M,)),
    }
    sampler = msgspec.structs.replace(FLOW, nets=("net", "late"))
    made = studio(tmp_path, Recipe((stage(sampler=sampler),), media=ARRAY), networks)
    result = made.pipeline().generate(seed=1)
    x = noise(1)
    x = x - 0.5 * (0.3 * x + 1)
    assert np.abs(result.arrays - (x - 0.5)).max() <= 1e-6
    assert [len(made.calls[name]) for name in ("net", "late")] == [1, 1]
    assert set(made.calls["late"][0]) == {"x"}


def test_carried_tensors_come_back_in_the_next_row(tmp_path: Path) -> None:
    """An output named in `carry` is zeros in the first row and the row before's answer after it."""
    cache = spec("cache", 2, "h", "w")

    def counting(feeds: Arrays) -> Arrays:
        return {"m": feeds["cache"], "cache": feeds["cache"] + 1}

    networks: dict[str, Network] = {"net": (counting, (X, cache), (M, cache))}
    net = Denoise("net", {"x": "@x"}, "m", carry=("cache",))
    made = studio(tmp_path, Recipe((stage(denoise=net),), media=ARRAY), networks)
    result = made.pipeline().generate(seed=1, batch=2)
    fed = [call["cache"] for call in made.calls["net"]]
    assert [float(value.mean()) for value in fed] == [0.0, 1.0]
    assert np.abs(result.arrays[:1] - (noise(1) - 0.5)).max() <= 1e-6


def test_known_entries_are_held(tmp_path: Path) -> None:
    """`fixed` entries are the given ones before every row and at the end; NaN leaves the rest free."""
    net = msgspec.structs.replace(NET, fixed="@input.known")
    made = studio(tmp_path, Recipe((stage(denoise=net),), media=ARRAY), PLAIN)
    known = np.full((1, 2, 4, 4), np.nan, np.float32)
    known[:, 0, 0] = 5
    result = made.pipeline().generate(seed=1, inputs={"known": known})
    assert (result.arrays[:, 0, 0] == 5).all()
    assert all((call["x"][:, 0, 0] == 5).all() for call in made.calls["net"])
    assert np.abs(result.arrays[:, 1]).max() < 5
    with pytest.raises(BadRequest, match="known entries"):
        made.pipeline().generate(inputs={"known": known[..., :2]})


def test_inputs_are_asked_for_by_name(tmp_path: Path) -> None:
    """A missing array, one too many and one of another batch are refused with the names there are."""
    net = msgspec.structs.replace(NET, fixed="@input.known")
    pipeline = studio(tmp_path, Recipe((stage(denoise=net),), media=ARRAY), PLAIN).pipeline()
    good = np.zeros((1, 2, 4, 4), np.float32)
    for wrong in ({}, {"known": good, "other": good}):
        with pytest.raises(BadRequest, match="takes known"):
            pipeline.generate(inputs=wrong)
    with pytest.raises(BadRequest, match="batch"):
        pipeline.generate(inputs={"known": np.zeros((3, 2, 4, 4), np.float32)}, batch=2)


CONTROLLED: dict[str, Network] = {
    "control": (
        lambda feeds: {"residual": feeds["picture"][:, :2] * feeds["scale"].reshape(-1, 1, 1, 1) + 0 * feeds["x"]},
        (X, spec("picture", 3, "h", "w"), spec("scale")),
        (spec("residual", 2, "h", "w"),),
    ),
    "net": (
        lambda feeds: {"m": feeds["residual"] + feeds["hidden"].mean((1, 2)).reshape(-1, 1, 1, 1) + 0 * feeds["x"]},
        (X, spec("residual", 2, "h", "w"), spec("hidden", LENGTH, 3)),
        (M,),
    ),
    "text": TEXT,
}


def test_a_network_may_run_before_the_denoiser_in_every_row(tmp_path: Path) -> None:
    """ControlNet's residuals reach both halves of a guided row; the scale multiplies them; the picture is in [0, 1],
    and may be left out where the scale is said to be 0."""
    call = Call("control", {"x": "@x", "picture": "@control", "scale": "@control_scale"})
    net = Denoise("net", {"x": "@x", "residual": "control.residual", "hidden": "text.hidden"}, "m", before=(call,))
    recipe = Recipe(
        (stage(denoise=net, guidance=Guidance("cfg", 3.0, maximum=9.0)),), (Call("text", {"ids": "@tokens"}),)
    )
    recipe = msgspec.structs.replace(recipe, media=ARRAY)
    made = studio(tmp_path, recipe, CONTROLLED)
    half = made.pipeline().generate("red apple", negative="blurry", control=PICTURE, control_scale=0.5, seed=2).arrays
    fed = made.calls["control"]
    assert len(fed) == 2
    assert all(len(call["x"]) == 2 for call in fed)
    assert np.allclose(fed[0]["picture"][0], np.asarray(PICTURE).transpose(2, 0, 1) / 255, atol=1e-6)
    whole = made.pipeline().generate("red apple", negative="blurry", control=PICTURE, seed=2).arrays
    pixels = np.asarray(PICTURE).transpose(2, 0, 1)[None, :2] / 255
    assert np.abs((half - whole) - 0.5 * pixels).max() <= 1e-5
    without = made.pipeline().generate("red apple", negative="blurry", control_scale=0.0, seed=2).arrays
    assert np.abs((without - half) - 0.5 * pixels).max() <= 1e-5
    with pytest.raises(BadRequest, match="needs a control picture"):
        made.pipeline().generate("red apple")
    with pytest.raises(BadRequest, match="needs a control picture"):
        made.pipeline().generate("red apple", control_scale=0.5)


def test_a_picture_that_nothing_follows_is_refused(tmp_path: Path) -> None:
    """Control pictures and their scale are for bundles that take them."""
    pipeline = studio(tmp_path, Recipe((stage(),), media=ARRAY), PLAIN).pipeline()
    with pytest.raises(BadRequest, match="takes no control picture"):
        pipeline.generate(control=PICTURE)
    with pytest.raises(BadRequest, match="control_scale"):
        pipeline.generate(control_scale=0.5)
    with pytest.raises(BadRequest, match="takes no reference picture"):
        pipeline.generate(reference=PICTURE)
    with pytest.raises(BadRequest, match="reference_scale cannot act"):
        pipeline.generate(reference_scale=0.5)
    with pytest.raises(BadRequest, match="reference_scale is nan"):
        pipeline.generate(reference_scale=float("nan"))


SEEING: dict[str, Network] = {
    "eye": (
        lambda feeds: {"mean": feeds["image"].mean((2, 3))},
        (spec("image", 3, 6, 6),),
        (spec("mean", 3),),
    ),
    "net": (
        lambda feeds: {"m": (feeds["mean"][:, :2] * feeds["scale"][:, None])[..., None, None] + 0 * feeds["x"]},
        (X, spec("mean", 3), spec("scale")),
        (M,),
    ),
    "text": TEXT,
}


def test_a_reference_picture_is_looked_at_once(tmp_path: Path) -> None:
    """Its middle square, in [0, 1] and as large as the graph says, for all pictures of a batch; the negative half sees
    nothing where the recipe says so; the scale is each picture's, 1 unless said; without a picture it must be 0."""
    net = Denoise("net", {"x": "@x", "mean": "eye.mean", "scale": "@reference_scale"}, "m")
    guidance = Guidance("cfg", 3.0, maximum=9.0, zero_negative=("eye.mean",))
    conditions = (Call("text", {"ids": "@tokens"}), Call("eye", {"image": "@reference"}))
    made = studio(tmp_path, Recipe((stage(denoise=net, guidance=guidance),), conditions, media=ARRAY), SEEING)
    pipeline, wide = made.pipeline(), PICTURE.resize((9, 6))
    asked = {"prompt": "red apple", "negative": "blurry", "seed": 2, "batch": 2}
    drawn = {scale: pipeline.generate(reference=wide, reference_scale=scale, **asked).arrays for scale in (0.0, 0.5)}
    (seen,) = made.calls["eye"][:1]
    pixels = np.asarray(wide.crop((1, 0, 7, 6)), np.float32).transpose(2, 0, 1) / 255
    assert np.abs(seen["image"] - pixels[None]).max() <= 1e-6
    assert [len(call["x"]) for call in made.calls["net"]] == [4] * 4
    assert not made.calls["net"][0]["mean"][:2].any()
    moved = 3 * 0.5 * pixels.mean((1, 2))[:2]  # guidance three, from nothing
    assert np.abs(drawn[0.0] - drawn[0.5] - moved[None, :, None, None]).max() <= 1e-5
    whole = pipeline.generate(reference=wide, **asked)
    assert np.abs(drawn[0.0] - whole.arrays - 2 * moved[None, :, None, None]).max() <= 1e-5
    assert whole.metadata["reference_scale"] == 1.0
    assert whole.metadata["given_reference"].startswith("sha256:")
    assert np.array_equal(pipeline.generate(reference_scale=0.0, **asked).arrays, drawn[0.0])
    for given in ({}, {"reference_scale": 0.5}):
        with pytest.raises(BadRequest, match=r"needs a reference picture.*or say reference_scale 0"):
            pipeline.generate(**asked, **given)


def test_constants_are_fed_to_every_picture(tmp_path: Path) -> None:
    """A row of the recipe's constants is repeated over the batch."""
    networks: dict[str, Network] = {"net": (lambda feeds: {"m": feeds["x"] * 0}, (X, spec("c", 3)), (M,))}
    net = Denoise("net", {"x": "@x", "c": "@const.fps"}, "m")
    recipe = Recipe((stage(denoise=net),), constants={"fps": (7.0, 127.0, 0.02)}, media=ARRAY)
    made = studio(tmp_path, recipe, networks)
    made.pipeline().generate(batch=3)
    assert np.allclose(made.calls["net"][0]["c"], [[7, 127, 0.02]] * 3)


def test_random_inputs_are_new_in_every_row_and_the_pictures_own(tmp_path: Path) -> None:
    """@random noise differs from row to row, and picture 1 of a batch has what it has alone."""
    networks: dict[str, Network] = {
        "net": (lambda feeds: {"m": feeds["z"].mean(1).reshape(-1, 1, 1, 1) + 0 * feeds["x"]}, (X, spec("z", 9)), (M,))
    }
    net = Denoise("net", {"x": "@x", "z": "@random.z"}, "m")
    made = studio(tmp_path, Recipe((stage(denoise=net),), media=ARRAY), networks)
    both = made.pipeline().generate(batch=2, seed=4).arrays
    first, second = (call["z"] for call in made.calls["net"])
    assert np.abs(first - second).min() > 0
    alone = made.pipeline().generate(seed=4, first_image=1).arrays
    assert np.array_equal(alone[0], both[1])


def test_guidance_may_ramp_over_rows_and_fade_with_noise(tmp_path: Path) -> None:
    """The embedded scale goes from `start` to the scale; a dynamic one is the floor at high noise."""
    networks: dict[str, Network] = {"net": (plain, (X, T, spec("g")), (M,))}
    net = Denoise("net", {**FEEDS, "g": "@guidance"}, "m")
    ramp = Guidance("embedded", 4.0, factor=0.1, ramp="rows", start=2.0, minimum=0.0)
    made = studio(tmp_path, Recipe((stage(denoise=net, guidance=ramp),), media=ARRAY), networks)
    made.pipeline().generate(guidance=6.0)
    assert np.allclose([call["g"][0] for call in made.calls["net"]], [0.2, 0.6])
    dynamic = Dynamic(0.2, 0.8)
    assert [dynamic_scale(t, 10.0, dynamic) for t in (100.0, 500.0, 900.0)] == pytest.approx([10.0, 5.0, 0.0])


def test_a_row_of_w_embeddings_follows_the_dynamic_scale(tmp_path: Path) -> None:
    """iCD: the embedding of the first row is the floor's, of the last the full scale's."""
    networks: dict[str, Network] = {"net": (plain, (X, T, spec("w", 8)), (M,))}
    net = Denoise("net", {**FEEDS, "w": "@w_embedding"}, "m")
    guidance = Guidance("w_embedding", 7.0, dim=8, shift=0.0, minimum=0.0, dynamic=Dynamic(0.6, 0.9))
    made = studio(tmp_path, Recipe((stage(denoise=net, guidance=guidance),), media=ARRAY), networks)
    made.pipeline().generate()
    first, second = (call["w"][0] for call in made.calls["net"])
    assert np.array_equal(first, w_embedding(0.0, 8, 0.0))
    assert np.array_equal(second, w_embedding(7.0, 8, 0.0))


def test_negative_tokens_may_be_joined(tmp_path: Path) -> None:
    """SpeedUpNet: one call, with the prompt's states first and the negative prompt's after them."""
    networks: dict[str, Network] = {"net": (plain, (X, T, spec("hidden", 2 * LENGTH, 3)), (M,)), "text": TEXT}
    net = Denoise("net", {**FEEDS, "hidden": "text.hidden"}, "m")
    guidance = Guidance("concat_tokens", joined=("text.hidden",))
    recipe = Recipe((stage(denoise=net, guidance=guidance),), (Call("text", {"ids": "@tokens"}),), media=ARRAY)
    made = studio(tmp_path, recipe, networks)
    made.pipeline().generate("red apple", negative="blurry", batch=2)
    (fed, _), (text,) = made.calls["net"], made.calls["text"]
    assert len(fed["x"]) == 2
    hidden = encode_text(text)["hidden"]
    assert np.array_equal(fed["hidden"][0], np.concatenate([hidden[1], hidden[0]]))
