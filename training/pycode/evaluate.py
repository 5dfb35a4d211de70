"""Measure a target and its draft on held-out files: perplexity, bits per byte, and how often drafts are accepted.

    python -m training.pycode.evaluate --target models/pycode --draft models/pycode-draft --data DATA --out METRICS.json

Weights are read as stored (bfloat16) and computed with in float32, except that the target writes the text on which
acceptance is measured in bfloat16 arithmetic.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from training.pycode.corpus import read_split
from training.pycode.generate import continue_rows
from training.pycode.tokenizer import CONTEXT
from training.pycode.tokens import LANES, Stream, Windows, load_documents

PROMPT, WRITTEN = 128, 128  # tokens per row of the acceptance measurement
DRAFTED = 4  # tokens per round
Numbers = dict[str, float]


@dataclass(frozen=True)
class Pair:
    """A target and its draft."""

    target: LlamaForCausalLM
    draft: LlamaForCausalLM


def windows_of(document: Stream) -> list[torch.Tensor]:
    """A document as int64 `[1, <= CONTEXT]` windows; each begins with the token that the one before it ended with."""
    whole = torch.from_numpy(document.astype(np.int64))[None]
    return [whole[:, at : at + CONTEXT] for at in range(0, whole.shape[1] - 1, CONTEXT - 1)]


def perplexity(model: LlamaForCausalLM, data: Path, split: str) -> Numbers:
    """Perplexity per token and bits per UTF-8 byte of every file of a split; each token is scored once."""
    nats, count = 0.0, 0
    for document in load_documents(data, split):
        for window in windows_of(document):
            logits = model(input_ids=window).logits[0, :-1]
            nats += cross_entropy(logits, window[0, 1:], reduction="sum").item()
            count += window.shape[1] - 1
    nbytes = sum(len(text.encode()) for text in read_split(data / f"{split}.jsonl"))
    bits = nats / math.log(2)
    return {"tokens": count, "bytes": nbytes, "perplexity": math.exp(nats / count), "bits_per_byte": bits / nbytes}


def written(pair: Pair, prompts: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The target's continuation of `[B, PROMPT]` prompts: its tokens `[B, WRITTEN]` and both models' logits there."""
    random = torch.Generator().manual_seed(11)
    heat = torch.full((len(prompts),), temperature)
    rows = continue_rows(pair.target, prompts, PROMPT + WRITTEN, heat, random)
    p, q = (model(input_ids=rows).logits[:, PROMPT - 1 : -1].float() for model in (pair.target, pair.draft))
    return rows[:, PROMPT:], p, q


def rounds(agreed: list[bool]) -> list[int]:
    """How many of `DRAFTED` tokens each round accepts, given where draft and target agree along the target's text."""
    accepted, at = [], 0
    while at + DRAFTED <= len(agreed):
        run = next((depth for depth in range(DRAFTED) if not agreed[at + depth]), DRAFTED)
        accepted.append(run)
        at += run + 1
    return accepted


def greedy_acceptance(pair: Pair, prompts: torch.Tensor) -> dict[str, object]:
    """Rounds of `DRAFTED` greedy tokens along the target's greedy text."""
    tokens, _, q = written(pair, prompts, 0.0)
    agreed = q.argmax(-1) == tokens
    lengths = [length for row in agreed.tolist() for length in rounds(row)]
    reached = [sum(length >= depth for length in lengths) for depth in range(DRAFTED + 1)]
    return {
        "positions": agreed.numel(),
        "agreement": agreed.float().mean().item(),
        "drafted_per_round": DRAFTED,
        "accepted_per_round": sum(lengths) / len(lengths),
        "tokens_per_target_call": 1 + sum(lengths) / len(lengths),
        "acceptance_by_depth": [reached[depth + 1] / reached[depth] for depth in range(DRAFTED)],
    }


def sampled_acceptance(pair: Pair, prompts: torch.Tensor, temperature: float) -> float:
    """Mean over the target's sampled text of sum(min(p, q)), both distributions at `temperature`."""
    _, p, q = written(pair, prompts, temperature)
    least = torch.minimum((p / temperature).softmax(-1), (q / temperature).softmax(-1))
    return float(least.sum(-1).mean())


def measure(pair: Pair, data: Path, rows: int) -> dict[str, object]:
    """All numbers of the model cards; `rows` prompts are windows of held-out files."""
    out: dict[str, object] = {}
    for role, model in (("target", pair.target), ("draft", pair.draft)):
        out[role] = {split: perplexity(model, data, split) for split in ("heldout", "heldout_package")}
    windows = Windows(load_documents(data, "heldout"), seed=5)
    prompts = torch.cat([windows.batch(LANES, PROMPT)[:, :PROMPT] for _ in range(rows // LANES)])
    out["greedy"] = greedy_acceptance(pair, prompts)
    out["sampled"] = {f"T={heat}": sampled_acceptance(pair, prompts, heat) for heat in (0.7, 1.0)}
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = [
        LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (options.target, options.draft)
    ]
    with torch.no_grad():
        metrics = measure(Pair(*models), options.data, options.rows)
    options.out.write_text(json.dumps(metrics, indent=2) + "\n")
    print(options.out.read_text())
