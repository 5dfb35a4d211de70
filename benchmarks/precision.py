"""Mixed precision of few-step pictures at equal bytes: by edgekit's measurements, and by every other rule.

    python benchmarks/precision.py --work DIR [--models emoji,small-lcm,small-sdxl] [--table FILE] [--dry-run]

`emoji` is the model that ships; the others have random weights in published forms (benchmarks/peers/picture_models.py),
and their numbers mean something as errors alone. Each is exported in float32 and measured once by `edgekit.quant`, on
the library's calibration requests; measurements stay in DIR. A rival decides what every layer becomes:

    w8a8, w4a16-64     one choice everywhere, or the nearest above it that a layer may take
    expert 8, 4        first and last layers, shortcuts and the time embedding in 16 bits, the rest one choice
    weight error       the same integer program on sum |dW|^2 / |W|^2, and on sum |dW|^2, in place of measured error
    quantize_static    ONNX Runtime's own tool, its defaults, on the same recorded runs; and on those layers alone to
                       which edgekit may give integers, in edgekit's rewritten graphs

Edgekit's plan (`mixed`) is then decided with the rival's bytes as its budget, and both are made, and run on requests
that nothing was decided on. A row has the rival's error and mixed's, in every metric: the finished sample against that
of float32, `predicted` what the study said mixed would have. Time is left free: sizes alone are compared.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from harness import record

from edgekit.bundle.store import Bundle, read_bundle
from edgekit.errors import BudgetTooSmall
from edgekit.export.probe_worker import probe_apart
from edgekit.quant.allocate import Limits, allocate, uniform
from edgekit.quant.budget import Budget
from edgekit.quant.choices import CHOICES
from edgekit.quant.flow import measure_bundle
from edgekit.quant.graph import weight_matrix
from edgekit.quant.metrics import NSR, errors
from edgekit.quant.mixed import Measured
from edgekit.quant.pictures import Call
from edgekit.quant.prepare import rounder
from edgekit.quant.study import Pick
from edgekit.quant.targets import get_target
from edgekit.quant.verify import Made, make
from edgekit.quant.weights import restore
from edgekit.quant.workload import reference_of
from edgekit.runtime.backends import open_session

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("emoji", "small-lcm", "small-sdxl")
LOW = ("w8a8", "w4a16-64")
KEPT = {"conv_in", "conv_out", "proj_out", "time", "shortcut"}  # roles that the rule of practitioners leaves in floats
FOREVER = 1e7  # milliseconds that no plan takes: a budget of bytes alone
MARGIN = 512  # bytes, by which graphs of equal weights may differ
TRIES = 8  # budgets until what is written, scales of convolutions and alignment included, is no larger than the rival


@dataclass(frozen=True)
class Graphs:
    """A bundle's graphs as one rule made them.

    Attributes:
        paths: by part.
        bytes: of these graphs and their data on the disk.
    """

    paths: Mapping[str, Path]
    bytes: int


@dataclass(frozen=True, eq=False)
class Rival:
    """A rule and what came of it; `pick` is None where another tool made the graphs."""

    name: str
    graphs: Graphs
    pick: Pick | None = None


class Bench:
    """One model, measured; graphs of every rule come and go below `work`."""

    def __init__(self, name: str, work: Path) -> None:
        self.name, self.work = name, work / name
        self.work.mkdir(parents=True, exist_ok=True)
        self.source, self.bundle = exported(name, self.work)
        prompts = self.source / "calibration.txt"
        self.measured: Measured = measure_bundle(
            self.bundle,
            get_target("cpu"),
            prompts if prompts.exists() else None,
            self.work / "measured",
            progress(name),
            probe_apart(None),
        )
        self.problem = self.measured.study.problem()
        self.references = reference_of(self.measured.held_out)
        print(f"{name}: {self.measured.study.facts}", file=sys.stderr)

    def lowered(self, pick: Pick, name: str) -> Graphs:
        """The graphs of a pick, in the order the parts run, as the library makes them."""
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        chosen = self.measured.study.choices_of(pick)
        made: list[Made] = []
        for part in self.measured.parts:
            fresh = self.measured.refresh(part, made)
            made.append(make(fresh, chosen.get(part.part, {}), self.measured.target, folder))
        return Graphs({each.part.part: each.path for each in made}, sum(each.bytes for each in made))

    def error(self, graphs: Graphs) -> dict[str, float]:
        """Every metric of the finished samples of held-out requests."""
        sessions = {part: open_session(path, "cpu", planned=False) for part, path in graphs.paths.items()}
        metrics = {metric.name: metric for metric in (*self.measured.held_out.metrics, NSR)}
        return errors(tuple(metrics.values()), self.references, self.measured.held_out.run(sessions))

    def mixed(self, rival: Rival) -> tuple[Graphs, Mapping[str, float], Pick]:
        """The plan that is no larger than a rival: its graphs, and the errors it was predicted to have.

        Raises:
            BudgetTooSmall: no plan is.
        """
        study, fixed = self.measured.study, self.measured.study.fixed_bytes
        planned = self.problem.bytes[np.arange(len(study.rows)), rival.pick].sum() if rival.pick is not None else None
        budget = float(rival.graphs.bytes if planned is None else planned) + (fixed if planned is not None else 0)
        for _ in range(TRIES):
            found = study.decide(Budget(bytes=budget, milliseconds=FOREVER))
            graphs = self.lowered(found.pick, "mixed")
            if graphs.bytes <= rival.graphs.bytes:
                return graphs, found.errors, found.pick
            budget -= graphs.bytes - rival.graphs.bytes + MARGIN
        raise BudgetTooSmall(f"no plan of {TRIES} tried is as small as {rival.name}")

    def rivals(self) -> Iterator[Rival]:
        """Every rule's graphs; each may be written over when the next is asked for."""
        for name, pick in self.picks():
            yield Rival(name, self.lowered(pick, "rival"), pick)
        yield Rival("quantize_static", self.static(restricted=False))
        yield Rival("quantize_static, our layers", self.static(restricted=True))

    def picks(self) -> Iterator[tuple[str, Pick]]:
        """The rules that give every layer one of our choices."""
        sizes = {}
        for low in LOW:
            pick = uniform(self.problem, low)
            sizes[low] = self.problem.bytes[np.arange(len(pick)), pick].sum() + self.problem.fixed_bytes
            yield low, pick
            yield f"expert {CHOICES[low].weight.bits}", self.expert(low)
        for low, size in sizes.items():
            for how in ("relative", "absolute"):
                limits = Limits(bytes=size, milliseconds=FOREVER)
                told = f"weight error, {how}, bytes of {low}"
                yield told, allocate(replace(self.problem, errors={how: self.weight_error(how)}), limits).pick

    def expert(self, low: str) -> Pick:
        """16 bits for the layers everyone protects, one choice for the rest."""
        pick, safe = uniform(self.problem, low), uniform(self.problem, "fp16")
        kept = np.array([row.role in KEPT for row in self.measured.study.rows])
        protected: Pick = np.where(kept, safe, pick)
        return protected

    def weight_error(self, how: str) -> F64:
        """|dW|^2 of every row and choice, in parts of |W|^2 where `relative`."""
        study, target = self.measured.study, self.measured.target
        table = np.zeros(study.bytes.shape)
        parts = {part.part: part for part in self.measured.parts}
        models = {name: part.model() for name, part in parts.items()}
        for at, row in enumerate(study.rows):
            part = parts[row.part]
            unit = next(unit for unit in part.units if unit.id == row.units[0])
            matrix = weight_matrix(models[row.part], unit)
            whole = float(np.square(matrix, dtype=np.float64).sum()) if how == "relative" else 1.0
            for column, name in enumerate(study.choices):
                if self.problem.allowed[at, column]:
                    kept = restore(rounder(part)(matrix, CHOICES[name], target.code_bits, unit))
                    table[at, column] = np.square(kept - matrix, dtype=np.float64).sum() / whole
        return table

    def static(self, *, restricted: bool) -> Graphs:
        """Every part that we change, by `quantize_static`."""
        from onnxruntime.quantization import quantize_static

        paths = {}
        for part in self.measured.parts:
            folder = self.work / "static" / part.part
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            source = part.path if restricted else self.bundle.graph(part.part)
            for file in source.parent.glob(f"{source.name}*"):  # the tool writes beside what it reads
                shutil.copyfile(file, folder / file.name)
            options: dict[str, Any] = {}
            if restricted:
                allowed = self.measured.target.allowed
                options["nodes_to_quantize"] = [unit.id for unit in part.units if "w8a8" in allowed(unit)]
            path = folder / "made.onnx"
            quantize_static(folder / source.name, path, Reader(part.calls), **options)
            paths[part.part] = path
        return Graphs(paths, sum(path.stat().st_size for path in paths.values()))


class Reader:
    """Recorded runs as ONNX Runtime's calibration asks for them."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls, self._left = calls, iter(calls)

    def get_next(self) -> dict[str, Array] | None:
        call = next(self._left, None)
        return None if call is None else dict(call.feeds)

    def rewind(self) -> None:
        self._left = iter(self._calls)


def exported(name: str, work: Path) -> tuple[Path, Bundle]:
    """The model's folder and its float32 bundle, made where they are not there."""
    source, bundle = ROOT / "models" / name, work / "float.bundle"
    if not source.exists():
        source = work / "folder"
        if not source.exists():
            making = source.with_name("making-folder")
            shutil.rmtree(making, ignore_errors=True)
            script = ROOT / "benchmarks" / "peers" / "picture_models.py"
            subprocess.run([sys.executable, script, "folder", name, making], check=True, capture_output=True)
            making.rename(source)
    if not bundle.exists():
        command: list[Path | str] = [sys.executable, "-m", "edgekit.cli", "export", source, "-o", bundle, "--quiet"]
        subprocess.run(command, check=True, capture_output=True)
    return source, read_bundle(bundle)


def progress(name: str) -> Any:
    """Says what is done on stderr, once for every thing."""
    last = ""

    def report(what: str, share: float) -> None:
        nonlocal last
        if what != last:
            last = what
            print(f"{name}: {what} ({100 * share:.0f} %)", file=sys.stderr)

    return report


def counted(bench: Bench, pick: Pick | None) -> dict[str, int]:
    """How many rows take each choice."""
    study = bench.measured.study
    if pick is None:
        return {}
    return {name: total for at, name in enumerate(study.choices) if (total := int((pick == at).sum()))}


def compared(bench: Bench) -> Iterator[dict[str, Any]]:
    """A row for every rival."""
    for rival in bench.rivals():
        told = {"what": "equal bytes", "model": bench.name, "target": bench.measured.target.name, "rival": rival.name}
        theirs = bench.error(rival.graphs)
        try:
            graphs, predicted, pick = bench.mixed(rival)
        except BudgetTooSmall as why:
            print(f"{bench.name}, {rival.name}: {why}", file=sys.stderr)
            continue
        ours = bench.error(graphs)
        yield {
            **told,
            "rival_bytes": rival.graphs.bytes,
            "mixed_bytes": graphs.bytes,
            "rival_choices": counted(bench, rival.pick),
            "mixed_choices": counted(bench, pick),
            "rival_error": rounded(theirs),
            "mixed_error": rounded(ours),
            "predicted": rounded(predicted),
            "wins": sum(ours[name] < theirs[name] for name in theirs),
            "metrics": len(theirs),
        }


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown: an error pair is rival's / mixed's, and in brackets how many times smaller mixed's is."""
    names = list(dict.fromkeys(name for row in rows for name in row["rival_error"]))
    heads = ["model", "rival", "kB, rival", "kB, mixed", *names, "mixed: predicted / measured"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---" + "|---:" * (len(heads) - 2) + "|"]
    for row in rows:
        cells = [row["model"], row["rival"], f"{row['rival_bytes'] / 1e3:.0f}", f"{row['mixed_bytes'] / 1e3:.0f}"]
        for name in names:
            theirs, ours = row["rival_error"].get(name, np.nan), row["mixed_error"].get(name, np.nan)
            cells.append(f"{theirs:.2e} / {ours:.2e} ({theirs / ours if ours else np.inf:.2f}x)")
        cells.append(
            ", ".join(f"{name} {value / row['mixed_error'][name]:.2f}" for name, value in row["predicted"].items())
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--table", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    options = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)  # quantize_static advises on preprocessing at every graph
    rows: list[dict[str, Any]] = []
    for name in options.models.split(","):
        for row in compared(Bench(name, options.work.resolve())):
            rows.append(row)
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr)
            if not options.dry_run:
                record("precision", [row])
    text = table(rows)
    print(text)
    if options.table:
        options.table.write_text(text)


if __name__ == "__main__":
    main()
