"""Where a step of a text bundle's decoder goes, by operator: ONNX Runtime's own profile, decoding and prefilling.

    python benchmarks/profile_text.py BUNDLE [--rows 1] [--context 256] [--prefill 512] [--steps 20] [--threads 2]

Decoding scores `--rows` tokens, the last of them new rows on a cache of `--context`; prefilling runs `--prefill` tokens
on an empty cache. Weights are counted as a step must read them: a product's whole, a looked-up table's by the row. What
attention reads of the cache is not counted. Profiling costs time, so each step is timed without it too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import onnx_ir as ir
import onnxruntime
from harness import record, summary

from edgekit.bundle.reader import Bundle
from edgekit.bundle.store import read_bundle
from edgekit.runtime.backends.ort import OrtSession
from edgekit.runtime.llm.tree import TokenTree
from edgekit.runtime.llm.verifier import LocalVerifier

WARMUP = 3
LOOKUPS = ("Gather", "GatherBlockQuantized", "GroupQueryAttention")  # the last looks up sines and cosines
BETWEEN = "between nodes"


def open_engine(graph: Path, threads: int, profile: Path | None = None) -> Any:
    """The decoder as `edgekit.runtime.backends.ort` opens it, its profile going to files that begin with `profile`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def stepper(engine: Any, bundle: Bundle, rows: int, context: int) -> Callable[[], None]:
    """One run of `rows` tokens after `context` others, the same every time; after none, logits of the last alone."""
    decoding = bundle.manifest.decoding
    assert decoding is not None
    verifier = LocalVerifier(OrtSession(engine, "decoder", "cpu"), decoding, chunk=max(rows, 512))
    text = tuple(5 + number * 7 % 1009 for number in range(context + rows))
    known, tree = text, TokenTree(text[-1:], (-1,))
    if context:
        verifier.score(text[:context], TokenTree(text[context - 1 : context], (-1,)))
        verifier.keep((0,))
        known, tree = text[: context + 1], TokenTree.chain(text[context], text[context + 1 :])

    def step() -> None:
        verifier.rollback(context)
        verifier.score(known, tree)

    return step


def timed(step: Callable[[], None], steps: int) -> list[float]:
    """Wall milliseconds of each step, after some that are not counted."""
    times = []
    for _ in range(WARMUP + steps):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return times[WARMUP:]


def by_operator(events: Sequence[dict[str, Any]], steps: int) -> dict[str, tuple[int, list[float]]]:
    """Operator -> its nodes in a step and its milliseconds in each of the last `steps` runs, the longest first."""
    runs = sorted((event["ts"], event["dur"]) for event in events if event["name"] == "model_run")[-steps:]
    nodes = [event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]
    times: dict[str, list[float]] = defaultdict(lambda: [0.0] * steps)
    counts: Counter[str] = Counter()
    for number, (start, whole) in enumerate(runs):
        times[BETWEEN][number] += whole / 1e3
        for event in nodes:
            if start <= event["ts"] <= start + whole:
                name = event["args"]["op_name"]
                times[name][number] += event["dur"] / 1e3
                times[BETWEEN][number] -= event["dur"] / 1e3
                counts[name] += 1
    longest = sorted(times, key=lambda name: -median(times[name]))
    return {name: (counts[name] // steps, times[name]) for name in longest}


def weight_bytes(graph: Path, rows: int) -> Counter[str]:
    """Operator -> bytes of weights that a step of `rows` tokens reads, each node's counted anew."""
    found: Counter[str] = Counter()
    for node in ir.load(graph).graph:
        for value in node.inputs:
            if value is not None and value.const_value is not None:
                tensor = value.const_value
                share = min(1.0, rows / tensor.shape[0]) if node.op_type in LOOKUPS and len(tensor.shape) else 1.0
                found[node.op_type] += int(tensor.nbytes * share)
    return found


def profile(bundle: Bundle, rows: int, context: int, steps: int, threads: int) -> list[dict[str, Any]]:
    """One row for the step as a whole, without the profiler, and one per operator, with it."""
    decoding = bundle.manifest.decoding
    assert decoding is not None
    graph = bundle.graph(decoding.part)
    weights = weight_bytes(graph, rows)
    plain = timed(stepper(open_engine(graph, threads), bundle, rows, context), steps)
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(graph, threads, Path(folder) / "profile")
        timed(stepper(engine, bundle, rows, context), steps)
        found = by_operator(json.loads(Path(engine.end_profiling()).read_text()), steps)
    common = {"rows": rows, "context": context, "threads": threads, "unit": "ms/step"}
    operators = {"step, not profiled": (sum(count for count, _ in found.values()), plain), **found}
    total = sum(median(ms) for _, ms in found.values())
    return [
        {
            **common,
            "operator": name,
            "nodes": nodes,
            "share": round(median(ms) / total, 4),
            "weight_mb": round((weights[name] if name in found else weights.total()) / 1e6, 3),
            **summary(ms),
        }
        for name, (nodes, ms) in operators.items()
    ]


def table(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown; shares are of the profiled step."""
    lines = [f"### {title}", "", "| operator | nodes | ms | share | weights, MB | GB/s |", "|---|" + "---:|" * 5]
    for row in rows:
        speed = f"{row['weight_mb'] / row['median']:.1f}" if row["weight_mb"] >= 1 else ""
        cells = [row["operator"], str(row["nodes"]), f"{row['median']:.3f}", f"{row['share']:.1%}"]
        lines.append("| " + " | ".join([*cells, f"{row['weight_mb']:.1f}", speed]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    args = parser.parse_args()
    bundle = read_bundle(args.bundle)
    decode = profile(bundle, args.rows, args.context, args.steps, args.threads)
    prefill = profile(bundle, args.prefill, 0, args.steps, args.threads)
    print(table(f"decode: {args.rows} rows after {args.context} tokens", decode))
    print(table(f"prefill: {args.prefill} rows", prefill))
    if not args.dry_run:
        record("profile_text", [{"bundle": args.bundle.name, **row} for row in (*decode, *prefill)])


if __name__ == "__main__":
    main()
