"""Stage 2: guided consistency distillation. `python -m training.emoji.distill --work WORK --minutes 11.3`.

Latent consistency distillation (Luo et al. 2023) written for straight flow paths. The student starts as the teacher
and answers f(x, sigma, w, text) = x - sigma m, so f(x, 0) = x holds by construction. With x at sigma on the way to a
training picture, the teacher makes one guided Euler step to sigma',

    x' = x + (sigma' - sigma) (u + w (c - u)),      u, c = teacher without and with the text,  w ~ U(1, 6)

and the student at (x, sigma) is pulled (Huber loss) to its own running average at (x', sigma'). A full name means
exactly one picture: guidance sharpens a distribution, and here there is nothing left to sharpen. So rows prompted
by a name are also pulled to that picture, at every w, and two steps of three do only that (the velocity loss of
stage 1 under a guidance embedding): they need no teacher, cost half, and go on teaching the student its pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from training.emoji.data import encode, random_prompt
from training.emoji.networks import guidance_embedding
from training.emoji.teacher import SEED, Corpus, Networks, Run, load_corpus, mix, mixed_precision

GRID = 32  # a teacher step is one to two 1/32 long
SCALES = (1.0, 6.0)  # guidance scales w
INFERENCE = (1.0, 1.0, 1.0, 0.75, 2 / 3, 0.5, 1 / 3, 0.25)  # levels of the 1- to 8-step grids, drawn more often
DECAY = 0.99
ANCHOR = 0.5  # weight of the pull to the named picture in a consistency step
CYCLE = 3  # every third step is a consistency step


def draw_sigmas(size: int) -> tuple[Tensor, Tensor]:
    """(B,) levels, half of them of the inference grids, and the neighbouring lower ones."""
    levels = torch.tensor(INFERENCE)[torch.randint(len(INFERENCE), (size,))]
    sigma = torch.where(torch.rand(size) < 0.5, levels, torch.rand(size))
    lower = (sigma - (1 + torch.rand(size)) / GRID).clamp_min(0.0)
    return sigma, lower


@torch.no_grad()
def guided_step(teacher: Networks, x: Tensor, sigma: Tensor, lower: Tensor, ids: Tensor, scale: Tensor) -> Tensor:
    """One Euler step of the teacher's guided flow, sigma -> lower."""
    with mixed_precision():
        text = teacher.encode_text(torch.cat([torch.zeros_like(ids), ids]))
        u, c = teacher(torch.cat([x, x]), torch.cat([sigma, sigma]), text).chunk(2)
    v = u + scale[:, None, None, None] * (c - u)
    return x + (lower - sigma)[:, None, None, None] * v


def denoise(model: Networks, x: Tensor, sigma: Tensor, ids: Tensor, guidance: Tensor) -> Tensor:
    """The consistency function x - sigma m."""
    x = x.contiguous(memory_format=torch.channels_last)
    with mixed_precision():
        m = model(x, sigma, model.encode_text(ids), guidance)
    return x - sigma[:, None, None, None] * m


def pseudo_huber(a: Tensor, b: Tensor, c: float = 0.03) -> Tensor:
    """(B,) mean over elements of sqrt((a - b)^2 + c^2) - c."""
    return (((a - b) ** 2 + c * c).sqrt() - c).flatten(1).mean(1)


def named_batch(corpus: Corpus, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, ids and whether the prompt contains the picture's full name (B,)."""
    chosen = torch.multinomial(corpus.weights, size, replacement=True)
    glyphs = [corpus.glyphs[i] for i in chosen.tolist()]
    prompts = [random_prompt(glyph, corpus.rng, empty=0.05) for glyph in glyphs]
    named = torch.tensor([glyph.name in prompt for glyph, prompt in zip(glyphs, prompts, strict=True)])
    return corpus.latents[chosen], encode(corpus.tokenizer, prompts), named


def distillation_loss(run: Run, teacher: Networks, corpus: Corpus, size: int) -> tuple[Tensor, Tensor]:
    """Consistency loss and anchor loss (to be added), both means over the batch."""
    image, ids, named = named_batch(corpus, size)
    sigma, lower = draw_sigmas(size)
    scale = torch.empty(size).uniform_(*SCALES)
    guidance = guidance_embedding(scale)
    x = mix(image, torch.randn_like(image), sigma)
    with torch.no_grad():
        below = guided_step(teacher, x, sigma, lower, ids, scale)
        target = denoise(run.mean, below, lower, ids, guidance).clamp(-1.2, 1.2)
    made = denoise(run.model, x, sigma, ids, guidance)
    consistency = pseudo_huber(made, target).mean()
    return consistency, ANCHOR * (pseudo_huber(made, image) * named).mean()


def anchor_loss(run: Run, corpus: Corpus, size: int) -> Tensor:
    """Mean squared velocity error of rows prompted by a name, under random guidance embeddings."""
    image, ids, named = named_batch(corpus, size)
    sigma = draw_sigmas(size)[0].clamp_min(0.02)
    guidance = guidance_embedding(torch.empty(size).uniform_(*SCALES))
    noise = torch.randn_like(image)
    x = mix(image, noise, sigma).contiguous(memory_format=torch.channels_last)
    with mixed_precision():
        m = run.model(x, sigma, run.model.encode_text(ids), guidance)
    return (((m - noise + image) ** 2).flatten(1).mean(1) * named).mean()


def train(run: Run, teacher: Networks, corpus: Corpus, minutes: float, size: int) -> None:
    """Go on until the stage has used its wall-clock minutes, all runs together."""
    saved = reported = run.clock.read().wall
    shown = torch.zeros(3)
    while (wall := run.clock.read().wall) < 60 * minutes:
        done = wall / (60 * minutes)
        if run.step % CYCLE == 0:
            losses = torch.stack(distillation_loss(run, teacher, corpus, size))
            run.update(losses.sum(), size, done)
            shown[:2] = losses.detach()
        else:
            loss = anchor_loss(run, corpus, size)
            run.update(loss, size, done)
            shown[2] = loss.item()
        if wall - reported > 30:
            reported = wall
            print(f"{wall:6.0f} s  step {run.step}  samples {run.samples}  losses {shown.tolist()}", flush=True)
        if wall - saved > 180:
            saved = wall
            run.checkpoint()
    run.checkpoint()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=11.3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--peak", type=float, default=1e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    corpus = load_corpus(args.work)
    teacher = Networks(corpus.tokenizer.get_vocab_size()).requires_grad_(False)
    teacher.load_state_dict(torch.load(args.work / "teacher.pt")["mean"])
    student = Networks(corpus.tokenizer.get_vocab_size())
    student.load_state_dict(teacher.state_dict())
    run = Run(student, args.work / "student.pt", args.peak, DECAY)
    torch.manual_seed(SEED + 2 + run.step)
    corpus.rng.seed(SEED + 2 + run.step)
    train(run, teacher, corpus, args.minutes, args.batch)


if __name__ == "__main__":
    main()
