"""Let a model write: batched sampling and greedy decoding with a key-value cache.

    python -m training.pycode.generate --model models/pycode --data DATA --out GENERATED.npz --seconds 400

writes rows of 256 tokens, 64 of training text and 192 of the model's own at T = 0, 0.7 and 1 in equal shares: the
text on which a draft is asked to agree with its target.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache, LlamaForCausalLM

from training.pycode.tokens import Windows, load_documents

PROMPT, ROW = 64, 256  # tokens
TEMPERATURES = (0.0, 0.7, 1.0)


def pick(logits: torch.Tensor, temperatures: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """One token per row of float32 `[B, V]` logits; a temperature of 0 takes the largest. int64 `[B]`."""
    warm = torch.where(temperatures > 0, temperatures, 1.0)[:, None]
    drawn = torch.multinomial(torch.softmax(logits / warm, -1), 1, generator=random)[:, 0]
    return torch.where(temperatures > 0, drawn, logits.argmax(-1))


def continue_rows(
    model: LlamaForCausalLM, prompts: torch.Tensor, length: int, temperatures: torch.Tensor, random: torch.Generator
) -> torch.Tensor:
    """Append tokens to int64 `[B, P]` prompts until rows are `length` long; int64 `[B, length]`."""
    rows, cache, fed = prompts, DynamicCache(config=model.config), prompts
    while rows.shape[1] < length:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        fed = pick(logits.float(), temperatures, random)[:, None]
        rows = torch.cat([rows, fed], 1)
    return rows


def write_rows(model: LlamaForCausalLM, data: Path, out: Path, seconds: float, batch: int, seed: int) -> None:
    """Write `tokens`, uint16 `[N, ROW]`, for as many batches as fit into `seconds`; saved after each batch."""
    prompts = Windows(load_documents(data, "train"), seed)
    random = torch.Generator().manual_seed(seed)
    temperatures = torch.tensor(TEMPERATURES).repeat(batch)[:batch]
    rows: list[npt.NDArray[np.uint16]] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        start = prompts.batch(batch, PROMPT)[:, :PROMPT]
        rows.append(continue_rows(model, start, ROW, temperatures, random).numpy().astype(np.uint16))
        np.savez(out, tokens=np.concatenate(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--batch", type=int, default=60)
    parser.add_argument("--seed", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher = LlamaForCausalLM.from_pretrained(options.model).eval()
    write_rows(teacher, options.data, options.out, options.seconds, options.batch, options.seed)
