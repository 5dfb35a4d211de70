"""The feature space of the Frechet distance: a small classifier of the renders, blind to where and how large they are.

    python -m training.emoji.features --work WORK --out benchmarks/data/emoji_features.safetensors

It tells the 747 renders apart by one picture each, moved, resized, turned and recoloured a little. The last layer
before the classes is the feature, standardised over the renders: every one of its 64 numbers has mean 0 and deviation 1
there. Noise and blur are no part of the augmentation, lest the features learn to overlook what a generator does wrong.
Nor are mirrored pictures: hands that point left and right are two renders.

The trunk's weights are kept with the benchmark rather than trained anew each time, so that figures of different days
and machines are distances in one space. Training repeats to the bit on one machine only.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from training.emoji.networks import unfold
from training.emoji.teacher import load_corpus

WIDTHS = (24, 48, 80, 112)  # channels at 32, 16, 8 and 4 pixels
FEATURES = 64
SEED, STEPS, BATCH, RATE = 0, 2400, 96, 3e-3
TEMPERATURE = 16.0  # of the cosine between a feature and its class


class Trunk(nn.Module):
    """(B, 3, 32, 32) in [-1, 1] -> (B, 64), standardised over the renders once `standardise` has seen them."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *WIDTHS), WIDTHS, strict=False):
            if before != 3:
                layers.append(nn.AvgPool2d(2))
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(4, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(WIDTHS[-1], FEATURES)
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("deviation", torch.ones(FEATURES))

    def forward(self, pictures: Tensor) -> Tensor:
        made: Tensor = (self.out(self.layers(pictures).mean((2, 3))) - self.mean) / self.deviation
        return made

    @torch.no_grad()
    def standardise(self, renders: Tensor) -> None:
        """Make the features of these pictures mean 0 and deviation 1."""
        raw = self(renders) * self.deviation + self.mean
        self.mean, self.deviation = raw.mean(0), raw.std(0, correction=0)


class Classifier(nn.Module):
    """The trunk and, for training alone, one direction per picture."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.directions = nn.Parameter(torch.randn(classes, FEATURES))

    def forward(self, pictures: Tensor) -> Tensor:
        cosines = F.normalize(self.trunk(pictures), dim=1) @ F.normalize(self.directions, dim=1).T
        return TEMPERATURE * cosines


def augment(pictures: Tensor, generator: torch.Generator, amount: float = 1.0) -> Tensor:
    """Moved by up to 3 pixels, resized by up to 15 %, turned by up to 10 degrees, recoloured by up to 5 %.

    `amount` scales all of it. What comes into view is white.
    """

    def uniform(*shape: int) -> Tensor:
        return amount * (2 * torch.rand(len(pictures), *shape, generator=generator) - 1)

    turn, size, shift = 0.17 * uniform(), 1 + 0.15 * uniform(), uniform(2) * 3 / 16
    rows = [
        torch.stack([size * turn.cos(), -size * turn.sin(), shift[:, 0]], 1),
        torch.stack([size * turn.sin(), size * turn.cos(), shift[:, 1]], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(pictures.shape), align_corners=False)
    moved = 1 - F.grid_sample(1 - pictures, grid, mode="bicubic", align_corners=False)
    return (moved * (1 + 0.05 * uniform(3, 1, 1)) + 0.05 * uniform(1, 1, 1)).clamp(-1, 1)


def train(renders: Tensor) -> tuple[Trunk, float]:
    """The trunk, and the share of newly augmented renders that the classifier names."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = Classifier(len(renders))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    start = time.process_time()
    for step in range(STEPS):
        rows = torch.randint(len(renders), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(augment(renders[rows], generator)), rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 199:
            print(f"step {step + 1}, loss {loss.item():.3f}, {time.process_time() - start:.0f} CPU s", flush=True)
    with torch.no_grad():
        named = model(augment(renders, generator)).argmax(1) == torch.arange(len(renders))
    model.trunk.standardise(renders)
    return model.trunk.eval(), float(named.float().mean())


def save_trunk(trunk: Trunk, path: Path, notes: dict[str, str]) -> None:
    """Weights in float16, the standardisation in float32; equal weights and notes are equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value if value.ndim == 0 else value.half() for name, value in trunk.layers.state_dict().items()}
    tensors = {f"layers.{name}": value for name, value in state.items()}
    tensors |= {f"out.{name}": value.half() for name, value in trunk.out.state_dict().items()}
    about = {"about": json.dumps(notes, sort_keys=True)}  # one entry: of several, the order on file is by chance
    save_file({**tensors, "mean": trunk.mean, "deviation": trunk.deviation}, str(path), metadata=about)
    path.chmod(0o644)


def load_trunk(path: Path) -> tuple[Trunk, dict[str, str]]:
    """The trunk in float32, and the notes saved with it."""
    trunk = Trunk()
    with safe_open(str(path), "pt") as file:
        trunk.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
        return trunk.eval(), json.loads(file.metadata()["about"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the renders")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    renders = unfold(load_corpus(args.work).latents)
    trunk, named = train(renders)
    for half in (trunk.layers, trunk.out):  # standardise what will be read back
        half.half().float()
    trunk.standardise(renders)
    notes = {"seed": str(SEED), "steps": str(STEPS), "classes": str(len(renders)), "named": f"{named:.4f}"}
    save_trunk(trunk, args.out, notes)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes, names {named:.1%} of newly augmented renders")


if __name__ == "__main__":
    main()
