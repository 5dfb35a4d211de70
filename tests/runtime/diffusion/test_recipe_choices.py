"""What decides how a recipe goes on, and stages that are no table: tokens, blocks, frames of a chain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgekit.bundle.recipe import (
    Accept,
    Blocks,
    Call,
    Decode,
    Denoise,
    Grid,
    Guidance,
    Init,
    NoiseSchedule,
    Rank,
    Recipe,
    Rigid,
    Sampler,
    Select,
    Stage,
    Tokens,
)
from edgekit.errors import BadRequest
from tests.runtime.diffusion.bench import (
    ARRAY,
    DECODER,
    ENCODER,
    LATENT,
    NET,
    PLAIN,
    TEXT,
    Network,
    T,
    X,
    noise,
    stage,
    studio,
)
from tests.runtime.diffusion.fakes import LENGTH, Arrays, spec


def scored(threshold: float) -> tuple[Recipe, dict[str, Network]]:
    """A student, an oracle, and a teacher that starts from the student's picture."""
    networks: dict[str, Network] = {
        **PLAIN,
        "decoder": DECODER,
        "encoder": ENCODER,
        "oracle": (
            lambda feeds: {"score": feeds["picture"].mean((1, 2, 3))},
            (spec("picture", 3, "h", "w"),),
            (spec("score"),),
        ),
    }
    decode = Decode("decoder", {"z": "@latent"}, "p")
    accept = Accept("oracle", {"picture": "@previous"}, "score", threshold)
    init = Init("previous", channels=2, downscale=2, encode=Call("encoder", {"image": "@previous"}), noised=True)
    again = Sampler("flow_euler", 1, (1,), prediction="flow", sigmas=(0.4,))
    teacher = Stage("teacher", init, again, NET)
    return Recipe((stage(init=LATENT, decode=decode, accept=accept), teacher), media=ARRAY), networks


def test_an_oracle_decides_whether_the_teacher_refines(tmp_path: Path) -> None:
    """A score at the threshold stops at the student's picture; below it the teacher goes on from that picture."""
    recipe, networks = scored(-5.0)
    made = studio(tmp_path, recipe, networks)
    student = made.pipeline().generate(seed=1, width=8, height=8).arrays
    assert "encoder" not in made.calls
    recipe, networks = scored(5.0)
    made = studio(tmp_path, recipe, networks)
    teacher = made.pipeline().generate(seed=1, width=8, height=8).arrays
    assert np.array_equal(made.calls["encoder"][0]["image"], student)
    clean = 2 * student[:, :2] + 1
    x = 0.6 * clean + 0.4 * noise(1, 1 << 16, clean.shape)
    assert np.abs(teacher - (x - 0.4 * (0.3 * x + 0.4))).max() <= 1e-5


def test_a_policy_chooses_the_steps_unless_somebody_does(tmp_path: Path) -> None:
    """AdaDiff: the argmax over the prompt's scores; an explicit count is kept; the result says what was chosen."""
    networks: dict[str, Network] = {
        **PLAIN,
        "text": TEXT,
        "policy": (
            lambda feeds: {"scores": np.array([[0.0, 0.0, 1.0]], np.float32)},
            (spec("pooled", 3),),
            (spec("scores", 3),),
        ),
    }
    sampler = Sampler("ddim", 2, (2, 4, 5), noise_schedule=NoiseSchedule(), grid=Grid("trailing"))
    select = Select("policy", {"pooled": "text.pooled"}, "scores", (2, 4, 5))
    recipe = Recipe((stage(sampler=sampler),), (Call("text", {"ids": "@tokens"}),), select=select, media=ARRAY)
    made = studio(tmp_path, recipe, networks)
    result = made.pipeline().generate("red apple")
    assert len(made.calls["net"]) == 5
    assert result.metadata["chosen_steps"] == 5
    made.calls.clear()
    made.pipeline().generate("red apple", steps=4)
    assert len(made.calls["net"]) == 4
    assert "policy" not in made.calls


def test_samples_are_ranked_best_first(tmp_path: Path) -> None:
    """DiffDock's form: a confidence network scores the batch, and the result is in its order."""
    networks: dict[str, Network] = {
        **PLAIN,
        "confidence": (lambda feeds: {"score": feeds["x"].mean((1, 2, 3))}, (X,), (spec("score"),)),
    }
    recipe = Recipe((stage(),), hooks=(Rank("confidence", {"x": "@previous"}, "score"),), media=ARRAY)
    arrays = studio(tmp_path, recipe, networks).pipeline().generate(batch=5, seed=1).arrays
    means = arrays.mean((1, 2, 3))
    assert (np.diff(means) <= 0).all()
    assert len(set(means.tolist())) == 5


def test_tokens_are_drawn_and_decoded(tmp_path: Path) -> None:
    """A masked-token stage: every token decided, guided rows, the decoder fed the ids."""
    networks: dict[str, Network] = {
        "net": (
            lambda feeds: {
                "logits": np.eye(6, dtype=np.float32)[(np.arange(8) % 5)][None].repeat(len(feeds["ids"]), 0) * 99
            },
            (spec("ids", 8, dtype="int64"), spec("hidden", LENGTH, 3)),
            (spec("logits", 8, 6),),
        ),
        "text": TEXT,
        "decoder": (
            lambda feeds: {"p": feeds["ids"].reshape(-1, 1, 2, 4).repeat(3, 1) / np.float32(5)},
            (spec("ids", 8, dtype="int64"),),
            (spec("p", 3, 2, 4),),
        ),
    }
    tokens = Tokens(length=8, vocabulary=6, mask_id=5)
    draw = Stage(
        "tokens",
        Init("mask", downscale=1, width=4, height=2, fixed_size=True, shape=(8,)),
        Sampler("masked_tokens", 3, (1, 3), tokens=tokens),
        Denoise("net", {"ids": "@x", "hidden": "text.hidden"}, "logits"),
        Guidance("cfg", 3.0),
        Decode("decoder", {"ids": "@latent"}, "p"),
    )
    made = studio(tmp_path, Recipe((draw,), (Call("text", {"ids": "@tokens"}),)), networks, "text-to-image")
    result = made.pipeline().generate("red apple", batch=2)
    assert result.latents is not None
    assert result.latents.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]] * 2
    assert [len(call["ids"]) for call in made.calls["net"]] == [4, 4, 4]
    assert (made.calls["net"][0]["ids"] == 5).all()
    assert result.images[0].size == (4, 2)
    with pytest.raises(BadRequest, match="torch-cpu"):
        made.pipeline().generate("red apple", seed_mode="torch-cpu")


def test_blocks_feed_on_what_was_drawn(tmp_path: Path) -> None:
    """Autoregression by blocks: each call sees the block before, and a carried cache; all tokens come out in order."""
    cache = spec("kv", 1)

    def following(feeds: Arrays) -> Arrays:
        count = 2 if feeds["kv"][0, 0] else 1
        logits = np.zeros((len(feeds["ids"]), count, 7), np.float32)
        logits[np.arange(len(logits)), :, (feeds["ids"][:, -1] + 1) % 7] = 99
        return {"logits": logits, "kv": feeds["kv"] + 1}

    networks: dict[str, Network] = {
        "net": (following, (spec("ids", "n", dtype="int64"), cache), (spec("logits", "m", 7), cache))
    }
    draw = Stage(
        "blocks",
        Init("mask", shape=(5,)),
        Sampler("ar_blocks", 1, (1,), blocks=Blocks((1, 2, 2), 7)),
        Denoise("net", {"ids": "@x"}, "logits", carry=("kv",)),
    )
    made = studio(tmp_path, Recipe((draw,), media=ARRAY), networks)
    assert made.pipeline().generate(batch=2).arrays.tolist() == [[1, 2, 2, 3, 3]] * 2
    assert [call["kv"][0, 0] for call in made.calls["net"]] == [0, 1, 2]


def test_frames_of_a_chain_reach_the_predicted_ones(tmp_path: Path) -> None:
    """Rigid frames: the network sees translations and quaternions as one array, and its last answer is the result."""
    target = np.array([1, 2, 3, 0, 0, 0, 1], np.float32)
    networks: dict[str, Network] = {
        "net": (lambda feeds: {"m": feeds["x"] * 0 + target}, (spec("x", 4, 7), T), (spec("m", 4, 7),))
    }
    draw = Stage("rigid", Init("rigid", shape=(4, 7)), Sampler("euler_rigid", 3, (3,), rigid=Rigid(4)), NET)
    made = studio(tmp_path, Recipe((draw,), media=ARRAY), networks)
    result = made.pipeline().generate(batch=2, seed=1)
    assert np.allclose(result.arrays, target)
    assert [float(call["t"][0]) for call in made.calls["net"]] == pytest.approx([0.01, 0.505, 1.0])
