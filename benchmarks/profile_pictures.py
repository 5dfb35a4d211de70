"""Where a denoiser's step and a decoder's picture go, by operator, beside what the cores can do at most.

    python benchmarks/profile_pictures.py BUNDLE [--parts unet,vae_decoder] [--size 512] [--steps 5] [--threads 2]

ONNX Runtime's own profile of a bundle's graphs, batch 1, fp32. Operations are counted from each node's shapes: two per
multiply-add of convolutions, products and attention. The peak beside them is that of one product of 2048 x 2048
matrices by the same engine and threads, measured in turn with the steps, so that both have the machine's same hour. The
least time a part can take is its operations by that rate.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from harness import interleaved, record, summary
from onnx import TensorProto, helper
from profile_text import by_operator

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from measure import raise_priority

from edgekit.bundle.manifest import TensorSpec
from edgekit.bundle.reader import Bundle
from edgekit.bundle.store import read_bundle

SIDE = 2048  # of the matrices whose product is the peak
FUSED = {"FusedConv": "Conv", "FusedMatMul": "MatMul", "FusedGemm": "Gemm"}
Feeds = dict[str, np.ndarray]
Shape = list[int]


def open_engine(graph: str | bytes, threads: int, profile: Path | None = None) -> onnxruntime.InferenceSession:
    """A graph as edgekit opens a picture's, its profile going to files that begin with `profile`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_mem_pattern = False
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def feeds_of(bundle: Bundle, part: str, size: int) -> Feeds:
    """Noise for every float input and ones for every other; axes that are not the latent's are 1, a text's 77."""
    recipe = bundle.manifest.recipe
    assert recipe is not None
    latent = size // recipe.stages[0].init.downscale
    sizes = {"height": latent, "width": latent, "length": 77}
    random = np.random.default_rng(0)

    def fill(spec: TensorSpec) -> np.ndarray:
        shape = [dim if isinstance(dim, int) else sizes.get(dim, 1) for dim in spec.shape]
        floats = spec.dtype == "float32"
        return random.standard_normal(shape, np.float32) if floats else np.ones(shape, spec.dtype)

    return {spec.name: fill(spec) for spec in bundle.manifest.parts[part].inputs}


def operations(kind: str, inputs: list[Shape], output: Shape) -> int:
    """Of one node, from its shapes; 0 for what is no product."""
    kind = FUSED.get(kind, kind)
    if kind == "Conv":
        return 2 * math.prod(output) * math.prod(inputs[1][1:])
    if kind in ("MatMul", "Gemm"):
        return 2 * math.prod(output) * inputs[0][-1]
    if kind == "MultiHeadAttention":
        (batch, rows, width), keys = inputs[0], inputs[1][1]
        return 2 * batch * rows * keys * (width + output[-1])
    return 0


def counted(events: list[dict[str, Any]], runs: int) -> Counter[str]:
    """Operations of one run by operator."""
    found: Counter[str] = Counter()
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            args = event["args"]
            inputs, outputs = (
                [next(iter(shape.values())) for shape in args[f"{way}_type_shape"]] for way in ("input", "output")
            )
            if outputs:
                found[args["op_name"]] += operations(args["op_name"], inputs, outputs[0])
    return Counter({name: count // runs for name, count in found.items()})


def product(threads: int) -> Callable[[], object]:
    """The product of two matrices that are both fed."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [SIDE, SIDE]) for name in "abc"]
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "product", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    engine = open_engine(onnx.ModelProto.SerializeToString(model), threads)
    matrix = np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32)
    return lambda: engine.run(None, {"a": matrix, "b": matrix})


def profile(bundle: Bundle, part: str, size: int, steps: int, threads: int) -> list[dict[str, Any]]:
    """A row for the part as a whole, without the profiler, and one per operator, with it."""
    graph, feeds = str(bundle.graph(part)), feeds_of(bundle, part, size)
    plain = open_engine(graph, threads)
    times = interleaved({"part": lambda: plain.run(None, feeds), "peak": product(threads)}, steps, warmup=2)
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(graph, threads, Path(folder) / "profile")
        for _ in range(steps + 1):
            engine.run(None, feeds)
        events = json.loads(Path(engine.end_profiling()).read_text())
    found, work = by_operator(events, steps), counted(events, steps + 1)
    peak = 2 * SIDE**3 / summary(times["peak"])["median"] / 1e6
    common = {"part": part, "size": size, "threads": threads, "unit": "ms", "peak_gflops": round(peak, 1)}
    whole = {"part, not profiled": (sum(count for count, _ in found.values()), times["part"]), **found}
    total = sum(summary(ms)["median"] for _, ms in found.values())
    rows = []
    for name, (nodes, ms) in whole.items():
        row = {**common, "operator": name, "nodes": nodes, **summary(ms)}
        gflop = (work[name] if name in found else work.total()) / 1e9
        row |= {"share": round(row["median"] / total, 4), "gflop": round(gflop, 2)}
        rows.append(row | {"gflops": round(1e3 * gflop / row["median"], 1)} if gflop else row)
    return rows


def table(rows: list[dict[str, Any]], least: float = 0.005) -> str:
    """The rows of one part as Markdown, without operators of a smaller share than `least`."""
    head = rows[0]
    lines = [f"### {head['part']}, {head['size']} px; a product runs at {head['peak_gflops']:.0f} GFLOP/s", ""]
    lines += ["| operator | nodes | ms | share | GFLOP | GFLOP/s |", "|---|" + "---:|" * 5]
    for row in (row for row in rows if row["share"] >= least):
        work = (f"{row['gflop']:.0f}", f"{row['gflops']:.0f}") if "gflops" in row else ("", "")
        cells = [row["operator"], str(row["nodes"]), f"{row['median']:.0f}", f"{row['share']:.1%}", *work]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--parts", default="unet,vae_decoder")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    args = parser.parse_args()
    raise_priority()
    bundle = read_bundle(args.bundle)
    for part in args.parts.split(","):
        rows = profile(bundle, part, args.size, args.steps, args.threads)
        print(table(rows))
        if not args.dry_run:
            record("profile_pictures", [{"model": args.bundle.parent.name, **row} for row in rows])


if __name__ == "__main__":
    main()
