"""Quality of the emoji model as it ships: drawn by an exported bundle and the runtime, held against the renders.

    python benchmarks/emoji_quality.py --work DIR [--bundle PATH] [--steps 1,2,4,8] [--picture PATH]

DIR keeps the bundle and the renders. For every step count four pictures of each trained name, sixteen of each unseen
combination and four by keywords alone of each trained emoji. A row has, by set of prompts: R@1 among all renders and
mean squared error, of the base picture (32 pixels) and the finished one (128), each with its standard error over
prompts; for unseen combinations also the share whose nearest render is at least of the right family; and the Frechet
distance of the base pictures of trained names, and of keywords, to the trained renders. One more row has yardsticks:
the distance of things that are not the model's. `--picture` also draws the sheet of docs/quality.md.

The runtime draws without torch; the renders and the features (training/emoji) need it.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from emoji_metrics import F32, F64, Gallery, Gaussian, Rows, by_prompt, frechet, psnr, recall, squared_error  # noqa: E402
from harness import record, summary  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import edgekit  # noqa: E402
from edgekit.export import build  # noqa: E402
from training.emoji.card import DEBIAN_PACKAGES, debian_version  # noqa: E402
from training.emoji.data import FAVOURITES, Glyph, renders  # noqa: E402
from training.emoji.features import augment, load_trunk  # noqa: E402
from training.emoji.networks import unfold  # noqa: E402
from training.emoji.teacher import load_corpus  # noqa: E402

WEIGHTS = Path(__file__).parent / "data" / "emoji_features.safetensors"
SAMPLES, UNSEEN_SAMPLES = 4, 16  # of a prompt
SPLITS = 8  # how often the renders are halved
SEED = 0
SHEET = (
    *("red apple", "dog face", "rocket", "pizza", "cat face", "tulip", "snowman", "fire engine"),
    *("police officer: light skin tone", "raised back of hand: medium-dark skin tone"),
)
SIDE, GAP, MARGIN, HEADER = 128, 6, 190, 26  # pixels of the sheet
Pipe = Result = Any  # what `edgekit.load` gives for a bundle that draws, and what its `generate` gives


@dataclass
class World:
    """The renders in two sizes, where pictures are looked up, and the features."""

    glyphs: list[Glyph]
    small: torch.Tensor
    large: F32
    trunk: torch.nn.Module
    keywords: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gallery, self.gallery_large = Gallery(self.small.numpy()), Gallery(self.large)
        self.trained = [i for i, glyph in enumerate(self.glyphs) if not glyph.held_out]
        self.unseen = [i for i, glyph in enumerate(self.glyphs) if glyph.held_out]
        rng = random.Random(SEED)
        for i in self.trained:
            words = self.glyphs[i].keywords
            if words:
                self.keywords[i] = " ".join(rng.sample(words, rng.randint(1, min(3, len(words)))))
        self.reference = Gaussian.of(self.features(self.small[self.trained]))

    @torch.no_grad()
    def features(self, pictures: torch.Tensor) -> F32:
        """(B, 3, 32, 32) -> (B, 64)."""
        return torch.cat([self.trunk(part) for part in pictures.split(128)]).numpy()

    def distance(self, features: F32) -> float:
        """Frechet distance to the trained renders."""
        return round(frechet(Gaussian.of(features), self.reference), 4)


def read_world(work: Path) -> World:
    """Render, or read back from the work folder."""
    corpus, cache = load_corpus(work), work / "renders128.pt"
    if not cache.exists():
        torch.save(renders(corpus.glyphs, SIDE), cache)
    return World(corpus.glyphs, unfold(corpus.latents), torch.load(cache).float().numpy(), load_trunk(WEIGHTS)[0])


def finished(result: Result) -> F32:
    """(B, 3, 128, 128) in [-1, 1] of the result's pictures."""
    pixels = np.stack([np.asarray(image.convert("RGB"), np.float32) for image in result.images])
    return pixels.transpose(0, 3, 1, 2) / np.float32(127.5) - 1


def base(result: Result) -> torch.Tensor:
    """(B, 3, 32, 32): the first stage's pictures, clipped as its decoder clips them."""
    assert result.latents is not None
    return unfold(torch.from_numpy(result.latents)).clamp(-1, 1)


@dataclass
class Drawn:
    """What came of a set of prompts; every array is (prompts, samples), the features (prompts, samples, 64)."""

    rows: list[int]
    nearest: Rows
    nearest_large: Rows
    error: F64
    error_large: F64
    features: F32

    def of(self, rows: Sequence[int]) -> Drawn:
        """The part that some of the pictures have in it."""
        at = [self.rows.index(row) for row in rows]
        arrays = (self.nearest, self.nearest_large, self.error, self.error_large, self.features)
        return Drawn(list(rows), *(array[at] for array in arrays))

    def scores(self) -> dict[str, Any]:
        """R@1 and error in both sizes."""
        asked = np.array(self.rows)[:, None]
        error, error_large = by_prompt(self.error), by_prompt(self.error_large)
        return {
            "recall": by_prompt(self.nearest == asked),
            "recall_128": by_prompt(self.nearest_large == asked),
            "mse": error,
            "mse_128": error_large,
            "psnr_128": round(psnr(error_large["mean"]), 2),
            "n": self.nearest.size,
        }

    def distance(self, world: World) -> dict[str, Any]:
        """Frechet distance of all samples, and of each sample of every prompt alone."""
        count = self.features.shape[1]
        alone = [world.distance(self.features[:, k]) for k in range(count)]
        whole = world.distance(self.features.reshape(-1, self.features.shape[2]))
        return {"all": whole, "one_of_each": summary(alone), "n": self.nearest.size}


def draw(pipe: Pipe, world: World, prompts: dict[int, str], steps: int, samples: int) -> Drawn:
    """Every prompt `samples` times, in one batch, by a seed that is its row: no two prompts share their noise."""
    found: list[tuple[Any, ...]] = []
    for row, prompt in prompts.items():
        result = pipe.generate(prompt, steps=steps, batch=samples, seed=1000 * SEED + row)
        small, large = base(result), finished(result)
        errors = squared_error(small.numpy(), world.small[row].numpy()), squared_error(large, world.large[row])
        nearest = world.gallery.nearest(small.numpy()), world.gallery_large.nearest(large)
        found.append((*nearest, *errors, world.features(small)))
    return Drawn(list(prompts), *(np.stack(column) for column in zip(*found, strict=True)))


def row(pipe: Pipe, world: World, steps: int) -> dict[str, Any]:
    """All figures of one step count."""
    names = {i: glyph.name for i, glyph in enumerate(world.glyphs)}
    trained = draw(pipe, world, {i: names[i] for i in world.trained}, steps, SAMPLES)
    unseen = draw(pipe, world, {i: names[i] for i in world.unseen}, steps, UNSEEN_SAMPLES)
    keywords = draw(pipe, world, world.keywords, steps, SAMPLES)
    families = np.array([glyph.family or glyph.text for glyph in world.glyphs])
    wanted = families[world.unseen][:, None]
    return {
        "what": "model",
        "steps": steps,
        "trained": trained.scores(),
        "favourite": trained.of([i for i in world.trained if names[i] in FAVOURITES]).scores(),
        "unseen": {**unseen.scores(), "family": by_prompt(families[unseen.nearest] == wanted)},
        "frechet": trained.distance(world),
        "frechet_keywords": keywords.distance(world),
    }


def yardsticks(world: World) -> dict[str, Any]:
    """Frechet distances of things that no model drew, and the error of copying instead of drawing."""
    generator = torch.Generator().manual_seed(SEED)
    seen = world.small[world.trained]
    whole = world.features(seen)
    halves = []
    for _ in range(SPLITS):
        order = torch.randperm(len(seen), generator=generator).numpy()
        halves.append((whole[order[::2]], whole[order[1::2]]))
    noisy = (seen + 0.1 * torch.randn(seen.shape, generator=generator)).clamp(-1, 1)
    blurred = F.interpolate(F.avg_pool2d(seen, 2), scale_factor=2, mode="bicubic").clamp(-1, 1)
    told = {
        "moved by up to 0.3 pixels": augment(seen, generator, 0.1),
        "moved by up to 3 pixels, as in the classifier's training": augment(seen, generator, 1.0),
        "with noise of deviation 0.1": noisy,
        "at half the resolution": blurred,
        "the mean render, with noise of deviation 0.1": (noisy - seen + seen.mean(0)).clamp(-1, 1),
        "plain noise": torch.randn(seen.shape, generator=generator).clamp(-1, 1),
    }
    copies = [squared_error(seen.numpy(), world.small[i].numpy()).min() for i in world.unseen]
    return {
        "what": "yardsticks",
        "frechet": {name: world.distance(world.features(pictures)) for name, pictures in told.items()},
        "frechet_half_to_half": summary([frechet(Gaussian.of(a), Gaussian.of(b)) for a, b in halves]),
        "frechet_half_to_all": summary([world.distance(a) for a, _ in halves]),
        "unseen_mse_of_nearest_trained_render": by_prompt(np.array(copies)[:, None]),
        "recall_of_renders": recall(world.gallery.nearest(seen.numpy()), world.trained),
    }


def table(rows: Sequence[dict[str, Any]], yard: dict[str, Any]) -> str:
    """Both as Markdown."""
    lines = [
        "| steps | trained: R@1 | MSE | PSNR at 128 | favourites: R@1 | MSE | unseen: R@1 | family | MSE "
        "| Frechet, names | keywords |",
        "|---:" * 11 + "|",
    ]
    for one in rows:
        seen, liked, new = one["trained"], one["favourite"], one["unseen"]
        cells = [
            str(one["steps"]),
            f"{seen['recall']['mean']:.3f}",
            f"{seen['mse']['mean']:.4f}",
            f"{seen['psnr_128']:.2f} dB",
            f"{liked['recall']['mean']:.3f}",
            f"{liked['mse']['mean']:.4f}",
            f"{new['recall']['mean']:.3f}",
            f"{new['family']['mean']:.3f}",
            f"{new['mse']['mean']:.4f}",
            f"{one['frechet']['all']:.2f}",
            f"{one['frechet_keywords']['all']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| yardstick | Frechet |", "|---|---:|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in yard["frechet"].items()]
    halves = {"one half of the renders to the other": "half_to_half", "one half of the renders to all": "half_to_all"}
    lines += [f"| {name} | {yard['frechet_' + key]['median']:.2f} |" for name, key in halves.items()]
    return "\n".join(lines)


def sheet(pipe: Pipe, world: World, steps: Sequence[int], path: Path) -> None:
    """A row per prompt: its render, then one finished picture by every step count, all from the same noise."""
    rows = {glyph.name: i for i, glyph in enumerate(world.glyphs)}
    font = ImageFont.load_default(15)
    size = (MARGIN + (1 + len(steps)) * (SIDE + GAP), HEADER + len(SHEET) * (SIDE + GAP))
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    for column, title in enumerate(["render", *(f"{n} step{'s' * (n != 1)}" for n in steps)]):
        pen.text((MARGIN + column * (SIDE + GAP) + SIDE / 2, HEADER / 2), title, "black", font, anchor="mm")
    for line, name in enumerate(SHEET):
        index, top = rows[name], HEADER + line * (SIDE + GAP)
        label = name.replace(": ", ":\n") + ("\n(unseen)" if world.glyphs[index].held_out else "")
        pen.text((8, top + SIDE / 2), label, "black", font, anchor="lm")
        render = ((world.large[index].transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8)
        made = [pipe.generate(name, steps=n, seed=SEED).images[0] for n in steps]
        for column, picture in enumerate([Image.fromarray(render), *made]):
            page.paste(picture, (MARGIN + column * (SIDE + GAP), top))
    page.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the bundle and the renders")
    parser.add_argument("--bundle", type=Path, help="measure this one; by default models/emoji is exported")
    parser.add_argument("--steps", default="1,2,4,8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--picture", type=Path, help="also draw the sheet, as PNG")
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.bundle or args.work / "emoji.bundle"
    if args.bundle is None:
        build.export(build.ExportRequest(ROOT / "models" / "emoji", path), lambda _what, _share: None)
    world, steps = read_world(args.work), [int(n) for n in args.steps.split(",")]
    with edgekit.load(path, task="text-to-image", threads=args.threads) as pipe:
        once = pipe.generate("red apple", steps=steps[0])
        rows = []
        for n in steps:
            rows.append(row(pipe, world, n))
            print(f"{n} steps done", file=sys.stderr)
        if args.picture is not None:
            sheet(pipe, world, steps, args.picture)
    yard = yardsticks(world)
    common = {
        "bundle": once.source["bundle"],
        "precision": pipe.bundle.manifest.precision.requested,
        "guidance": once.used.guidance,
        "features": "sha256:" + hashlib.sha256(WEIGHTS.read_bytes()).hexdigest(),
        "data": {name: debian_version(name) for name in DEBIAN_PACKAGES},
        "renders": len(world.glyphs),
    }
    if not args.dry_run:
        record("emoji_quality", [{**common, **one} for one in (*rows, yard)])
    print(table(rows, yard))


if __name__ == "__main__":
    main()
