"""One step of a denoiser on one CPU: edgekit's mixed and uniform precision beside what other tools make of its graph.

    python benchmarks/precision_speed.py --work DIR --bundle FP32 [--uniform BUNDLE] [--mixed BUNDLE]
                                         [--openvino BUNDLE] [--engines ort,dynamic,static,nncf] [--rounds 15]
                                         [--table FILE]

All tools are given the graph of the float32 bundle FP32 and the same recorded runs of it, taken from the deployed
trajectory of prompts that no held-out run shares. Every engine has a process of its own that stays alive; in each round
a coordinator asks one after the other for one step, and begins one engine further each time, so that what else the
machine does hits all alike. A row has the median and quartiles of a step, the same of its ratio to plain ONNX Runtime's
step of the same round, resident memory after the first step and at the end, bytes on disk, and the error of its
answers to the held-out runs against those of plain ONNX Runtime in float32.

Engines: `ort` (float32), `dynamic` and `dynamic-matmul` (quantize_dynamic: every operator it knows, or products
alone), `static` (quantize_static), `openvino-f32` and `openvino` (float32, and the precision OpenVINO takes by itself),
`nncf` and `nncf-transformer` (nncf.quantize; what stays in floats as OpenVINO likes, or `-f32` behind the name),
`fp32` (edgekit's own session of FP32). Tools live in DIR/venv-NAME, made by pip when it is not there; what they make is
kept in DIR/BUNDLE's name.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from harness import record
from peers_text import rotated

from edgekit.bundle.store import Bundle, read_bundle
from edgekit.quant.metrics import NSR, errors, metrics_for
from edgekit.quant.pictures import Call, PictureWorkload, denoisers
from edgekit.quant.requests import deployed, picture_requests

Array = npt.NDArray[Any]
Command = list[Path | str]

WORKER = Path(__file__).parent / "peers" / "precision_engines.py"
MARK = "answer: "  # before a line of the worker's
PACKAGES = {
    "ort": ("onnxruntime==1.32.0", "onnx==1.23.2", "numpy==2.4.6", "sympy"),
    "ov": ("nncf==3.4.0", "openvino==2026.4.1", "numpy==2.4.6"),
}
PAUSE = 0.05  # seconds before a step: threads of the engine before it have gone to sleep by then


@dataclass(frozen=True)
class Engine:
    """A row of the table.

    Attributes:
        key: as typed.
        name: as printed.
        maker: what makes its graph, of peers/precision_engines.py; empty for a float graph or a bundle of edgekit.
        runs: the engine, of the same.
        home: its environment; empty is that of edgekit.
    """

    key: str
    name: str
    maker: str
    runs: str
    home: str


ENGINES = {
    engine.key: engine
    for engine in (
        Engine("ort", "ONNX Runtime, fp32", "", "ort", "ort"),
        Engine("dynamic", "ONNX Runtime, quantize_dynamic", "dynamic", "ort", "ort"),
        Engine("dynamic-matmul", "ONNX Runtime, quantize_dynamic, MatMul", "dynamic-matmul", "ort", "ort"),
        Engine("static", "ONNX Runtime, quantize_static", "static", "ort", "ort"),
        Engine("openvino-f32", "OpenVINO, f32", "", "openvino-f32", "ov"),
        Engine("openvino", "OpenVINO, own precision", "", "openvino", "ov"),
        Engine("nncf-f32", "NNCF, OpenVINO, rest f32", "nncf", "openvino-f32", "ov"),
        Engine("nncf", "NNCF, OpenVINO", "nncf", "openvino", "ov"),
        Engine("nncf-transformer-f32", "NNCF transformer, rest f32", "nncf-transformer", "openvino-f32", "ov"),
        Engine("nncf-transformer", "NNCF transformer, OpenVINO", "nncf-transformer", "openvino", "ov"),
        Engine("fp32", "edgekit, fp32", "", "edgekit", ""),
    )
}
USUAL = "ort,dynamic,static,nncf-f32,nncf,fp32"


class Failed(Exception):
    """An engine cannot be measured; the text says why."""


class Worker:
    """A process that stays: an order is a line, and so is the answer."""

    def __init__(self, command: Command, log: Path) -> None:
        self._log = log
        with log.open("w") as out:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, text=True, start_new_session=True
            )

    def ask(self, order: str) -> dict[str, Any]:
        """Raises Failed: the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(order + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self._process.stdout:
            if line.startswith(MARK):
                answer: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return answer
        raise Failed(f"its process ended with {self._process.wait()}; see {self._log}")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Workshop:
    """The folder with environments, and one below it for this model: recorded runs, graphs and logs."""

    def __init__(self, folder: Path, bundle: Path, calls: int, held: int) -> None:
        self.folder, self.home = folder, folder / bundle.name
        (self.home / "logs").mkdir(parents=True, exist_ok=True)
        self.bundle = read_bundle(bundle, verify=False)
        (self.part,) = denoisers(self.bundle)
        self.graph = self._apart(self.bundle.graph(self.part))
        self.calibration, self.held = self.home / "calibration.npz", self.home / "held.npz"
        if not (self.calibration.exists() and self.held.exists()):
            chosen, held_out = recorded(self.bundle, self.part, calls, held)
            save_calls(self.calibration, chosen)
            save_calls(self.held, held_out)

    def _apart(self, graph: Path) -> Path:
        """The float graph outside its bundle: tools write beside what they read."""
        folder = self.home / "float"
        if not folder.exists():
            making = folder.with_name("making-float")
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            for file in graph.parent.glob(f"{graph.name}*"):
                shutil.copyfile(file, making / file.name)
            making.rename(folder)
        return folder / graph.name

    def python(self, name: str) -> Path | str:
        """An environment's interpreter, made with what it needs where it is not there. Raises Failed."""
        if not name:
            return sys.executable
        root = self.folder / f"venv-{name}"
        python = root / "bin" / "python"
        if not python.exists():
            print(f"making {root}", file=sys.stderr)
            venv.create(root, with_pip=True)
            done = subprocess.run(
                [python, "-m", "pip", "install", "-q", *PACKAGES[name]], capture_output=True, text=True
            )
            if done.returncode:
                shutil.rmtree(root)
                raise Failed(f"pip: {done.stderr.strip()}")
        return python

    def made(self, engine: Engine) -> Path:
        """The graph that a tool makes, or the float one. Raises Failed."""
        if not engine.maker:
            return self.graph
        target = self.home / engine.maker
        model = target / ("model.xml" if engine.home == "ov" else "model.onnx")
        if not target.exists():
            print(f"making {target}", file=sys.stderr)
            making, log = target.with_name(f"making-{target.name}"), self.home / "logs" / f"make-{engine.maker}.log"
            command: Command = [self.python(engine.home), WORKER, "make", engine.maker, self.graph, self.calibration]
            start = time.perf_counter()
            with log.open("w") as out:
                done = subprocess.run([*command, making], stdout=out, stderr=out)
            if done.returncode:
                raise Failed(f"{engine.maker} ended with {done.returncode}; see {log}")
            print(f"{engine.maker} took {time.perf_counter() - start:.0f} s", file=sys.stderr)
            making.rename(target)
        return model

    def worker(self, engine: Engine, graph: Path, threads: int) -> Worker:
        """A process for a graph. Raises Failed."""
        command: Command = [self.python(engine.home), WORKER, "serve", engine.runs, graph, self.held]
        return Worker([*command, "--threads", str(threads)], self.home / "logs" / f"run-{engine.key}.log")

    def outputs(self, engine: Engine) -> Path:
        """Where an engine's answers to the held-out runs lie."""
        return self.home / f"outputs-{engine.key}.npz"


def recorded(bundle: Bundle, part: str, calls: int, held: int) -> tuple[list[Call], list[Call]]:
    """Runs of a part at the bundle's own size, for calibration and held out: no prompt or seed is in both."""
    found = []
    for requests, count in zip(picture_requests(bundle, None), (calls, held), strict=True):
        kept: list[Call] = []
        for request in requests:
            if len(kept) < count:
                kept += PictureWorkload(bundle, [deployed(request)]).record([part])[part]
        found.append(kept[:count])
    return found[0], found[1]


def save_calls(path: Path, calls: Sequence[Call]) -> None:
    """As peers/precision_engines.py reads them."""
    arrays = {f"{number}/{name}": value for number, call in enumerate(calls) for name, value in call.feeds.items()}
    np.savez(path, **arrays)  # type: ignore[arg-type]


def graph_bytes(graph: Path) -> int:
    """A graph and the data beside it, as they lie on the disk."""
    beside = [graph.with_suffix(".bin")] if graph.suffix == ".xml" else sorted(graph.parent.glob(f"{graph.name}?*"))
    return sum(file.stat().st_size for file in (graph, *beside))


def bundle_graph(path: Path, part: str) -> Path:
    """A bundle's graph of a part."""
    return read_bundle(path, verify=False).graph(part)


def opened(workshop: Workshop, engines: Sequence[tuple[Engine, Path | None]], threads: int) -> dict[Engine, Any]:
    """Every engine that can be opened: its worker, its graph, its answer to `first`. The others say why not."""
    found: dict[Engine, Any] = {}
    for engine, graph in engines:
        worker = None
        try:
            path = workshop.made(engine) if graph is None else graph
            worker = workshop.worker(engine, path, threads)
            found[engine] = (worker, path, worker.ask("first"))
            worker.ask(f"outputs {workshop.outputs(engine)}")
        except Failed as why:
            print(f"{engine.name} is left out: {why}", file=sys.stderr)
            found.pop(engine, None)
            if worker is not None:
                worker.close()
    return found


def rounds_of(found: dict[Engine, Any], rounds: int) -> dict[Engine, list[dict[str, Any]]]:
    """`rounds` steps of every engine, in turn; the first turn does not count."""
    steps: dict[Engine, list[dict[str, Any]]] = {engine: [] for engine in found}
    for turn in range(rounds + 1):
        for engine in rotated(list(found), turn):
            time.sleep(PAUSE)
            answer = found[engine][0].ask("step")
            if turn:
                steps[engine].append(answer)
        print(f"round {turn} of {rounds} done", file=sys.stderr)
    return steps


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and first and third quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": round(middle, 4), "q1": round(low, 4), "q3": round(high, 4), "n": len(values)}


def answers_of(path: Path) -> list[Array]:
    with np.load(path, allow_pickle=False) as stored:
        return [stored[name] for name in sorted(stored.files, key=int)]


def row(workshop: Workshop, engine: Engine, found: Any, steps: Sequence[dict[str, Any]], base: Any) -> dict[str, Any]:
    """Everything measured of one engine; `base` has the steps of the plain engine, and its answers."""
    _, graph, first = found
    taken = [1e3 * step["seconds"] for step in steps]
    answers = answers_of(workshop.outputs(engine))
    told = errors((NSR, *metrics_for(base[1])), base[1], answers)
    return {
        "what": "step",
        "model": workshop.home.name,
        "engine": engine.name,
        "version": first["version"],
        "shape": list(answers[0].shape),
        "priority": first["priority"],
        "step_ms": quartiles(taken),
        "of_ort": quartiles([ours / theirs for ours, theirs in zip(taken, base[0], strict=True)]),
        "open_s": round(first["open_s"], 2),
        "peak_mb": round(first["peak_mb"]),
        "first_mb": round(first["resident_mb"]),
        "steady_mb": round(steps[-1]["resident_mb"]),
        "steady_anonymous_mb": round(steps[-1]["anonymous_mb"]),
        "bytes": graph_bytes(graph),
        "error": {name: float(f"{value:.4g}") for name, value in told.items()},
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    heads = ("engine", "step, ms", "of ONNX Runtime's", "peak, first, steady MB", "MB on disk", "NSR", "content")
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for each in rows:
        step, share = each["step_ms"], each["of_ort"]
        cells = [
            each["engine"],
            f"{step['median']:.1f} ({step['q1']:.1f}-{step['q3']:.1f})",
            f"{share['median']:.3f} ({share['q1']:.3f}-{share['q3']:.3f})",
            f"{each['peak_mb']}, {each['first_mb']}, {each['steady_mb']}",
            f"{each['bytes'] / 1e6:.1f}",
            f"{each['error']['nsr']:.1e}",
            f"{each['error'].get('content', float('nan')):.1e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True, help="float32")
    parser.add_argument("--uniform", type=Path, action="append", default=[])
    parser.add_argument("--mixed", type=Path, action="append", default=[])
    parser.add_argument("--openvino", type=Path, action="append", default=[], help="a bundle whose graph OpenVINO runs")
    parser.add_argument("--engines", default=USUAL)
    parser.add_argument("--calls", type=int, default=4, help="recorded runs that tools calibrate on")
    parser.add_argument("--held", type=int, default=2, help="recorded runs that errors are measured on")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    options = parser.parse_args()
    workshop = Workshop(options.work.resolve(), options.bundle.resolve(), options.calls, options.held)
    listed: list[tuple[Engine, Path | None]] = [(ENGINES["ort"], None)]
    listed += [(ENGINES[key], None) for key in options.engines.split(",") if key and key != "ort"]
    for kind in ("uniform", "mixed"):
        for path in getattr(options, kind):
            name = path.resolve().name
            listed.append(
                (Engine(f"{kind}-{name}", f"edgekit, {name}", "", "edgekit", ""), bundle_graph(path, workshop.part))
            )
    for path in options.openvino:
        name = f"edgekit, {path.resolve().name}, in OpenVINO"
        engine = Engine(f"openvino-{path.resolve().name}", name, "", "openvino-f32", "ov")
        listed.append((engine, bundle_graph(path, workshop.part)))
    found = opened(workshop, listed, options.threads)
    plain = ENGINES["ort"]
    if plain not in found:
        raise SystemExit("plain ONNX Runtime, which all are held against, did not open")
    try:
        steps = rounds_of(found, options.rounds)
    finally:
        for worker, *_ in found.values():
            worker.close()
    base = ([1e3 * step["seconds"] for step in steps[plain]], answers_of(workshop.outputs(plain)))
    rows = [
        {**row(workshop, engine, each, steps[engine], base), "threads": options.threads}
        for engine, each in found.items()
    ]
    if not options.dry_run:
        record("precision_speed", rows)
    text = table(rows)
    print(text)
    if options.table:
        options.table.write_text(text)


if __name__ == "__main__":
    main()
