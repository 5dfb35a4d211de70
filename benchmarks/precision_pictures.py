"""One table of precisions of the emoji model, as papers on few-step quantization print it: error, quality, size, time.

    python benchmarks/precision_pictures.py --work DIR [--names 150] [--rounds 15] [--table FILE] [--dry-run]

Rows: float32; 8-bit weights and activations everywhere they may be, and mixed at no more bytes; 4-bit weights wherever
a product may have them (its activations are rounded to 8 bits in blocks by the engine, convolutions are W8A8), and
mixed at no more bytes; and mixed at 95 % of those. Columns:

- error of the finished sample on held-out requests, against float32: content, quality, all of it (nsr);
- SSIM and PSNR of the finished pictures of the same requests, against those of float32;
- of `--names` trained names and 4 pictures each, drawn by the runtime: R@1 among all renders and mean squared error of
  the base picture, and the Frechet distance (benchmarks/emoji_quality.py says what they need; 0 leaves them out);
- bytes of the whole bundle; milliseconds of a picture at the default steps, forms in turn, the turn rotating.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from harness import record
from peers_text import rotated
from precision import FOREVER, Bench, Graphs, counted, rounded

from edgekit.quant.allocate import uniform
from edgekit.quant.budget import Budget
from edgekit.quant.metrics import psnr_db, ssim
from edgekit.quant.requests import picture_requests
from edgekit.quant.study import Pick
from edgekit.runtime.backends import Session, open_session
from edgekit.runtime.diffusion.pipeline import DrawRequest, FewStepPipeline

F64 = npt.NDArray[np.float64]
PROMPT, SAMPLES, SMALLER = "red apple", 4, 0.95


@dataclass(frozen=True, eq=False)
class Form:
    """A row: its name, what every layer is, the graphs, and what was predicted where it was planned."""

    name: str
    pick: Pick
    graphs: Graphs
    predicted: Mapping[str, float]


def forms(bench: Bench) -> list[Form]:
    """Every row's graphs, each in a folder of its own."""
    study, problem = bench.measured.study, bench.problem
    found: list[Form] = []

    def add(name: str, pick: Pick, predicted: Mapping[str, float] | None = None) -> int:
        graphs = bench.lowered(pick, f"form-{len(found)}")
        found.append(Form(name, pick, graphs, predicted or {}))
        print(f"{name}: {counted(bench, pick)}", file=sys.stderr)
        return int(problem.bytes[np.arange(len(pick)), pick].sum() + study.fixed_bytes)

    def mixed(name: str, budget: float) -> None:
        plan = study.decide(Budget(bytes=budget, milliseconds=FOREVER))
        add(name, plan.pick, plan.errors)

    add("FP32", uniform(problem, "fp32"))
    mixed("W8A8, mixed", add("W8A8, uniform", uniform(problem, "w8a8")))
    four = add("W4A8, uniform", uniform(problem, "w4a16-64"))
    mixed("W4A8, mixed", four)
    mixed(f"W4A8, mixed, {SMALLER:g} of it", SMALLER * four)
    return found


def pipeline(bench: Bench, graphs: Graphs) -> FewStepPipeline:
    """The runtime's own pipeline with other graphs in it."""
    other = {bench.bundle.graph(part): path for part, path in graphs.paths.items()}

    def opened(graph: Path, device: str, *, threads: int = 0) -> Session:
        return open_session(other.get(graph, graph), device, threads=threads)

    return FewStepPipeline(bench.bundle, open_session=opened)


def pictures(bench: Bench, pipe: FewStepPipeline) -> list[F64]:
    """The finished pictures (3, height, width), 0 to 255, of the held-out requests."""
    prompts = bench.source / "calibration.txt"
    _, requests = picture_requests(bench.bundle, prompts if prompts.exists() else None)
    found = []
    for each in requests:
        result: Any = pipe.generate(each.prompt, batch=each.batch, seed=each.seed)
        found += [np.asarray(image.convert("RGB"), np.float64).transpose(2, 0, 1) for image in result.images]
    return found


def likeness(references: Sequence[F64], made: Sequence[F64]) -> dict[str, float]:
    """Means of SSIM and PSNR over pictures."""
    pairs = list(zip(references, made, strict=True))
    return {
        "ssim": round(statistics.mean(ssim(a, b, 255) for a, b in pairs), 5),
        "psnr_db": round(min(statistics.mean(psnr_db(a, b, 255) for a, b in pairs), 99.0), 2),
    }


class Judge:
    """Recall, error and Frechet distance of drawn names; the names are spread evenly over all trained ones."""

    def __init__(self, work: Path, count: int) -> None:
        import emoji_quality as quality

        self._quality = quality
        self._world = quality.read_world(work)
        trained = self._world.trained
        rows = [trained[at] for at in np.linspace(0, len(trained) - 1, min(count, len(trained))).astype(int)]
        self._names = {row: self._world.glyphs[row].name for row in rows}

    def of(self, pipe: FewStepPipeline, steps: int) -> dict[str, Any]:
        """The figures of one form."""
        drawn = self._quality.draw(pipe, self._world, self._names, steps, SAMPLES)
        told = drawn.scores()
        return {
            "recall": told["recall"],
            "mse": told["mse"],
            "frechet": self._world.distance(drawn.features.reshape(-1, drawn.features.shape[2])),
            "pictures": told["n"],
        }


def times(pipes: Sequence[FewStepPipeline], rounds: int) -> list[list[float]]:
    """Milliseconds of one picture by every pipeline in turn; two rounds do not count."""
    taken: list[list[float]] = [[] for _ in pipes]
    for turn in range(rounds + 2):
        for at in rotated(list(range(len(pipes))), turn):
            start = time.perf_counter()
            pipes[at].generate(PROMPT, seed=turn)
            if turn > 1:
                taken[at].append(1e3 * (time.perf_counter() - start))
    return taken


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and first and third quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(middle, 3), "q1": round(low, 3), "q3": round(high, 3), "n": len(values)}


def rows_of(bench: Bench, judge: Judge | None, rounds: int) -> list[dict[str, Any]]:
    """Everything of every form."""
    listed = forms(bench)
    pipes = [pipeline(bench, form.graphs) for form in listed]
    whole = sum(file.bytes for file in bench.bundle.manifest.files)
    plain = sum(bench.bundle.graph(part).stat().st_size for part in listed[0].graphs.paths)
    plain += sum(
        (bench.bundle.root / file).stat().st_size
        for part in listed[0].graphs.paths
        for file in bench.bundle.manifest.parts[part].data
    )
    steps = pipes[0].contract.settle(DrawRequest()).steps
    references = pictures(bench, pipes[0])
    taken = times(pipes, rounds)
    found = []
    for form, pipe, spent in zip(listed, pipes, taken, strict=True):
        row = {
            "what": "precisions",
            "model": bench.name,
            "target": bench.measured.target.name,
            "form": form.name,
            "choices": counted(bench, form.pick),
            "error": rounded(bench.error(form.graphs)),
            "predicted": rounded(form.predicted),
            **likeness(references, pictures(bench, pipe)),
            "bytes": whole - plain + form.graphs.bytes,
            "steps": steps,
            "picture_ms": quartiles(spent),
            "of_fp32": quartiles([ours / theirs for ours, theirs in zip(spent, taken[0], strict=True)]),
        }
        if judge is not None:
            row["quality"] = judge.of(pipe, steps)
        print(f"{form.name} done", file=sys.stderr)
        found.append(row)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    names = list(rows[0]["error"])
    heads = ["precision", *names, "SSIM", "PSNR, dB", "R@1", "MSE", "Frechet", "MB", "ms of a picture", "of FP32's"]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for row in rows:
        cells = [row["form"], *(f"{row['error'][name]:.2e}" for name in names)]
        cells += [f"{row['ssim']:.4f}", f"{row['psnr_db']:.1f}"]
        told = row.get("quality")
        cells += (
            ["", "", ""]
            if told is None
            else [f"{told['recall']['mean']:.3f}", f"{told['mse']['mean']:.4f}", f"{told['frechet']:.2f}"]
        )
        spent, share = row["picture_ms"], row["of_fp32"]
        cells += [f"{row['bytes'] / 1e6:.2f}", f"{spent['median']:.1f} ({spent['q1']:.1f}-{spent['q3']:.1f})"]
        cells.append(f"{share['median']:.3f} ({share['q1']:.3f}-{share['q3']:.3f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--names", type=int, default=150, help="drawn for recall and distance; 0 for none")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    options = parser.parse_args()
    work = options.work.resolve()
    judge = Judge(work, options.names) if options.names else None
    rows = rows_of(Bench("emoji", work), judge, options.rounds)
    if not options.dry_run:
        record("precision", rows)
    text = table(rows)
    print(text)
    if options.table:
        options.table.write_text(text)


if __name__ == "__main__":
    main()
