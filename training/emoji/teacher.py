"""Stage 1: the rectified-flow teacher. `python -m training.emoji.teacher --work WORK --minutes 47`.

The loss is the mean squared error of the velocity; a quarter of each batch sits at sigma = 1, the only level a
one-step sampler ever sees, the rest is logit-normal. Weights are averaged (EMA). Resumable: state is saved every
few minutes and the run goes on from where it was until its time is spent.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel

from training.emoji.data import Glyph, build_tokenizer, choose_glyphs, encode, random_prompt, renders
from training.emoji.networks import fold, make_text_encoder, make_unet, velocity

SEED = 0


@dataclass
class Corpus:
    """What all stages train on: glyphs, their latents (N, 12, 16, 16), draw weights (0 for held-out ones)."""

    glyphs: list[Glyph]
    latents: Tensor
    weights: Tensor
    tokenizer: Any
    rng: random.Random = field(default_factory=lambda: random.Random(SEED))

    def batch(self, size: int, empty: float = 0.1) -> tuple[Tensor, Tensor]:
        """Latents (B, 12, 16, 16) and token ids (B, 16) of random training glyphs."""
        chosen = torch.multinomial(self.weights, size, replacement=True)
        prompts = [random_prompt(self.glyphs[i], self.rng, empty) for i in chosen.tolist()]
        return self.latents[chosen], encode(self.tokenizer, prompts)


def load_corpus(work: Path) -> Corpus:
    """Render the pictures, or read them back from the work folder."""
    glyphs, cache = choose_glyphs(SEED), work / "renders32.pt"
    if not cache.exists():
        torch.save(renders(glyphs), cache)
    latents = fold(torch.load(cache))
    weights = torch.tensor([0.0 if glyph.held_out else glyph.weight for glyph in glyphs])
    return Corpus(glyphs, latents, weights, build_tokenizer(glyphs))


class Networks(nn.Module):
    """UNet and text encoder, trained and averaged together."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.text: CLIPTextModel = make_text_encoder(vocabulary)
        self.unet: UNet2DConditionModel = make_unet().to(memory_format=torch.channels_last)
        self.text.set_attn_implementation("eager")  # on CPU the fused bf16 attention is slow backwards
        self.unet.set_attn_processor(AttnProcessor())

    def encode_text(self, ids: Tensor) -> Tensor:
        """(B, 16) ids -> (B, 16, 160)."""
        hidden: Tensor = self.text(ids).last_hidden_state
        return hidden

    def forward(self, x: Tensor, sigma: Tensor, text: Tensor, guidance: Tensor | None = None) -> Tensor:
        """The velocity, in float32."""
        return velocity(self.unet, x, sigma, text, guidance).float()


@contextmanager
def mixed_precision() -> Iterator[None]:
    """bfloat16 autocast with the plain attention kernel."""
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@torch.no_grad()
def average(mean: nn.Module, model: nn.Module, decay: float) -> None:
    """mean <- decay mean + (1 - decay) model, parameter by parameter."""
    means = [p.data for p in mean.parameters()]
    torch._foreach_lerp_(means, [p.data for p in model.parameters()], 1 - decay)


def mix(x: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) x + sigma noise, sigma (B,)."""
    s = sigma[:, None, None, None]
    return (1 - s) * x + s * noise


def save(state: object, path: Path) -> None:
    """Write beside, then rename, so that a cut run leaves the last whole state."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


@dataclass
class Clock:
    """Process CPU seconds and wall seconds spent on a stage, over all its runs."""

    cpu: float = 0.0
    wall: float = 0.0

    def __post_init__(self) -> None:
        self._cpu, self._wall = time.process_time() - self.cpu, time.time() - self.wall

    def read(self) -> Clock:
        """Both counts now."""
        return Clock(time.process_time() - self._cpu, time.time() - self._wall)


def learning_rate(step: int, done: float, peak: float) -> float:
    """100 steps of warm-up, then down to nothing as the share of the time budget `done` goes to 1."""
    return peak * min(1.0, (step + 1) / 100) * math.pow(max(0.01, 1 - done), 0.8)


class Run:
    """Everything a stage saves and takes up again: model, its average, optimiser, counters."""

    def __init__(self, model: Networks, path: Path, peak: float, decay: float = 0.998) -> None:
        self.model, self.path, self.peak, self.decay = model, path, peak, decay
        self.mean = copy.deepcopy(model).requires_grad_(False)
        self.optimiser = torch.optim.AdamW(
            model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.step = self.samples = 0
        self.clock = Clock()
        if path.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.path)
        self.model.load_state_dict(state["model"])
        self.mean.load_state_dict(state["mean"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.samples, self.clock = state["step"], state["samples"], Clock(*state["clock"])

    def update(self, loss: Tensor, size: int, done: float) -> None:
        """One optimiser step and one step of the average."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.step, done, self.peak)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        average(self.mean, self.model, min(self.decay, self.step / (self.step + 10)))
        self.step, self.samples = self.step + 1, self.samples + size

    def checkpoint(self) -> None:
        """Save the whole run."""
        now = self.clock.read()
        state = {
            "model": self.model.state_dict(),
            "mean": self.mean.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "samples": self.samples,
            "clock": (now.cpu, now.wall),
        }
        save(state, self.path)


def flow_loss(model: Networks, corpus: Corpus, size: int) -> Tensor:
    """Rectified flow (Liu et al. 2022): mean squared error of the velocity along straight paths."""
    image, ids = corpus.batch(size)
    noise = torch.randn_like(image)
    logit_normal = torch.sigmoid(torch.randn(size) + 0.5)
    sigma = torch.where(torch.rand(size) < 0.25, torch.ones(size), logit_normal)
    x = mix(image, noise, sigma).contiguous(memory_format=torch.channels_last)
    with mixed_precision():
        predicted = model(x, sigma, model.encode_text(ids))
    return F.mse_loss(predicted, noise - image)


def train(run: Run, corpus: Corpus, minutes: float, size: int) -> None:
    """Go on until the stage has used its wall-clock minutes, all runs together."""
    saved = reported = run.clock.read().wall
    shown = 0.0
    while (wall := run.clock.read().wall) < 60 * minutes:
        loss = flow_loss(run.model, corpus, size)
        run.update(loss, size, wall / (60 * minutes))
        shown = loss.item() if run.step == 1 else 0.98 * shown + 0.02 * loss.item()
        if wall - reported > 30:
            reported = wall
            print(f"{wall:6.0f} s  step {run.step}  samples {run.samples}  loss {shown:.4f}", flush=True)
        if wall - saved > 180:
            saved = wall
            run.checkpoint()
    run.checkpoint()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=47.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--peak", type=float, default=2e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "teacher.pt"
    corpus = load_corpus(args.work)
    torch.manual_seed(SEED)
    model = Networks(corpus.tokenizer.get_vocab_size())
    run = Run(model, path, args.peak)
    torch.manual_seed(SEED + 1 + run.step)  # a resumed run draws new batches
    corpus.rng.seed(SEED + 1 + run.step)
    train(run, corpus, args.minutes, args.batch)


if __name__ == "__main__":
    main()
