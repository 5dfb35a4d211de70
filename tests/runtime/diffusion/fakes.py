"""Bundles whose networks are Python functions: the whole pipeline with no engine, no graph file and no device."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.bundle.manifest import AxisRange, FileEntry, Manifest, Part, Provenance, TensorSpec, Tokenizer
from edgekit.bundle.recipe import Call, Decode, Denoise, Grid, Guidance, Init, NoiseSchedule, Recipe, Sampler, Stage
from edgekit.bundle.store import Bundle
from edgekit.runtime.backends.fake import FakeSession
from edgekit.runtime.diffusion.pipeline import FewStepPipeline
from edgekit.runtime.diffusion.tables import compile_tables

Arrays = Mapping[str, np.ndarray]
WORDS = ["<pad>", "<s>", "</s>", "red", "apple", "green", "pear", "blurry"]
LENGTH, WIDTH = 6, 3  # ids of a prompt, numbers per id


def encode_text(feeds: Arrays) -> Arrays:
    """A hidden state per token that depends on all tokens."""
    ids = feeds["ids"].astype(np.float32)
    hidden = np.sin(ids[:, :, None] * np.arange(1, WIDTH + 1, dtype=np.float32) + ids.sum(1)[:, None, None])
    return {"hidden": hidden.astype(np.float32), "pooled": hidden.mean(1).astype(np.float32)}


def denoise(feeds: Arrays) -> Arrays:
    """Each image alone: a smooth function of its sample, time, text and whatever else is fed."""
    x = feeds["x"].astype(np.float32)
    pull = feeds["t"] / 1000
    for name in ("hidden", "pooled", "w", "time_ids"):
        if name in feeds:
            value = feeds[name].reshape(len(x), -1).astype(np.float32)
            pull = pull + np.sin(value * np.arange(1, value.shape[1] + 1)).sum(1)
    return {"m": np.tanh(x * 0.7 + pull[:, None, None, None]).astype(feeds["x"].dtype)}


def shuffle(feeds: Arrays) -> Arrays:
    """(B, 12, H, W) to (B, 3, 2H, 2W)."""
    z = feeds["z"]
    b, _, h, w = z.shape
    return {"image": z.reshape(b, 3, 2, 2, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(b, 3, 2 * h, 2 * w)}


def decode(feeds: Arrays) -> Arrays:
    """(B, 4, h, w) to (B, 3, 8h, 8w)."""
    return {"image": np.tanh(feeds["z"][:, :3].repeat(8, 2).repeat(8, 3))}


def encode(feeds: Arrays) -> Arrays:
    """(B, 3, 8h, 8w) to (B, 4, h, w)."""
    image = feeds["image"]
    b, _, h, w = image.shape
    small = image.reshape(b, 3, h // 8, 8, w // 8, 8).mean((3, 5))
    return {"z": np.concatenate([small, small[:, :1]], axis=1).astype(np.float32)}


def enlarge(feeds: Arrays) -> Arrays:
    """Four times as wide and high, and a little brighter."""
    return {"image": (feeds["image"] * 0.9 + 0.05).astype(np.float32).repeat(4, 2).repeat(4, 3)}


def spec(name: str, *shape: int | str, dtype: Any = "float32") -> TensorSpec:
    """A tensor with a dynamic batch."""
    return TensorSpec(name, dtype, ("batch", *shape))


def part(name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Part:
    """A part whose graph file would be called like it."""
    return Part(f"graphs/{name}.onnx", inputs, outputs)


IDS, HIDDEN = spec("ids", LENGTH, dtype="int64"), spec("hidden", LENGTH, WIDTH)
X, T, M, Z = spec("x", "c", "h", "w"), spec("t"), spec("m", "c", "h", "w"), spec("z", "c", "h", "w")
IMAGE, POOLED = spec("image", 3, "height", "width"), spec("pooled", WIDTH)
PARTS = {
    "text_encoder": (encode_text, part("text_encoder", (IDS,), (HIDDEN, POOLED))),
    "unet": (denoise, part("unet", (X, T, HIDDEN), (M,))),
    "unet_w": (denoise, part("unet_w", (X, T, HIDDEN, spec("w", 16)), (M,))),
    "unet_xl": (denoise, part("unet_xl", (X, T, HIDDEN, POOLED, spec("time_ids", 6)), (M,))),
    "pixels": (shuffle, part("pixels", (spec("z", 12, "h", "w"),), (IMAGE,))),
    "decoder": (decode, part("decoder", (Z,), (IMAGE,))),
    "encoder": (encode, part("encoder", (IMAGE,), (Z,))),
    "upscaler": (enlarge, part("upscaler", (IMAGE,), (IMAGE,))),
}

TEXT = Call("text_encoder", {"ids": "@tokens"})
FEEDS = {"x": "@x", "t": "@t", "hidden": "text_encoder.hidden"}
LATENT = Init(channels=4, downscale=8, width=64, height=48)
ENCODED = Init(
    channels=4, downscale=8, width=64, height=48, encode=Call("encoder", {"image": "@image"}), scale=0.5, shift=0.1
)
DECODE = Decode("decoder", {"z": "@latent"}, "image", scale=0.5, shift=0.1)
UPSCALE = Stage(
    "enlarge",
    Init("previous"),
    Sampler("direct", 1, (1,)),
    Denoise("upscaler", {"image": "@previous"}, "image"),
    upscale=4,
)


def emoji_like() -> Recipe:
    """Flow steps on unshuffled pixels with an embedded guidance scale, then an upscaler."""
    sampler = Sampler("flow_stochastic", 4, (1, 2, 4, 8), prediction="flow", grid=Grid("flow"))
    draw = Stage(
        "draw",
        Init(channels=12, downscale=2, width=16, height=16, fixed_size=True),
        sampler,
        Denoise("unet_w", {**FEEDS, "w": "@w_embedding"}, "m"),
        Guidance("w_embedding", scale=2.0, dim=16, maximum=8.0),
        Decode("pixels", {"z": "@latent"}, "image"),
    )
    return Recipe((draw, UPSCALE), (TEXT,))


def lcm_like() -> Recipe:
    """A latent consistency model: embedded guidance scale, decoder, and an encoder for image-to-image."""
    sampler = Sampler("lcm", 4, (1, 2, 4, 8), noise_schedule=NoiseSchedule(), grid=Grid("lcm"))
    net = Denoise("unet_w", {**FEEDS, "w": "@w_embedding"}, "m")
    guidance = Guidance("w_embedding", scale=8.5, dim=16)
    return Recipe((Stage("draw", ENCODED, sampler, net, guidance, DECODE),), (TEXT,))


def cfg_like(**options: Any) -> Recipe:
    """Stable Diffusion with classifier-free guidance on a trailing DDIM grid."""
    sampler = Sampler("ddim", 4, (2, 4), noise_schedule=NoiseSchedule(), grid=Grid("trailing"))
    guidance = Guidance("cfg", scale=5.0, maximum=10.0, **options)
    return Recipe((Stage("draw", ENCODED, sampler, Denoise("unet", FEEDS, "m"), guidance, DECODE),), (TEXT,))


def turbo_like() -> Recipe:
    """SDXL-Turbo: no guidance, pooled text and sizes beside the hidden states."""
    sampler = Sampler("euler_ancestral", 1, (1, 2, 4), noise_schedule=NoiseSchedule(), grid=Grid("trailing"))
    feeds = {**FEEDS, "pooled": "text_encoder.pooled", "time_ids": "@time_ids"}
    return Recipe((Stage("draw", LATENT, sampler, Denoise("unet_xl", feeds, "m"), decode=DECODE),), (TEXT,))


def upscaler() -> Recipe:
    """Super-resolution alone: the given picture through one network."""
    init, net = Init("input", width=20, height=20), Denoise("upscaler", {"image": "@image"}, "image")
    return Recipe((Stage("enlarge", init, Sampler("direct", 1, (1,)), net, upscale=4),))


RECIPES = {
    "emoji": emoji_like,
    "lcm": lcm_like,
    "cfg": cfg_like,
    "turbo": turbo_like,
    "upscaler": upscaler,
}


def parts_of(recipe: Recipe) -> list[str]:
    """Names of the parts a recipe runs."""
    calls: list[Any] = [*recipe.conditions]
    for stage in recipe.stages:
        calls += [call for call in (stage.init.encode, stage.denoise, stage.decode) if call is not None]
    return list(dict.fromkeys(call.part for call in calls))


def manifest_of(recipe: Recipe, axes: Mapping[str, AxisRange] | None = None) -> Manifest:
    """The manifest of a fake bundle."""
    names = parts_of(recipe)
    text = "text_encoder" in names
    files = [f"graphs/{name}.onnx" for name in names] + ["tokenizer/tokenizer.json"] * text
    return Manifest(
        format=1,
        task="text-to-image" if text else "super-resolution",
        family="fake",
        parts={name: PARTS[name][1] for name in names},
        files=tuple(FileEntry(path, 0, "0" * 64) for path in files),
        provenance=Provenance("fakes", "0" * 64),
        axes=dict(axes or {}),
        tokenizers={"default": Tokenizer("tokenizer/tokenizer.json", "0" * 64, LENGTH, 0)} if text else {},
        recipe=recipe,
        tables=compile_tables(recipe),
    )


def write_tokenizer(path: Path) -> None:
    """Words split at spaces, between `<s>` and `</s>`, as CLIP's tokenizer puts its own around."""
    ids = {word: number for number, word in enumerate(WORDS)}
    special = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in ("<s>", "</s>")}
    around = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    single = [*around, {"SpecialToken": {"id": "</s>", "type_id": 0}}]
    added = [{"id": i, "content": w, "single_word": False, "lstrip": False, "rstrip": False} for w, i in ids.items()]
    made = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**token, "normalized": False, "special": True} for token in added[:3]],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special},
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": "<pad>"},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made))


@dataclass
class Studio:
    """A fake bundle, its pipeline, and a record of what its networks were fed."""

    bundle: Bundle
    answers: dict[str, Callable[[Arrays], Arrays]]
    calls: dict[str, list[dict[str, np.ndarray]]] = field(default_factory=dict)
    opened: list[str] = field(default_factory=list)

    def open_session(self, graph: Path, device: str, *, threads: int = 0) -> FakeSession:
        """The backend seam."""
        name = graph.stem
        self.opened.append(name)
        known = self.bundle.manifest.parts[name]

        def answer(feeds: Arrays) -> Arrays:
            self.calls.setdefault(name, []).append({key: value.copy() for key, value in feeds.items()})
            return self.answers[name](feeds)

        return FakeSession(answer, known.inputs, known.outputs)

    def pipeline(self) -> FewStepPipeline:
        """A pipeline on the fake networks."""
        return FewStepPipeline(self.bundle, open_session=self.open_session)


def studio(root: Path, recipe: Recipe, manifest: Manifest | None = None) -> Studio:
    """Make a fake bundle in a folder."""
    write_tokenizer(root / "tokenizer" / "tokenizer.json")
    manifest = manifest or manifest_of(recipe)
    return Studio(Bundle(root, manifest, "0" * 64), {name: PARTS[name][0] for name in manifest.parts})
