"""A larger model that says the same: a Llama checkpoint widened and deepened with parts that do nothing but cost.

    python benchmarks/enlarge.py models/pycode TARGET [--times 4] [--layers 12] [--seed 0]

The shipped code model becomes one of 308 M parameters with the same logits, so that a draft's acceptance on it is that
of a trained pair and the cost of a step that of a model worth speeding up. Net2Net (Chen et al. 2015) has the idea.

- The residual stream gets channels that stay zero: whatever would write them has zero rows. RMSNorm then divides by a
  root mean square over `times` as many channels, so its weights are divided by sqrt(times) and its epsilon by times.
  `times` is a power of four, so that both are exact in binary.
- Heads and feed-forward channels are added whose outputs meet zero columns of `o_proj` and `down_proj`; query heads and
  key-value heads grow alike, so that every real head keeps its partner.
- Layers are added between the real ones whose `o_proj` and `down_proj` are zero.
- All else is normal noise of the real weights' deviation: kernels, quantizers and caches see an ordinary model.

Real channels come first on every axis and are a multiple of 128, so no block of a quantized matrix, and none of the
activations that it is multiplied by, holds real and idle channels together.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.export.language.weights import Checkpoint

Array = npt.NDArray[Any]

BLOCK = 128  # the largest block of any precision
BESIDE = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
SILENT = ("embed_tokens", "o_proj", "down_proj")  # what writes the residual stream
CHUNK = 1 << 10  # rows of noise drawn at a time
QUIET = 0.25  # of the real weights' deviation: idle weights and activations never set the scale of a whole row


@dataclass(frozen=True)
class Plan:
    """What becomes of a configuration.

    Raises:
        ValueError: a model that cannot be enlarged this way; the message says what is in the way.
    """

    config: dict[str, Any]
    times: int
    layers: int

    def __post_init__(self) -> None:
        config = self.config
        if config["model_type"] != "llama" or config.get("attention_bias") or config.get("mlp_bias"):
            raise ValueError("only a llama without biases can be enlarged")
        if self.times < 1 or 4 ** round(math.log(self.times, 4)) != self.times:
            raise ValueError(f"times is {self.times}; it must be a power of four, so that norms stay exact")
        if self.layers < self.depth:
            raise ValueError(f"layers is {self.layers}; the model has {self.depth} already")
        inner = config["num_attention_heads"] * self.head_dim
        for name, size in {"hidden_size": config["hidden_size"], "heads x head_dim": inner, "ffn": self.ffn}.items():
            if size % BLOCK:
                raise ValueError(f"{name} is {size}; it must be a multiple of {BLOCK}, the largest block")

    @property
    def depth(self) -> int:
        """Layers of the source."""
        return int(self.config["num_hidden_layers"])

    @property
    def ffn(self) -> int:
        """Feed-forward channels of the source."""
        return int(self.config["intermediate_size"])

    @property
    def head_dim(self) -> int:
        """Width of a head, before and after."""
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])

    @property
    def places(self) -> tuple[int, ...]:
        """Where each real layer goes: evenly spread, the first stays first."""
        return tuple(layer * self.layers // self.depth for layer in range(self.depth))

    def enlarged(self) -> dict[str, Any]:
        """The configuration of the larger model."""
        wide = ("hidden_size", "intermediate_size", "num_attention_heads")
        kv_heads = self.config.get("num_key_value_heads") or self.config["num_attention_heads"]
        return {
            **self.config,
            **{name: self.times * self.config[name] for name in wide},
            "num_key_value_heads": self.times * kv_heads,
            "num_hidden_layers": self.layers,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.config["rms_norm_eps"] / self.times,
        }


def enlarge(source: Path, target: Path, *, times: int = 4, layers: int = 12, seed: int = 0) -> int:
    """Write the larger model.

    Args:
        source: folder of a Llama checkpoint in the Hugging Face layout.
        target: folder to make.
        times: how many times as many channels and heads.
        layers: of the larger model.
        seed: of the noise.

    Returns:
        Its number of parameters.

    Raises:
        ValueError: a model that cannot be enlarged this way.
        BadSource: no checkpoint.
    """
    plan = Plan(json.loads((source / "config.json").read_text()), times, layers)
    checkpoint = Checkpoint(source)
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(plan.enlarged(), indent=2) + "\n")
    for name in BESIDE:
        if (source / name).exists():
            shutil.copy(source / name, target / name)
    return write(target / "model.safetensors", list(parts(checkpoint, plan)), np.random.default_rng(seed), plan)


@dataclass(frozen=True)
class Part:
    """One tensor to write: its name, what it is made from, and whether that is kept or serves as a pattern alone."""

    name: str
    pattern: Array
    real: bool

    def shape(self, plan: Plan) -> tuple[int, ...]:
        """Every axis grows but the vocabulary's."""
        grown = tuple(plan.times * size for size in self.pattern.shape)
        return grown if ".layers." in self.name or len(grown) == 1 else (self.pattern.shape[0], *grown[1:])


def parts(checkpoint: Checkpoint, plan: Plan) -> Iterator[Part]:
    """The tensors of the larger model: an added layer is patterned after the real one before it."""
    for name in checkpoint.entries:
        head, layers, tail = name.partition("layers.")
        if not layers:
            yield Part(name, checkpoint.read(name), True)
            continue
        old, _, slot = tail.partition(".")
        start = plan.places[int(old)]
        end = (*plan.places, plan.layers)[int(old) + 1]
        for layer in range(start, end):
            yield Part(f"{head}layers.{layer}.{slot}", checkpoint.read(name), layer == start)


def write(file: Path, tensors: list[Part], random: np.random.Generator, plan: Plan) -> int:
    """A safetensors file, one tensor in memory at a time; the number of values in it."""
    header: dict[str, Any] = {}
    end = count = 0
    for part in tensors:
        shape, kind = part.shape(plan), part.pattern.dtype
        start, end = end, end + math.prod(shape) * kind.itemsize
        count += math.prod(shape)
        header[part.name] = {"dtype": SAFETENSORS[kind.name], "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw)
        for part in tensors:
            out.write(grown(part, random, plan).view(np.uint8).data)
    return count


def grown(part: Part, random: np.random.Generator, plan: Plan) -> Array:
    """A tensor of the larger model, in the type it was stored in."""
    pattern, shape = part.pattern, part.shape(plan)
    if len(shape) == 1:
        return np.tile(pattern.astype(np.float32) / math.sqrt(plan.times), plan.times).astype(pattern.dtype)
    full = np.zeros(shape, pattern.dtype)
    if not any(f"{name}.weight" in part.name for name in SILENT):
        deviation = QUIET * np.resize(pattern.astype(np.float32).std(axis=1), (len(full), 1))
        for at in range(0, len(full), CHUNK):
            rows = full[at : at + CHUNK]
            rows[:] = (random.standard_normal(rows.shape, np.float32) * deviation[at : at + CHUNK]).astype(
                pattern.dtype
            )
    if part.real:
        full[: pattern.shape[0], : pattern.shape[1]] = pattern
    return full


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--times", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    count = enlarge(options.source, options.target, times=options.times, layers=options.layers, seed=options.seed)
    print(f"{options.target}: {count:,} parameters")


if __name__ == "__main__":
    main()
