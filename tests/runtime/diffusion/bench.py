"""A bench for recipes: small stages, networks of a line each, and a bundle of them whose feeds are checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from edgekit.bundle.feeds import check_feeds
from edgekit.bundle.manifest import FileEntry, Manifest, Part, Provenance, TensorSpec, Tokenizer
from edgekit.bundle.recipe import (
    Decode,
    Denoise,
    Init,
    Media,
    Recipe,
    Sampler,
    Stage,
)
from edgekit.bundle.store import Bundle
from edgekit.runtime.diffusion.tables import compile_tables
from edgekit.runtime.random import PhiloxNoise
from tests.runtime.diffusion.fakes import LENGTH, Arrays, Studio, encode_text, part, spec, write_tokenizer

Network = tuple[Callable[[Arrays], Arrays], tuple[TensorSpec, ...], tuple[TensorSpec, ...]]

SMALL = Init(channels=2, downscale=1, width=4, height=4)
FLOW = Sampler("flow_euler", 2, (2,), prediction="flow", sigmas=(1.0, 0.5))
X, T, M = spec("x", 2, "h", "w"), spec("t"), spec("m", 2, "h", "w")
FEEDS = {"x": "@x", "t": "@t"}
NET = Denoise("net", FEEDS, "m")
ARRAY = Media("array")
TEXT: Network = (encode_text, (spec("ids", LENGTH, dtype="int64"),), (spec("hidden", LENGTH, 3), spec("pooled", 3)))
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8))


def plain(feeds: Arrays) -> Arrays:
    """A prediction of sample and time."""
    return {"m": (0.3 * feeds["x"] + feeds["t"].reshape(-1, 1, 1, 1) / 1000).astype(np.float32)}


PLAIN: dict[str, Network] = {"net": (plain, (X, T), (M,))}


def stage(**changes: Any) -> Stage:
    """Two flow steps of `net`, changed."""
    return msgspec.structs.replace(Stage("main", SMALL, FLOW, NET), **changes)


def studio(root: Path, recipe: Recipe, networks: dict[str, Network], task: Any = "arrays") -> Studio:
    """A bundle of these networks; its feeds are checked as a real one's are."""
    write_tokenizer(root / "tokenizer" / "tokenizer.json")
    parts: dict[str, Part] = {name: part(name, inputs, outputs) for name, (_, inputs, outputs) in networks.items()}
    manifest = Manifest(
        format=1,
        task=task,
        family="fake",
        parts=parts,
        files=tuple(FileEntry(f"graphs/{name}.onnx", 1000, "0" * 64) for name in parts),
        provenance=Provenance("fakes", "0" * 64),
        tokenizers={"default": Tokenizer("tokenizer/tokenizer.json", "0" * 64, LENGTH, 0)},
        recipe=recipe,
        tables=compile_tables(recipe),
    )
    check_feeds(manifest)
    return Studio(Bundle(root, manifest, "0" * 64), {name: answer for name, (answer, *_) in networks.items()})


def noise(seed: int, draw: int = 0, shape: tuple[int, ...] = (1, 2, 4, 4)) -> np.ndarray:
    """The runtime's unit noise."""
    return PhiloxNoise(seed).normal(shape, draw)


ENCODER: Network = (
    lambda feeds: {"z": feeds["image"][:, :2] * 2 + 1},
    (spec("image", 3, "h", "w"),),
    (spec("z", 2, "h", "w"),),
)


DECODER: Network = (
    lambda feeds: {"p": np.tanh(feeds["z"][:, [0, 1, 0]]).repeat(2, 2).repeat(2, 3)},
    (spec("z", 2, "h", "w"),),
    (spec("p", 3, "H", "W"),),
)
SMALL_DECODER: Network = (lambda feeds: {"p": -DECODER[0](feeds)["p"]}, *DECODER[1:])
LATENT = Init(channels=2, downscale=2, width=8, height=8)


def decoded_stage(**changes: Any) -> Stage:
    """A stage with a decoder and a small one beside it."""
    small = Decode("small", {"z": "@latent"}, "p", scale=2.0)
    return stage(init=LATENT, decode=Decode("decoder", {"z": "@latent"}, "p", preview=small), **changes)
