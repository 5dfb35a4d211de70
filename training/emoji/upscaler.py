"""Stage 3: one-step x4 super-resolution, 32 to 128 pixels. `python -m training.emoji.upscaler --work WORK --minutes 4`.

The image is the bicubic enlargement minus a residual, as in one-row flow tables (sigma = 1, image = x - m). Five CLDR
labels are held out whole, so that no relative of a test glyph is trained on. A share of the inputs are samples
of the student (fixed seeds, one or two steps), so that the residual also removes the speckle of few-step sampling.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.export.families.emoji_networks import ResidualUpscaler
from training.emoji.data import Glyph, encode, renders
from training.emoji.networks import guidance_embedding, unfold
from training.emoji.teacher import Clock, Corpus, Networks, learning_rate, load_corpus, mix, mixed_precision, save

CONFIG = {"_class_name": "ResidualUpscaler", "in_channels": 3, "channels": 48, "blocks": 8, "scale": 4}
TEST_LABELS = frozenset({"food-vegetable", "animal-bird", "transport-water", "musical-instrument", "clothing"})
SEED = 0
PATCH = 20  # pixels of a low-resolution training patch
BATCH = 16
PEAK = 1.5e-3
GOOD = 0.02  # a sample farther than this from its render (mean squared error) is not trained on


def new_upscaler() -> ResidualUpscaler:
    """An untrained upscaler that starts as plain bicubic enlargement: its residual is zero."""
    net = ResidualUpscaler()
    nn.init.zeros_(net.tail2.weight)
    nn.init.zeros_(net.tail2.bias)
    return net


def enlarge(lr: Tensor, scale: int = 4) -> Tensor:
    """Bicubic, half-pixel centres."""
    return F.interpolate(lr, scale_factor=scale, mode="bicubic", align_corners=False)


def psnr(images: Tensor, truth: Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB; the range [-1, 1] has peak 2."""
    error = ((images.clamp(-1, 1) - truth) ** 2).flatten(1).mean(1).clamp_min(1e-9)
    return float((10 * torch.log10(4 / error)).mean())


@torch.no_grad()
def sample(model: Networks, ids: Tensor, sigmas: list[float], scale: float, seed: int) -> Tensor:
    """Consistency steps down `sigmas`, (B, 12, 16, 16); the noise depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(ids), 12, 16, 16)
    x = torch.randn(shape, generator=generator)
    guidance = guidance_embedding(torch.full((len(ids),), scale))
    for now, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        sigma = torch.full((len(ids),), now)
        with mixed_precision():
            m = model(x, sigma, model.encode_text(ids), guidance)
        x = mix(x - now * m, torch.randn(shape, generator=generator), torch.full((len(ids),), following))
    return x.clamp(-1, 1)


def student_samples(corpus: Corpus, work: Path, low: Tensor) -> list[tuple[int, Tensor]]:
    """(glyph index, (3, 32, 32)) for training glyphs whose one- or two-step sample is close to the render."""
    cache = work / "samples.pt"
    if cache.exists():
        loaded: list[tuple[int, Tensor]] = torch.load(cache)
        return loaded
    model = Networks(corpus.tokenizer.get_vocab_size())
    model.load_state_dict(torch.load(work / "student.pt")["mean"])
    kept = []
    for run, sigmas in enumerate(([1.0], [1.0, 0.5])):
        for start in range(0, len(corpus.glyphs), 64):
            rows = range(start, min(start + 64, len(corpus.glyphs)))
            ids = encode(corpus.tokenizer, [corpus.glyphs[i].name for i in rows])
            pictures = unfold(sample(model, ids, sigmas, scale=1.5, seed=1000 * run + start))
            close = ((pictures - low[list(rows)]) ** 2).flatten(1).mean(1) < GOOD
            kept += [(i, pictures[i - start].half()) for i in rows if close[i - start]]
    save(kept, cache)
    return kept


def is_test(glyph: Glyph) -> bool:
    """Whether the glyph belongs to the held-out labels."""
    return glyph.label in TEST_LABELS


class Patches:
    """Random aligned patches: (B, 3, 20, 20) inputs and (B, 3, 80, 80) targets."""

    def __init__(self, corpus: Corpus, work: Path, low: Tensor, high: Tensor) -> None:
        train = [i for i, glyph in enumerate(corpus.glyphs) if not is_test(glyph)]
        allowed = set(train)
        generated = [(i, p) for i, p in student_samples(corpus, work, low) if i in allowed]
        self.low, self.high, self.train, self.generated = low, high, train, generated

    def batch(self, size: int, generated: float) -> tuple[Tensor, Tensor]:
        """A share `generated` of the inputs are student samples."""
        inputs, targets = [], []
        for _ in range(size):
            if self.generated and torch.rand(()) < generated:
                i, picture = self.generated[int(torch.randint(len(self.generated), ()))]
                picture = picture.float()
            else:
                i = self.train[int(torch.randint(len(self.train), ()))]
                picture = self.low[i]
            y, x = torch.randint(picture.shape[-1] - PATCH + 1, (2,)).tolist()
            inputs.append(picture[:, y : y + PATCH, x : x + PATCH])
            targets.append(self.high[i, :, 4 * y : 4 * (y + PATCH), 4 * x : 4 * (x + PATCH)])
        return torch.stack(inputs), torch.stack(targets)


class UpscalerRun:
    """What the stage saves and takes up again."""

    def __init__(self, net: ResidualUpscaler, path: Path) -> None:
        self.net, self.path, self.step, self.clock = net, path, 0, Clock()
        self.optimiser = torch.optim.AdamW(net.parameters(), PEAK, fused=True)
        if path.exists():
            state = torch.load(path)
            net.load_state_dict(state["net"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.step, self.clock = state["step"], Clock(*state["clock"])

    def update(self, low: Tensor, high: Tensor, done: float) -> float:
        """One step on the mean absolute error, which is returned."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.step, done, PEAK)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made = self.net(low.contiguous(memory_format=torch.channels_last))
        loss = F.l1_loss(made.float(), high)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.step += 1
        return float(loss.detach())

    def checkpoint(self) -> None:
        """Save the whole run."""
        now, net, optimiser = self.clock.read(), self.net.state_dict(), self.optimiser.state_dict()
        samples = self.step * BATCH
        clock = (now.cpu, now.wall)
        save({"net": net, "optimiser": optimiser, "step": self.step, "samples": samples, "clock": clock}, self.path)


def train(run: UpscalerRun, patches: Patches, minutes: float) -> None:
    """Go on until the stage has used its wall-clock minutes, all runs together."""
    while (done := run.clock.read().wall / (60 * minutes)) < 1:
        loss = run.update(*patches.batch(BATCH, generated=0.5), done)
        if run.step % 500 == 0:
            print(f"{60 * minutes * done:5.0f} s  step {run.step}  loss {loss:.4f}", flush=True)
            run.checkpoint()
    run.checkpoint()


@torch.no_grad()
def held_out_psnr(net: ResidualUpscaler, glyphs: list[Glyph], low: Tensor, high: Tensor) -> dict[str, float]:
    """Network and bicubic PSNR in dB on the held-out labels, float32."""
    rows = [i for i, glyph in enumerate(glyphs) if is_test(glyph)]
    made = torch.cat([net(low[rows[k : k + 16]]) for k in range(0, len(rows), 16)])
    return {"images": len(rows), "psnr": psnr(made, high[rows]), "psnr_bicubic": psnr(enlarge(low[rows]), high[rows])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4.2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    corpus, cache, path = load_corpus(args.work), args.work / "renders128.pt", args.work / "upscaler.pt"
    if not cache.exists():
        save(renders(corpus.glyphs, 128).half(), cache)
    low, high = unfold(corpus.latents), torch.load(cache).float()
    net = new_upscaler().to(memory_format=torch.channels_last)
    run = UpscalerRun(net, path)
    torch.manual_seed(SEED + 1 + run.step)
    train(run, Patches(corpus, args.work, low, high), args.minutes)
    print(json.dumps(held_out_psnr(net, corpus.glyphs, low, high)))


if __name__ == "__main__":
    main()
