"""Measure a packed folder. `python -m training.emoji.evaluate --model models/emoji --work WORK`.

Everything is read with `from_pretrained`, weights upcast to float32, and sampled with the folder's own scheduler:
the numbers are those of the files. R@1: is the render nearest to the sample, by pixel error among all
renders, the one asked for? MSE is per pixel and channel, images in [-1, 1].
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchLCMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel

from edgekit.export.families.emoji_networks import ResidualUpscaler
from training.emoji.data import FAVOURITES, Glyph, encode
from training.emoji.distill import ANCHOR
from training.emoji.networks import guidance_embedding, unfold
from training.emoji.teacher import load_corpus
from training.emoji.upscaler import enlarge, held_out_psnr, psnr

STEPS = (1, 2, 4, 8)
SCALES = (1.0, 1.5, 2.0, 3.0)
BATCH = 64
DEMO = (
    "red apple",
    "dog face",
    "rocket",
    "pizza",
    "sun",
    "cat face",
    "tulip",
    "snowman",
    "red heart",
    "fire engine",
    "panda",
    "octopus",
    "crown",
    "hamburger",
    "automobile",
    "purple heart",
    "alien",
    "penguin",
    "guitar",
    "cactus",
)
UNWRITTEN = (
    "apple",
    "green heart face",
    "a happy cat",
    "blue car",
    "fruit",
    "flower",
    "black dog",
    "smiling pizza",
    "purple apple",
    "angry tiger",
    "snow mountain",
    "astronaut: medium skin tone",
    "yellow bus",
    "love",
    "weather",
    "king of cats",
    "blue book",
    "party",
    "green circle",
    "an emoji of a train",
)


@dataclass
class Pipeline:
    """The folder's parts, float32."""

    tokenizer: Any
    text: CLIPTextModel
    unet: UNet2DConditionModel
    scheduler: FlowMatchLCMScheduler
    upscaler: ResidualUpscaler

    @classmethod
    def load(cls, folder: Path) -> Pipeline:
        config = json.loads((folder / "upscaler/config.json").read_text())
        upscaler = ResidualUpscaler(**{k: v for k, v in config.items() if not k.startswith("_")})
        weights = load_file(str(folder / "upscaler/diffusion_pytorch_model.safetensors"))
        upscaler.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        return cls(
            Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json")),
            CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval(),
            UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval(),
            FlowMatchLCMScheduler.from_pretrained(folder / "scheduler"),
            upscaler.eval(),
        )

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], steps: int, grid: str, scale: float, seed: int = 0) -> Tensor:
        """(B, 3, 32, 32); grid "stock" is the scheduler's own, "even" is 1, 1 - 1/n, ..., 1/n."""
        made = []
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            generator = torch.Generator().manual_seed(seed * 100003 + start)
            if grid == "even":
                self.scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
            else:
                self.scheduler.set_timesteps(steps)
            text = self.text(encode(self.tokenizer, batch)).last_hidden_state
            guidance = guidance_embedding(torch.full((len(batch),), scale))
            x = torch.randn((len(batch), 12, 16, 16), generator=generator)
            for t in self.scheduler.timesteps:
                m = self.unet(x, t, text, timestep_cond=guidance, return_dict=False)[0]
                x = self.scheduler.step(m, t, x, generator=generator, return_dict=False)[0]
            made.append(unfold(x).clamp(-1, 1))
        return torch.cat(made)


def scores(made: Tensor, rows: Sequence[int], pictures: Tensor) -> dict[str, float]:
    """R@1 and MSE of samples of the glyphs `rows`."""
    nearest = torch.cdist(made.flatten(1), pictures.flatten(1)).argmin(1)
    hits = (nearest == torch.tensor(rows)).float().mean()
    return {"recall": round(float(hits), 4), "mse": round(float(F.mse_loss(made, pictures[list(rows)])), 5)}


class Bench:
    """Fixed samples of trained captions, the favourites, and unseen tone combinations (4 seeds each)."""

    def __init__(self, pipeline: Pipeline, glyphs: list[Glyph], pictures: Tensor, count: int) -> None:
        self.pipeline, self.glyphs, self.pictures = pipeline, glyphs, pictures
        rng = random.Random(7)
        seen = [i for i, glyph in enumerate(glyphs) if not glyph.held_out]
        self.trained = rng.sample(seen, count)
        self.favourite = [i for i in seen if glyphs[i].name in FAVOURITES]
        self.unseen = [i for i, glyph in enumerate(glyphs) if glyph.held_out] * 4

    def measure(self, rows: list[int], steps: int, grid: str, scale: float) -> dict[str, float]:
        """Scores of one sample per row."""
        prompts = [self.glyphs[i].name for i in rows]
        return scores(self.pipeline.generate(prompts, steps, grid, scale), rows, self.pictures)

    def sweep(self, count: int = 96) -> dict[str, Any]:
        """Trained captions by guidance scale, even grid."""
        table = {}
        for scale in SCALES:
            table[str(scale)] = {str(n): self.measure(self.trained[:count], n, "even", scale) for n in (1, 2, 4)}
            print("guidance", scale, table[str(scale)], flush=True)
        return table

    def steps(self, scale: float) -> dict[str, Any]:
        """All three sets by step count, on both grids."""
        table: dict[str, Any] = {}
        for grid in ("even", "stock"):
            for n in STEPS if grid == "even" else STEPS[1:]:
                sets = {"trained": self.trained, "favourite": self.favourite, "unseen": self.unseen}
                row = {name: self.measure(rows, n, grid, scale) for name, rows in sets.items()}
                table.setdefault(grid, {})[str(n)] = row
                print(grid, n, row, flush=True)
        return table


def end_to_end(bench: Bench, high: Tensor, scale: float) -> dict[str, Any]:
    """PSNR at 128 pixels of four-step samples of the favourites: upscaler against bicubic."""
    rows = bench.favourite
    made = bench.pipeline.generate([bench.glyphs[i].name for i in rows], 4, "even", scale)
    with torch.no_grad():
        large = torch.cat([bench.pipeline.upscaler(made[k : k + 16]) for k in range(0, len(made), 16)])
    return {"images": len(rows), "psnr": psnr(large, high[rows]), "psnr_bicubic": psnr(enlarge(made), high[rows])}


def sheet(rows: Sequence[Tensor], path: Path, zoom: int = 1) -> None:
    """Rows of equally many pictures as one PNG."""
    page = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1).clamp(-1, 1)
    pixels = ((page.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
    image = Image.fromarray(pixels)
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(path)


@torch.no_grad()
def draw_sheets(pipeline: Pipeline, out: Path, scale: float) -> None:
    """Contact sheets for the eye: demo prompts and prompts that no caption holds, 1, 2 and 4 steps and enlarged."""
    for name, prompts in (("demo", DEMO), ("unwritten", UNWRITTEN)):
        small = [pipeline.generate(prompts, n, "even", scale, seed=1) for n in (1, 2, 4)]
        sheet([F.interpolate(made, scale_factor=2) for made in small], out / f"{name}-32.png")
        large = [pipeline.upscaler(small[k]) for k in (0, 2)]
        sheet([half for made in large for half in (made[:10], made[10:])], out / f"{name}-128.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("models/emoji"))
    parser.add_argument("--scale", type=float, help="guidance scale of the tables; by default the best of the sweep")
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--only-sheets", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    corpus, pipeline = load_corpus(args.work), Pipeline.load(args.model)
    pictures = unfold(corpus.latents)
    if args.only_sheets:
        draw_sheets(pipeline, args.work, args.scale or 1.5)
        return
    bench = Bench(pipeline, corpus.glyphs, pictures, args.count)
    sweep = bench.sweep()
    scale = args.scale or float(min(sweep, key=lambda key: sweep[key]["4"]["mse"]))
    result: dict[str, Any] = {"guidance": scale, "anchor": ANCHOR, "sweep": sweep, "steps": bench.steps(scale)}
    high = torch.load(args.work / "renders128.pt").float()
    result["upscaler"] = held_out_psnr(pipeline.upscaler, corpus.glyphs, pictures, high)
    result["end_to_end"] = end_to_end(bench, high, scale)
    result["counts"] = {"trained": len(bench.trained), "favourite": len(bench.favourite), "unseen": len(bench.unseen)}
    (args.work / "metrics.json").write_text(json.dumps(result, indent=1))
    print(json.dumps({k: result[k] for k in ("guidance", "upscaler", "end_to_end", "counts")}))
    draw_sheets(pipeline, args.work, scale)


if __name__ == "__main__":
    main()
