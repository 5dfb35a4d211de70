"""What every benchmark here shares: a measured row never travels without its device, versions, count and spread."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("onnxruntime", "numpy", "onnx", "onnx-ir", "torch", "transformers", "diffusers")


def interleaved(contestants: dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Wall milliseconds of every contestant, in turn, `rounds` times: drift of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warmup + rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if turn >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and spread (10th to 90th percentile) of one contestant."""
    cuts = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return {
        "median": round(statistics.median(values), 4),
        "p10": round(cuts[0], 4),
        "p90": round(cuts[-1], 4),
        "n": len(values),
    }


def device() -> dict[str, str]:
    """The processor, as the system names it, and how many of its cores we may use."""
    import os

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {"cpu": cpu, "cores": str(len(os.sched_getaffinity(0))), "system": platform.platform()}


def versions() -> dict[str, str]:
    """Versions of the packages a figure may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def record(benchmark: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Append rows to `benchmarks/results/<benchmark>.jsonl` with all that is needed to repeat them; print them too."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{benchmark}.jsonl"
    common = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python " + " ".join(Path(arg).name if arg.startswith("/") else arg for arg in sys.argv),
        "device": device(),
        "versions": versions(),
    }
    with path.open("a") as out:
        for row in rows:
            print(json.dumps(row))
            out.write(json.dumps({**row, **common}) + "\n")
    return path
