"""A catalogue entry on its random networks: requests that give all it asks for, and how often each part should run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgekit.bundle.catalogue import Entry
from edgekit.bundle.recipe import TABLE_FREE, Denoise, Retrieve, Stage
from edgekit.runtime.diffusion.contract import Contract
from edgekit.runtime.diffusion.result import DrawResult
from edgekit.runtime.diffusion.tables import compile_stage
from edgekit.runtime.diffusion.tiles import boxes
from tests.runtime.diffusion.fakes import Studio
from tests.runtime.diffusion.random_networks import replaced, resolved, shrunk, sizes_of, studio_of

BATCH = 2
NEVER, ALWAYS = 2.0, -2.0  # thresholds no random score reaches, or misses


@dataclass
class Bench:
    """An entry made small, and a bundle of it whose networks are random."""

    entry: Entry
    studio: Studio

    @property
    def contract(self) -> Contract:
        """What the recipe allows."""
        return Contract.of(self.entry.recipe)

    def draw(self, **options: Any) -> DrawResult:
        """One request with everything the recipe asks for; arrays are those of the batch places asked for."""
        contract = self.contract
        batch, first = options.setdefault("batch", BATCH), options.get("first_image", 0)
        guidance, init = contract.guide.guidance, contract.main.init
        if self.entry.tokenizers:
            options["prompt"] = "red apple"
            if guidance.kind == "concat_tokens" or (guidance.kind == "cfg" and guidance.scale > 1):
                options["negative"] = "green pear"
        if contract.needs_picture:
            options["image"] = picture(init.width, init.height)
        if "@inpaint_mask" in set(contract.sources()):
            options["mask"] = Image.fromarray(np.tri(init.height, init.width, dtype=np.uint8) * 255)
        options["inputs"] = {name: value[first : first + batch] for name, value in self._arrays().items()}
        with self.studio.pipeline() as pipeline:
            return pipeline.generate(**options)

    def _arrays(self) -> dict[str, np.ndarray]:
        """What a caller gives: of the shape a graph declares, or of the sample and half free where it is held fixed."""
        rng, sizes, given = np.random.default_rng(1), sizes_of(self.entry), {}
        declared = {
            source: spec
            for part, feeds in calls(self.entry)
            for spec in self.entry.parts[part].inputs
            if (source := feeds.get(spec.name, "")).startswith("@input.")
        }
        for name in self.contract.inputs:
            spec = declared.get(f"@input.{name}")
            if spec is None:
                axes = self.contract.main.init.shape
                value = rng.normal(size=(BATCH, *(axis if isinstance(axis, int) else sizes[axis] for axis in axes)))
                value[:, 1:] = np.nan
                given[name] = value.astype(np.float32)
                continue
            shape = (BATCH, *resolved(spec, sizes)[1:])
            value = rng.normal(size=shape) if spec.dtype == "float32" else rng.integers(1, 9, shape)
            given[name] = value.astype(spec.dtype)
        return given

    @property
    def is_noisy(self) -> bool:
        """Whether anything is drawn at random: a start, a row's noise, a random input, tokens, frames."""
        for stage in self.entry.recipe.stages:
            if any(source.startswith("@random.") for source in stage.denoise.feeds.values()):
                return True
            if stage.sampler.kind in TABLE_FREE and stage.sampler.kind != "direct":
                return True
            if stage.sampler.kind not in TABLE_FREE:
                table = compile_stage(stage, stage.sampler.steps)
                if table.init_scale or any(row[7] for row in table.rows):
                    return True
        return False

    def expected_runs(self, steps: int, *, asked: bool) -> Counter[str]:
        """How often every part runs for `steps`; `asked` says that the request named the count."""
        recipe, contract = self.entry.recipe, self.contract
        runs = Counter(call.part for call in recipe.conditions)
        if recipe.select is not None and not asked:
            runs[recipe.select.part] += 1
        enlarged = 1
        for stage in recipe.stages:
            enlarged *= stage.init.resize.factor if stage.init.resize is not None else 1
            nets = self._nets(stage, steps if stage is contract.main else stage.sampler.steps)
            for part in nets:
                runs[part] += self._tiles(stage, enlarged)
            for call in stage.denoise.before:
                runs[call.part] += len(nets)
            tokens = stage.sampler.tokens
            if tokens is not None and tokens.confidence is not None:
                runs[tokens.confidence] += len(nets) - tokens.codebooks
            if stage.init.encode is not None and stage.init.kind != "noise":
                runs[stage.init.encode.part] += 1
            runs.update(call.part for call in (stage.decode, stage.accept) if call is not None)
            if stage.decode is not None and stage.decode.chunk:
                runs[stage.decode.part] += (stage.init.frames - 1) // stage.decode.chunk
        runs.update(hook.part for hook in recipe.hooks if isinstance(hook, Retrieve))
        return runs

    def _nets(self, stage: Stage, steps: int) -> list[str]:
        """The part of every row that is run."""
        sampler = stage.sampler
        if sampler.kind in TABLE_FREE:
            return [stage.denoise.part] * self._table_free_rows(stage, steps)
        table = compile_stage(stage, steps)
        rows = list(range(len(table.rows)))
        for hook in self.entry.recipe.hooks:
            if isinstance(hook, Retrieve):
                rows = [row for row in rows if row <= hook.key_row or row >= hook.resume_row]
        return [table.nets[row] if table.nets else stage.denoise.part for row in rows]

    def _table_free_rows(self, stage: Stage, steps: int) -> int:
        sampler = stage.sampler
        if sampler.kind == "direct":
            return 1
        if sampler.blocks is not None and sampler.kind == "ar_blocks":
            return len(sampler.blocks.sizes)
        if sampler.blocks is not None:  # guesses decide how many calls: as many as there were, within bounds
            made = len(self.studio.calls[stage.denoise.part])
            assert 1 <= made <= sum(sampler.blocks.sizes)
            return made
        tokens = sampler.tokens
        if tokens is None:
            return steps
        return sum(tokens.codebook_steps) or steps + (sampler.kind == "discrete_posterior" and tokens.times[1] > 0)

    @staticmethod
    def _tiles(stage: Stage, enlarged: int) -> int:
        init, tiles = stage.init, stage.denoise.tiles
        height, width = (side // init.downscale * enlarged for side in (init.height, init.width))
        return len(list(boxes(height, width, tiles))) if tiles is not None and max(height, width) > tiles.size else 1

    def shape_is_right(self, result: DrawResult) -> bool:
        """As many as asked for, of the size that was settled, and finite."""
        media, used = self.entry.recipe.media, result.used
        if media.kind == "image":
            return [image.size for image in result.images] == [(used.width, used.height)] * used.batch
        if media.kind == "video":
            sizes = {frame.size for video in result.videos for frame in video}
            return len(result.videos) == used.batch and sizes == {(used.width, used.height)}
        found = result.audio if media.kind == "audio" else result.arrays
        assert found is not None
        if media.kind == "audio" and found.shape[-1] != round((used.seconds or 0) * media.rate):
            return False
        return len(found) == used.batch and found.size > 0 and bool(np.isfinite(found).all())


def bench(root: Path, entry: Entry, threshold: float = NEVER) -> Bench:
    """An entry on its bench; where a stage may be accepted, `threshold` settles whether it is."""
    small = shrunk(entry)
    stages = tuple(
        replaced(stage, accept=replaced(stage.accept, threshold=threshold)) if stage.accept is not None else stage
        for stage in small.recipe.stages
    )
    small = replaced(small, recipe=replaced(small.recipe, stages=stages))
    return Bench(small, studio_of(root, small))


def calls(entry: Entry) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Every (part, feeds) of a recipe."""
    for call in entry.recipe.conditions:
        yield call.part, call.feeds
    for stage in entry.recipe.stages:
        net: Denoise = stage.denoise
        for part in dict.fromkeys((net.part, *stage.sampler.nets)):
            yield part, net.feeds
        for call in (
            *net.before,
            *(each for each in (stage.init.encode, stage.decode, stage.accept) if each is not None),
        ):
            yield call.part, call.feeds


def picture(width: int, height: int) -> Image.Image:
    """A smooth picture."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    waves = [np.sin(x / 5 + k) * np.cos(y / 7 - k) for k in range(3)]
    return Image.fromarray((127 * (1 + np.stack(waves, axis=-1))).astype(np.uint8))


def finished(result: DrawResult) -> list[np.ndarray]:
    """All that was drawn as float arrays: what comes out, and the samples."""
    pictures = [result.images] * bool(result.images) + [result.videos] * bool(result.videos)
    out = [np.asarray([_pixels(one) for one in each], np.float32) for each in pictures]
    return out + [value for value in (result.audio, result.arrays, result.latents) if value is not None]


def _pixels(one: Image.Image | tuple[Image.Image, ...]) -> np.ndarray:
    return np.asarray(one) if isinstance(one, Image.Image) else np.stack([np.asarray(frame) for frame in one])
