"""Peak memory of one picture in one step, fp32: at 512 and 1024 pixels, limited, in tiles; and of decoders by size.

    python benchmarks/memory.py --work DIR [--models lcm,tiny] [--sizes 512,1024] [--table FILE]

DIR is the folder benchmarks/pictures.py made: bundles and plain graphs of the same networks. Every figure is the peak
resident memory (VmHWM) of a process that did nothing else; weights that ONNX Runtime maps from a file count, although
the system could drop them. Nothing is timed.

A limited row asks for LIMITS, the least that the UNet can do with at this size; the decoder has to live with it. Plain
ONNX Runtime stands beside, its attention in primitives, under an address limit of --most GB, past which it is said to
have failed. Decoders are run alone on a bundle's own graph; what each takes above its weights, over pixels, is
`BYTES_PER_PIXEL` of edgekit/runtime/diffusion/networks.py at its largest.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness import record

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from measure import memory

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "photo of an old house"
SIDES = (256, 512, 768, 1024)  # pixels, of decoders alone
LIMITS = {("lcm", 512): 4.2, ("lcm", 1024): 5.4, ("tiny", 512): 1.9, ("tiny", 1024): 3.0}  # GB: what the UNet takes
Setting = dict[str, Any]


def draw(bundle: str, size: int, setting: Setting) -> dict[str, Any]:
    """One picture by the public interface, and the memory it took."""
    import edgekit

    limit = setting.get("max_memory")
    model = edgekit.load(bundle, threads=2, max_memory=None if limit is None else int(limit * 1e9))
    result = model.generate(PROMPT, steps=1, width=size, height=size, tile=setting.get("tile"))
    return {"peak_mb": round(memory()["rss_mb"]), "contrast": round(float(np.asarray(result.images[0]).std()), 1)}


def draw_plain(graphs: str, size: int, setting: Setting) -> dict[str, Any]:
    """The same by plain graphs in ONNX Runtime; one that runs out of memory says so."""
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, RuntimeException
    from picture_engines import Clock, open_ort

    resource.setrlimit(resource.RLIMIT_AS, (int(setting["most"] * 1e9),) * 2)
    host = dict(np.load(Path(graphs, "host.npz")))
    host["latents"] = np.random.default_rng(0).standard_normal((1, 4, size // 8, size // 8), dtype=np.float32)
    try:
        _, picture = open_ort(graphs, host, 2)(Clock())
    except (RuntimeException, Fail) as why:
        return {"peak_mb": None, "failed": f"{type(why).__name__}: {str(why)[:200]}"}
    return {"peak_mb": round(memory()["rss_mb"]), "contrast": round(float(picture.std()), 1)}


def decode(graph: str, side: int, _: Setting) -> dict[str, Any]:
    """One decoder alone on one latent: its peak, and what of it came with the run, by the pixel."""
    from edgekit.runtime.backends import open_session

    session = open_session(Path(graph), threads=2, planned=False)
    before, name = memory()["rss_mb"], session.inputs[0].name
    shape = (1, int(session.inputs[0].shape[1]), side // 8, side // 8)
    session.run({name: np.random.default_rng(0).standard_normal(shape, dtype=np.float32)})
    peak = memory()["rss_mb"]
    return {"peak_mb": round(peak), "bytes_per_pixel": round(1e6 * (peak - before) / side**2)}


TASKS = {"draw": draw, "plain": draw_plain, "decode": decode}


def alone(task: str, path: Path, size: int, **setting: Any) -> dict[str, Any]:
    """A task in a process of its own. Raises SystemExit."""
    told = json.dumps({"task": task, "path": str(path), "size": size, "setting": setting})
    done = subprocess.run([sys.executable, __file__, "--alone", told], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{task} of {path} at {size} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    print(f"{path} {task} {size} {setting}: {found}", file=sys.stderr)
    return found


def pictures(work: Path, model: str, sizes: Sequence[int], most: float) -> list[dict[str, Any]]:
    """Rows of a model's whole picture."""
    home, rows = work / model, []
    for size in sizes:
        settings: dict[str, Setting] = {
            "no limit": {},
            "decoder in tiles of 256": {"tile": 256},
            "max_memory": {"max_memory": LIMITS[model, size]},
        }
        for name, setting in settings.items():
            found = alone("draw", home / "bundle", size, **setting)
            rows.append({"engine": "edgekit", "setting": name, "size": size, **found})
        plain = alone("plain", home / "plain", size, most=most)
        rows.append({"engine": "ONNX Runtime, plain graphs", "setting": "", "size": size, **plain})
    return [{"what": "picture", "model": model, **row, "n": 1} for row in rows]


def decoders(work: Path, model: str) -> list[dict[str, Any]]:
    """Rows of a model's decoder, by side."""
    graph = work / model / "bundle" / "graphs" / "vae_decoder.onnx"
    found = {side: alone("decode", graph, side) for side in SIDES}
    return [{"what": "decoder", "model": model, "size": side, **row, "n": 1} for side, row in found.items()]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Pictures as Markdown, a row for engine and setting, a column for each size."""
    drawn = [row for row in rows if row["what"] == "picture"]
    sizes = sorted({row["size"] for row in drawn})
    lines = ["| model | engine | " + " | ".join(f"{size} px, peak MB" for size in sizes) + " |"]
    lines.append("|---|---" + "|---:" * len(sizes) + "|")
    for key in dict.fromkeys((row["model"], row["engine"], row["setting"]) for row in drawn):
        found = {row["size"]: row for row in drawn if (row["model"], row["engine"], row["setting"]) == key}
        cells = [str(found[size]["peak_mb"] or "out of memory") for size in sizes]
        lines.append(f"| {key[0]} | {', '.join(filter(None, key[1:]))} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--models", default="lcm,tiny")
    parser.add_argument("--sizes", default="512,1024")
    parser.add_argument("--most", type=float, default=16.0, help="GB of addresses for plain graphs")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone is not None:
        told = json.loads(options.alone)
        print(json.dumps(TASKS[told["task"]](told["path"], told["size"], told["setting"])))
        return
    if options.work is None:
        parser.error("--work is missing")
    rows: list[dict[str, Any]] = []
    for model in options.models.split(","):
        rows += decoders(options.work, model)
        rows += pictures(options.work, model, [int(size) for size in options.sizes.split(",")], options.most)
    record("memory", rows)
    print(table(rows))
    if options.table:
        options.table.write_text(table(rows))


if __name__ == "__main__":
    main()
