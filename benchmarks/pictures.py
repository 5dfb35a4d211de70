"""One picture of 512 pixels in one step, one CPU, fp32: edgekit beside diffusers, plain ONNX Runtime and OpenVINO.

    python benchmarks/pictures.py --work DIR [--models lcm,tiny,pixart,half-sdxl] [--rounds 5] [--table FILE]

Pipelines of random weights in published shapes (benchmarks/peers/picture_models.py) are made once in DIR and exported
once by `edgekit export` and by torch.onnx.export; how long that takes and the memory it needs is recorded too. Then
each measurement (benchmarks/peers/picture_engines.py) is one process with a process session of its own; engines take
turns, and the turn begins one engine further each round. A figure is the median over rounds of what one process
measured in its median drawing, after two that do not count: ONNX Runtime plans its memory anew after the first.

OpenVINO runs in DIR/venv-openvino or by what --openvino FILE says. Latents and 8-bit pictures of all engines are held
against diffusers'.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import record, summary
from peers_text import rotated

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "benchmarks" / "peers"
MODELS = ("lcm", "tiny", "pixart", "half-sdxl")
WATCH_SECONDS = 0.05
ROLES = ("text", "step", "decode", "picture")
Command = list[Path | str]


@dataclass(frozen=True)
class Engine:
    """A row of the table: the engine's key in picture_engines.py, its name, and which form of the model it is given."""

    key: str
    name: str
    form: str


ENGINES = (
    Engine("edgekit", "edgekit", "bundle"),
    Engine("openvino-f32", "OpenVINO, f32", "plain"),
    Engine("ort", "ONNX Runtime, plain graphs", "plain"),
    Engine("diffusers", "diffusers, torch", "folder"),
    Engine("openvino-bf16", "OpenVINO, bf16", "plain"),
)


class Watch(threading.Thread):
    """Peak resident memory of a process and all below it: the largest one's, and the most they held together."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.largest, self.together, self.done = pid, 0, 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(WATCH_SECONDS):
            family = [memory_of(pid) for pid in below(self.pid)]
            self.largest = max([self.largest, *(peak for peak, _ in family)])
            self.together = max(self.together, sum(now for _, now in family))


def below(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:
                continue
    return found


def memory_of(pid: int) -> tuple[int, int]:
    """Bytes: peak and present resident memory, 0 of a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.partition(":")[0]: line for line in lines if line.startswith(("VmHWM:", "VmRSS:"))}
    kilobytes = [int(sizes[name].split()[1]) if name in sizes else 0 for name in ("VmHWM", "VmRSS")]
    return 1024 * kilobytes[0], 1024 * kilobytes[1]


def watched(command: Command, log: Path) -> dict[str, float]:
    """Run to the end, everything it says in a log: seconds and memory. Raises SystemExit."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT)
        watch = Watch(process.pid)
        watch.start()
        code = process.wait()
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    watch.done.set()
    watch.join()
    if code:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {code}; see {log}")
    return {
        "wall_s": round(wall, 1),
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "largest_process_gib": round(watch.largest / 2**30, 2),
        "all_processes_gib": round(watch.together / 2**30, 2),
    }


def size_megabytes(path: Path) -> float:
    """Bytes on disk, host.npz not counted."""
    return round(sum(file.stat().st_size for file in path.rglob("*") if file.suffix != ".npz" and file.is_file()) / 1e6)


class Workshop:
    """The folder with pipelines, bundles, plain graphs and logs."""

    def __init__(self, folder: Path, openvino: Path) -> None:
        self.folder, self.openvino = folder, openvino
        (folder / "logs").mkdir(parents=True, exist_ok=True)

    def make(self, model: str, forms: set[str]) -> list[dict[str, Any]]:
        """The folder and those `forms` that are not there yet. Rows on the exports that ran. Raises SystemExit."""
        home = self.folder / model
        home.mkdir(exist_ok=True)
        script = PEERS / "picture_models.py"
        self._built(home / "folder", [sys.executable, script, "folder", model])
        cli: Command = [sys.executable, "-m", "edgekit.cli", "export", home / "folder", "--quiet", "--output"]
        ours = self._built(home / "bundle", cli) if "bundle" in forms else None
        plain = (
            self._built(home / "plain", [sys.executable, script, "plain", home / "folder"])
            if "plain" in forms
            else None
        )
        return [
            {"what": "export", "model": model, "engine": name, **row, "size_mb": size_megabytes(home / form), "n": 1}
            for name, form, row in (("edgekit", "bundle", ours), ("torch.onnx.export", "plain", plain))
            if row is not None
        ]

    def _built(self, target: Path, command: Command) -> dict[str, float] | None:
        """`target`, by `command target` where it is not there; a half-made one never gets its name."""
        if target.exists():
            return None
        making = target.with_name(f"making-{target.name}")
        shutil.rmtree(making, ignore_errors=True)
        print(f"making {target}", file=sys.stderr)
        row = watched([*command, making], self.folder / "logs" / f"make-{target.parent.name}-{target.name}.log")
        making.rename(target)
        return row

    def measure(self, engine: Engine, model: str, draws: int, threads: int) -> dict[str, Any]:
        """What one process measured. Raises SystemExit."""
        home = self.folder / model
        python = self.openvino if engine.key.startswith("openvino") else sys.executable
        options = ["--draws", str(draws), "--threads", str(threads), "--save", home / f"{engine.key}.npz"]
        command: Command = [python, PEERS / "picture_engines.py", engine.key, home / engine.form]
        command += [home / "plain" / "host.npz", *options]
        done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, cwd=ROOT)
        log = self.folder / "logs" / f"run-{model}-{engine.key}.log"
        log.write_text(f"{done.stdout}\n{done.stderr}")
        if done.returncode:
            raise SystemExit(f"{engine.name} on {model} ended with {done.returncode}; see {log}")
        measured: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
        return measured

    def differences(self, engine: Engine, model: str) -> dict[str, float]:
        """Latents and 8-bit picture of an engine's first drawing beside those of diffusers'."""
        ours, theirs = (dict(np.load(self.folder / model / f"{key}.npz")) for key in (engine.key, "diffusers"))
        return compared(ours, theirs)


def compared(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Largest difference of latents, of the largest latent; largest and mean difference of pictures, of 255."""
    latents = np.abs(ours["latents"] - theirs["latents"]).max() / np.abs(theirs["latents"]).max()
    levels = np.abs(ours["picture"].astype(int) - theirs["picture"].astype(int))
    return {
        "latents_difference": float(f"{latents:.3g}"),
        "picture_largest": int(levels.max()),
        "picture_mean": round(float(levels.mean()), 4),
        "picture_contrast": round(float(theirs["picture"].std()), 1),
    }


def row(model: str, engine: Engine, runs: Sequence[dict[str, Any]], threads: int) -> dict[str, Any]:
    """Medians over rounds, with their spread, of one engine on one model."""
    found: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        for role in ROLES:
            found[f"{role}_ms"].append(summary([1e3 * seconds for seconds in run["seconds"][role]])["median"])
        for name in ("first_picture_s", "rss_mb", "anon_mb"):
            found[name].append(run[name])
    return {
        "what": "picture",
        "model": model,
        "engine": engine.name,
        "version": runs[0]["version"],
        "threads": threads,
        "priority": all(run["priority"] for run in runs),
        "draws_per_round": len(runs[0]["seconds"]["picture"]),
        **{name: summary(values) for name, values in found.items()},
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, a table per model, in the order of ENGINES."""
    lines: list[str] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        lines += [f"### {model}", ""]
        heads = ["engine", "text, ms", "step, ms", "decode, ms", "picture, ms", "first picture, s", "peak MB"]
        lines.append("| " + " | ".join([*heads, "latents differ", "8-bit: largest, mean"]) + " |")
        lines.append("|---" + "|---:" * (len(heads) + 1) + "|")
        for each in (row for row in rows if row["model"] == model):
            cells = [each["engine"], *(ranged(each[f"{role}_ms"]) for role in ROLES)]
            cells += [f"{each['first_picture_s']['median']:.1f}", f"{each['rss_mb']['median']:.0f}"]
            cells += [f"{each['latents_difference']:.1e}", f"{each['picture_largest']}, {each['picture_mean']:.4f}"]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def ranged(values: dict[str, float]) -> str:
    """A median, 10th and 90th percentile behind it."""
    return f"{values['median']:.0f} ({values['p10']:.0f}-{values['p90']:.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--engines", default=",".join(engine.key for engine in ENGINES))
    parser.add_argument("--openvino", type=Path, help="a Python that imports openvino")
    parser.add_argument("--rounds", type=int, default=5, help="0 exports only")
    parser.add_argument("--draws", type=int, default=2, help="that count, in each process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    options = parser.parse_args()
    workshop = Workshop(options.work, options.openvino or options.work / "venv-openvino" / "bin" / "python")
    engines = [engine for engine in ENGINES if engine.key in options.engines.split(",")]
    rows: list[dict[str, Any]] = []
    for model in options.models.split(","):
        exported = workshop.make(model, {engine.form for engine in engines} | ({"plain"} if options.rounds else set()))
        runs: dict[Engine, list[dict[str, Any]]] = {engine: [] for engine in engines}
        for turn in range(options.rounds):
            for engine in rotated(engines, turn):
                runs[engine].append(workshop.measure(engine, model, options.draws, options.threads))
            print(f"{model}: round {turn + 1} of {options.rounds} done", file=sys.stderr)
        drawn = [
            {**row(model, engine, found, options.threads), **workshop.differences(engine, model)}
            for engine, found in runs.items()
            if found
        ]
        if not options.dry_run:
            record("pictures", [*exported, *drawn])
        rows += drawn
    text = table(rows)
    print(text)
    if options.table:
        options.table.write_text(text)


if __name__ == "__main__":
    main()
