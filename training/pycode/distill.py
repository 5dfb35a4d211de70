"""Train the draft to say what the target would: KL divergence to the target's distribution at every position.

    python -m training.pycode.distill --target models/pycode --data DATA --start RUN --generated ROWS.npz \\
        --run RUN --budget 600

Acceptance in speculative sampling is the overlap of the two distributions (Leviathan et al. 2023), so the loss is
the forward KL plus the total variation distance, and some batches are text that the target wrote itself.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM

from training.pycode.generate import ROW
from training.pycode.model import build_model
from training.pycode.tokens import Windows, load_documents
from training.pycode.train import Loss, Plan, run_training, write_options

WINDOWS = ((0.0, ROW - 1), (0.85, 1024))  # length in tokens from this share of the budget on
WRITTEN_EVERY = 8  # batches


class MixedWindows(Windows):
    """Training text and, every `WRITTEN_EVERY`-th batch, rows the target wrote."""

    generated: torch.Tensor | None = None  # int64 [N, ROW]
    drawn = 0

    def batch(self, rows: int, columns: int) -> torch.Tensor:
        """int64 `[rows, columns + 1]`; written rows come as `[rows, ROW]` whatever `columns` is."""
        self.drawn += 1
        if self.generated is None or self.drawn % WRITTEN_EVERY:
            return super().batch(rows, columns)
        chosen = np.random.default_rng((self.seed, self.drawn)).integers(
            len(self.generated), size=rows * columns // ROW
        )
        return self.generated[torch.from_numpy(chosen)]


def distillation_loss(draft: LlamaForCausalLM, target: LlamaForCausalLM) -> Loss:
    """Mean of KL(target || draft) + total variation, over the positions of int64 `[rows, columns + 1]` windows."""

    def loss(batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = target(input_ids=batch[:, :-1], use_cache=False).logits.float().log_softmax(-1)
        given = draft(input_ids=batch[:, :-1], use_cache=False).logits.float().log_softmax(-1)
        probability = wanted.exp()
        divergence = (probability * (wanted - given)).sum(-1).mean()
        return divergence + 0.5 * (probability - given.exp()).abs().sum(-1).mean()

    return loss


def main() -> None:
    """Parse the command line and distil the draft."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a run whose weights to begin with")
    parser.add_argument("--generated", type=Path, help="rows written by training.pycode.generate")
    parser.add_argument("--budget", type=float, required=True, help="wall seconds")
    parser.add_argument("--decay", type=float, default=0.4)
    parser.add_argument("--seed", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    write_options(options.run, seed=options.seed, budget=options.budget, decay=options.decay)
    target = LlamaForCausalLM.from_pretrained(options.target).eval()
    draft = build_model("draft", options.seed)
    if options.start:
        draft.load_state_dict(torch.load(options.start / "state.pt", weights_only=True)["model"])
    windows = MixedWindows(load_documents(options.data, "train"), options.seed)
    if options.generated:
        windows.generated = torch.from_numpy(np.load(options.generated)["tokens"].astype(np.int64))
    plan = Plan(options.budget, options.decay, options.seed, WINDOWS)
    run_training(draft, distillation_loss(draft, target), windows, options.run, plan)


if __name__ == "__main__":
    main()
