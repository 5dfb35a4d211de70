"""Train a model by next-token prediction within a wall-clock budget; a killed run resumes from its last checkpoint.

    python -m training.pycode.train --role target --data DATA --run RUN --budget 3600 [--decay 0.3]

RUN receives `state.pt` (weights, optimizers, position), `log.jsonl` and, on request, may hold a file `budget` whose
number of seconds overrides `--budget` while the run is going: so the decay can be moved.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from training.pycode.model import Optimizers, build_model, schedule
from training.pycode.tokens import Windows, load_documents

TOKENS_PER_STEP = 4096
SAVE_EVERY = 120.0  # seconds
LOG_EVERY = 20  # steps
Loss = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """What a run is asked to do: seconds, share of them spent decaying, and window length by share of the budget."""

    budget: float
    decay: float
    seed: int
    windows: tuple[tuple[float, int], ...] = ((0.0, 256), (0.6, 512), (0.9, 1024))

    def window(self, progress: float) -> int:
        """Tokens per row at this share of the budget."""
        return [length for start, length in self.windows if progress >= start][-1]


class Clock:
    """Wall and CPU seconds spent on a run, over all its resumptions; the budget may be moved by a file."""

    def __init__(self, run: Path, plan: Plan, wall: float, cpu: float) -> None:
        self.file, self.plan = run / "budget", plan
        self.wall_before, self.cpu_before = wall - time.monotonic(), cpu - time.process_time()

    def spent(self) -> tuple[float, float]:
        """Wall and CPU seconds so far."""
        return self.wall_before + time.monotonic(), self.cpu_before + time.process_time()

    def progress(self) -> float:
        """Share of the budget that is spent."""
        budget = float(self.file.read_text()) if self.file.exists() else self.plan.budget
        return self.spent()[0] / budget


def next_token_loss(model: LlamaForCausalLM) -> Loss:
    """Mean cross-entropy, nats per token, of int64 `[rows, columns + 1]` windows."""

    def loss(batch: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    return loss


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write beside, then rename: a reader never sees half a checkpoint."""
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def write_options(run: Path, **options: float) -> None:
    """Keep what a run was asked to do beside its checkpoint."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "options.json").write_text(json.dumps(options) + "\n")


def run_training(model: LlamaForCausalLM, loss_of: Loss, windows: Windows, run: Path, plan: Plan) -> None:
    """Train until the budget is spent, saving and logging into `run`."""
    optimizers, saved = Optimizers(model), run / "state.pt"
    state: dict[str, Any] = {"step": 0, "wall": 0.0, "cpu": 0.0}
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizers.restore(state["optimizers"])
        windows.restore(state["windows"])
    clock = Clock(run, plan, state["wall"], state["cpu"])
    step, last_save, compiled = state["step"], time.monotonic(), torch.compile(loss_of, dynamic=False)

    def checkpoint() -> None:
        wall, cpu = clock.spent()
        state = {"model": model.state_dict(), "optimizers": optimizers.state(), "windows": windows.state()}
        save_state(saved, state | {"step": step, "wall": wall, "cpu": cpu})

    total = 0.0
    with (run / "log.jsonl").open("a") as log:
        while (progress := clock.progress()) < 1.0:
            columns = plan.window(progress)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = compiled(windows.batch(TOKENS_PER_STEP // columns, columns))
            loss.backward()
            optimizers.step(schedule(step, progress, plan.decay))
            step, total = step + 1, total + loss.item()
            if step % LOG_EVERY == 0:
                row = {"step": step, "tokens": step * TOKENS_PER_STEP, "loss": round(total / LOG_EVERY, 4)}
                log.write(json.dumps(row | {"wall": round(clock.spent()[0]), "progress": round(progress, 4)}) + "\n")
                log.flush()
                total = 0.0
            if time.monotonic() - last_save > SAVE_EVERY:
                checkpoint()
                last_save = time.monotonic()
    checkpoint()


def main() -> None:
    """Parse the command line and train one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", choices=("target", "draft"), required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--budget", type=float, required=True, help="wall seconds")
    parser.add_argument("--decay", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    write_options(options.run, seed=options.seed, budget=options.budget, decay=options.decay)
    model = build_model(options.role, options.seed)
    plan = Plan(options.budget, options.decay, options.seed)
    windows = Windows(load_documents(options.data, "train"), options.seed)
    run_training(model, next_token_loss(model), windows, options.run, plan)


if __name__ == "__main__":
    main()
