"""One graph by one engine, in a process that stays: asked over stdin for a step, it answers with a line of JSON.

    python precision_engines.py make MAKER GRAPH CALIBRATION.npz TARGET    what a tool makes of a float graph
    python precision_engines.py serve ENGINE GRAPH FEEDS.npz [--threads 2]

The files of feeds hold `call/input` arrays (benchmarks/precision_speed.py writes them). `serve` answers, each with one
line that begins with MARK: `first` opens the graph and runs it once, `step` runs it once, `outputs FILE` runs every
call and saves what came. Needs nothing but the engine and numpy.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from measure import package_versions, raise_priority, timed

Array = npt.NDArray[Any]
Feeds = dict[str, Array]
Run = Callable[[Feeds], Array]

MARK = "answer: "


def read_calls(path: Path) -> list[Feeds]:
    """The calls in a file of feeds, in order."""
    calls: dict[int, Feeds] = {}
    with np.load(path, allow_pickle=False) as stored:
        for key in stored.files:
            number, _, name = key.partition("/")
            calls.setdefault(int(number), {})[name] = stored[key]
    return [calls[number] for number in sorted(calls)]


# makers: a float graph -> what the tool makes of it


class Reader:
    """Feeds as ONNX Runtime's calibration asks for them."""

    def __init__(self, calls: list[Feeds]) -> None:
        self.calls, self.left = calls, iter(calls)

    def get_next(self) -> Feeds | None:
        return next(self.left, None)

    def rewind(self) -> None:
        self.left = iter(self.calls)


def make_dynamic(graph: Path, calls: list[Feeds], target: Path, **options: Any) -> None:
    """ONNX Runtime's `quantize_dynamic`, its defaults; it needs no calls."""
    del calls
    tools = import_module("onnxruntime.quantization")
    big = graph_bytes(graph) > 1 << 30
    tools.quantize_dynamic(graph, target / "model.onnx", use_external_data_format=big, **options)


def make_static(graph: Path, calls: list[Feeds], target: Path) -> None:
    """ONNX Runtime's `quantize_static`, its defaults: QDQ, every operator it knows, MinMax."""
    tools = import_module("onnxruntime.quantization")
    options: dict[str, Any] = {"use_external_data_format": graph_bytes(graph) > 1 << 30}
    tools.quantize_static(graph, target / "model.onnx", Reader(calls), **options)


def make_nncf(graph: Path, calls: list[Feeds], target: Path, **options: Any) -> None:
    """NNCF's post-training quantization for OpenVINO, its defaults; shapes are those of the calls."""
    openvino, nncf = import_module("openvino"), import_module("nncf")
    model = openvino.Core().read_model(graph)
    model.reshape({name: list(value.shape) for name, value in calls[0].items()})
    if "model_type" in options:
        options["model_type"] = nncf.ModelType(options["model_type"])
    made = nncf.quantize(model, nncf.Dataset(calls), subset_size=len(calls), **options)
    openvino.save_model(made, target / "model.xml", compress_to_fp16=False)


def graph_bytes(graph: Path) -> int:
    """A graph and the data beside it."""
    return sum(file.stat().st_size for file in graph.parent.glob(f"{graph.name}*"))


MAKERS: dict[str, Callable[[Path, list[Feeds], Path], None]] = {
    "dynamic": make_dynamic,
    "dynamic-matmul": partial(make_dynamic, op_types_to_quantize=["MatMul", "Gemm"]),
    "static": make_static,
    "nncf": make_nncf,
    "nncf-transformer": partial(make_nncf, model_type="transformer"),
}


# engines: a graph -> how it is run


def open_edgekit(graph: str, feeds: Feeds, threads: int) -> Run:
    """The session a pipeline of edgekit opens."""
    del feeds
    backends = import_module("edgekit.runtime.backends")
    session = backends.open_session(Path(graph), "cpu", threads=threads, planned=False)
    wanted = next(spec.name for spec in session.outputs if not spec.name.startswith("guard."))
    return lambda given: np.asarray(session.run(given)[wanted])


def open_ort(graph: str, feeds: Feeds, threads: int) -> Run:
    """ONNX Runtime with nothing set but the thread count."""
    del feeds
    ort = import_module("onnxruntime")
    ort.set_default_logger_severity(3)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return lambda given: np.asarray(session.run(None, given)[0])


def open_openvino(graph: str, feeds: Feeds, threads: int, precision: str | None) -> Run:
    """OpenVINO, compiled for latency and the shapes that are fed; `precision` of what is not quantized, or its own."""
    openvino = import_module("openvino")
    core = openvino.Core()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision
    model = core.read_model(graph)
    model.reshape({name: list(value.shape) for name, value in feeds.items()})
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda given: np.array(request.infer(given)[0])


# engine -> how to open a graph; packages it depends on
ENGINES: dict[str, tuple[Callable[[str, Feeds, int], Run], tuple[str, ...]]] = {
    "edgekit": (open_edgekit, ("edgekit", "onnxruntime")),
    "ort": (open_ort, ("onnxruntime",)),
    "openvino-f32": (partial(open_openvino, precision="f32"), ("openvino",)),
    "openvino": (partial(open_openvino, precision=None), ("openvino",)),
}


def resident() -> dict[str, float]:
    """Megabytes of this process: the peak so far, now, and of now what no file backs."""
    found = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text()))
    fields = {"peak_mb": "VmHWM", "resident_mb": "VmRSS", "anonymous_mb": "RssAnon"}
    return {name: int(found[field]) * 1024 / 1e6 for name, field in fields.items()}


def answers(engine: str, graph: str, calls: list[Feeds], threads: int) -> Iterator[dict[str, Any]]:
    """One answer for every line of stdin."""
    open_graph, packages = ENGINES[engine]
    run: Run | None = None
    for line in sys.stdin:
        order, _, argument = line.strip().partition(" ")
        if order == "first":
            start = time.perf_counter()
            run = open_graph(graph, calls[0], threads)
            opened = time.perf_counter() - start
            first = timed(partial(run, calls[0]))
            yield {"open_s": opened, "first_s": first, "version": package_versions(*packages), **resident()}
        elif run is None:
            raise SystemExit(f"{order!r} before 'first'")
        elif order == "step":
            yield {"seconds": timed(partial(run, calls[0])), **resident()}
        elif order == "outputs":
            np.savez(argument, **{str(number): run(call) for number, call in enumerate(calls)})  # type: ignore[arg-type]
            yield {}
        else:
            raise SystemExit(f"no order {order!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("make", "serve"))
    parser.add_argument("kind", help=f"of {', '.join(MAKERS)}; or of {', '.join(ENGINES)}")
    parser.add_argument("graph", type=Path)
    parser.add_argument("feeds", type=Path)
    parser.add_argument("target", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    calls = read_calls(options.feeds)
    if options.verb == "make":
        shutil.rmtree(options.target, ignore_errors=True)
        options.target.mkdir(parents=True)
        MAKERS[options.kind](options.graph, calls, options.target)
        return
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine says goes to the log
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    first = raise_priority()
    for answer in answers(options.kind, str(options.graph), calls, options.threads):
        print(MARK + json.dumps({**answer, "priority": first}), file=out, flush=True)


if __name__ == "__main__":
    main()
