"""Catalogue entries made small and given networks of their signature: smooth, bounded, and moved by every input."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec
import numpy as np

from edgekit.bundle.catalogue import Entry, Signature
from edgekit.bundle.manifest import FileEntry, Manifest, Part, Provenance, TensorSpec, Tokenizer
from edgekit.bundle.recipe import Init, Recipe, Sampler, Stage
from edgekit.bundle.store import Bundle
from edgekit.runtime.diffusion.tables import compile_tables
from tests.runtime.diffusion.fakes import Studio, write_tokenizer

Arrays = Mapping[str, np.ndarray]
Sizes = dict[str, int]

KEPT = 12  # numbers up to this one stay: channels, coordinates
VOCABULARY = 17
FREE = 4  # axes that nothing in a recipe sets: frames of a mel, agents of a scene, stored samples
SMALL_TILES = 8


def replaced(value: Any, **fields: Any) -> Any:
    """A frozen value with other fields."""
    return msgspec.structs.replace(value, **fields)


class Smaller:
    """One map of sizes for a whole entry, so that what was equal or fitted together still does."""

    def __init__(self, recipe: Recipe) -> None:
        self._sizes: dict[int, int] = {}
        for stage in recipe.stages:
            init, sampler = stage.init, stage.sampler
            for side in (init.width, init.height):
                unit = init.downscale
                self._sizes[side] = min(side, unit * max(4, 16 // unit))
            if init.length > 1:
                self._sizes[init.length] = 12
                self._sizes[init.length * init.downscale] = 12 * init.downscale
            if init.kind == "gaussian":  # its covariance is of the flat sample
                axes = [axis for axis in init.shape if isinstance(axis, int)]
                self._sizes[prod(axes)] = prod(map(self, axes))
            if sampler.tokens is not None:
                self._sizes.setdefault(sampler.tokens.length, 12)
                self._sizes[sampler.tokens.vocabulary] = VOCABULARY
            if sampler.blocks is not None:
                self._sizes[sum(sampler.blocks.sizes)] = sum(self.blocks(sampler.blocks.sizes))
                self._sizes[sampler.blocks.vocabulary] = VOCABULARY

    def __call__(self, size: int) -> int:
        return self._sizes.get(size, size if size <= KEPT else 5 + size % 7)

    @staticmethod
    def blocks(sizes: tuple[int, ...]) -> tuple[int, ...]:
        """As many blocks, of fewer tokens."""
        return tuple(min(size, 4 if len(sizes) > 1 else 12) for size in sizes)


def shrunk(entry: Entry) -> Entry:
    """The same contract at sizes a test can afford: tables, feeds and the order of calls do not change."""
    small = Smaller(entry.recipe)
    recipe = replaced(entry.recipe, stages=tuple(_small_stage(stage, small) for stage in entry.recipe.stages))
    parts = {
        name: Signature(_small_specs(part.inputs, small), _small_specs(part.outputs, small))
        for name, part in entry.parts.items()
    }
    return replaced(entry, recipe=recipe, parts=parts, tokenizers={n: small(k) for n, k in entry.tokenizers.items()})


def _small_specs(specs: tuple[TensorSpec, ...], small: Smaller) -> tuple[TensorSpec, ...]:
    return tuple(
        replaced(spec, shape=tuple(small(dim) if isinstance(dim, int) else dim for dim in spec.shape)) for spec in specs
    )


def _small_stage(stage: Stage, small: Smaller) -> Stage:
    guidance, denoise = stage.guidance, stage.denoise
    if denoise.tiles is not None:
        denoise = replaced(denoise, tiles=replaced(denoise.tiles, size=SMALL_TILES, overlap=2))
    if guidance.dim:
        guidance = replaced(guidance, dim=small(guidance.dim))
    init, sampler = _small_init(stage.init, small), _small_sampler(stage.sampler, small)
    return replaced(stage, init=init, sampler=sampler, denoise=denoise, guidance=guidance)


def _small_init(init: Init, small: Smaller) -> Init:
    fields = {name: small(getattr(init, name)) for name in ("width", "height", "channels", "length")}
    return replaced(init, shape=tuple(small(axis) if isinstance(axis, int) else axis for axis in init.shape), **fields)


def _small_sampler(sampler: Sampler, small: Smaller) -> Sampler:
    tokens, blocks, rigid = sampler.tokens, sampler.blocks, sampler.rigid
    if tokens is not None:
        mask = VOCABULARY - 1 if tokens.mask_id == tokens.vocabulary - 1 else VOCABULARY
        length, top_k = small(tokens.length), min(tokens.top_k, 5)
        tokens = replaced(tokens, length=length, vocabulary=VOCABULARY, mask_id=mask, top_k=top_k)
    if blocks is not None:
        sizes, window, top_k = small.blocks(blocks.sizes), small(blocks.window), min(blocks.top_k, 5)
        blocks = replaced(blocks, sizes=sizes, vocabulary=VOCABULARY, window=window, top_k=top_k)
    if rigid is not None:
        rigid = replaced(rigid, count=small(rigid.count))
    return replaced(sampler, tokens=tokens, blocks=blocks, rigid=rigid)


def manifest_of(entry: Entry) -> Manifest:
    """The manifest a bundle of this entry would have."""
    files = [f"graphs/{name}.onnx" for name in entry.parts] + [f"tokenizer/{name}.json" for name in entry.tokenizers]
    return Manifest(
        format=1,
        task=entry.task,
        family=entry.name,
        parts={name: Part(f"graphs/{name}.onnx", part.inputs, part.outputs) for name, part in entry.parts.items()},
        files=tuple(FileEntry(path, 0, "0" * 64) for path in files),
        provenance=Provenance(entry.source, "0" * 64),
        axes=entry.axes,
        tokenizers={n: Tokenizer(f"tokenizer/{n}.json", "0" * 64, k, 0) for n, k in entry.tokenizers.items()},
        recipe=entry.recipe,
        tables=compile_tables(entry.recipe),
    )


def sizes_of(entry: Entry) -> Sizes:
    """Sizes of the named axes that a recipe sets."""
    init = next((s.init for s in entry.recipe.stages if s.sampler.kind != "direct"), entry.recipe.stages[0].init)
    blocks = max((max(s.sampler.blocks.sizes) for s in entry.recipe.stages if s.sampler.blocks is not None), default=1)
    return {
        "height": init.height // init.downscale,
        "width": init.width // init.downscale,
        "image_height": init.height,
        "image_width": init.width,
        "frames": init.frames,
        "length": init.length,
        "block": blocks,
    }


def resolved(spec: TensorSpec, sizes: Sizes) -> tuple[int, ...]:
    """A shape in numbers; a dimension is a number, a name, or names and numbers with one operator between each two."""
    return tuple(dim if isinstance(dim, int) else _value(dim, sizes) for dim in spec.shape)


def _value(dim: str, sizes: Sizes) -> int:
    first, *rest = re.findall(r"\w+|[+*/-]", dim)
    value = sizes.get(first, FREE)
    for operator, word in zip(rest[::2], rest[1::2], strict=True):
        other = int(word) if word.isdigit() else sizes.get(word, FREE)
        value = {"*": value * other, "/": value // other, "+": value + other, "-": value - other}[operator]
    return value


class RandomNetwork:
    """Answers with tanh of a fixed pattern, of a sum over every input, and of the input that has the output's shape."""

    def __init__(self, name: str, signature: Signature, sizes: Sizes) -> None:
        self._signature, self._sizes, self._seed = signature, sizes, crc32(name.encode()) % 997

    def __call__(self, feeds: Arrays) -> Arrays:
        """Every output, batch element by batch element."""
        sizes = dict(self._sizes)
        pull: Any = 0.0
        for number, spec in enumerate(self._signature.inputs, start=1):
            value = feeds[spec.name]
            sizes |= {dim: size for dim, size in zip(spec.shape, value.shape, strict=True) if isinstance(dim, str)}
            flat = value.reshape(len(value), -1).astype(np.float64)
            weights = np.sin(number + self._seed + 1.7 * np.arange(flat.shape[1]))
            pull = pull + np.sin(flat @ weights / np.sqrt(len(weights)))
        return {spec.name: self._answer(spec, resolved(spec, sizes), pull, feeds) for spec in self._signature.outputs}

    def _answer(self, spec: TensorSpec, shape: tuple[int, ...], pull: Any, feeds: Arrays) -> np.ndarray:
        pattern = np.sin(self._seed + np.arange(np.prod(shape[1:], dtype=int)) * 0.9).reshape(shape[1:])
        value = np.broadcast_to(pattern, shape) + np.reshape(pull, (-1, *[1] * (len(shape) - 1)))
        twin = [a for a in feeds.values() if a.shape == shape and a.dtype.kind == "f"]
        value = value + (0.7 * twin[0] if twin else 0)
        return np.tanh(value).astype(spec.dtype)


def studio_of(root: Path, entry: Entry) -> Studio:
    """A bundle of an entry whose networks are random, and a record of what they are fed."""
    for name in entry.tokenizers:
        write_tokenizer(root / "tokenizer" / f"{name}.json")
    networks = {name: RandomNetwork(name, part, sizes_of(entry)) for name, part in entry.parts.items()}
    scored = {s.sampler.tokens.confidence for s in entry.recipe.stages if s.sampler.tokens is not None}
    answers: Any = {name: positive(net) if name in scored else net for name, net in networks.items()}
    return Studio(Bundle(root, manifest_of(entry), "0" * 64), answers)


def positive(network: RandomNetwork) -> Any:
    """A network of scores in (0, 1)."""
    return lambda feeds: {name: ((1.001 + value) / 2.002) for name, value in network(feeds).items()}
