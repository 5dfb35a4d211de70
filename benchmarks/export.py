"""Time and peak memory of exporting a language model, in a fresh process, against the size of its weights.

Wall seconds are those of the machine as it was; process seconds do not count what else ran on it.

    python benchmarks/export.py                 100 M parameters, every precision
    python benchmarks/export.py --model 1b      1 B parameters (4 GB of disk for the checkpoint, as much for the export)

The checkpoint is a random float32 Llama made on the fly, without torch, in a temporary folder that is removed.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from edgekit.export.language.export import export_language, plan_language

MODELS = {
    "100m": {"vocab_size": 32000, "hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 12},
    "1b": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22},
}
SHARED = {
    "model_type": "llama",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
HEAD_DIM = 64


def make_checkpoint(folder: Path, sizes: dict[str, int]) -> int:
    """config.json, one safetensors file of random float32, and a tokenizer; the number of weight bytes."""
    config = SHARED | sizes | {"num_attention_heads": sizes["hidden_size"] // HEAD_DIM}
    (folder / "config.json").write_text(json.dumps(config))
    Tokenizer(models.WordLevel({"x": 0}, unk_token="x")).save(str(folder / "tokenizer.json"))
    header, end = {}, 0
    for name, shape in tensor_shapes(sizes).items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    random = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as out:
        out.write(len(raw).to_bytes(8, "little") + raw)
        for entry in header.values():
            rows = entry["shape"]
            for start in range(0, rows[0], 1024):
                chunk = (min(1024, rows[0] - start), *rows[1:])
                (random.standard_normal(chunk, np.float32) * 0.02).tofile(out)
    return end


def tensor_shapes(sizes: dict[str, int]) -> dict[str, list[int]]:
    """Names and shapes of a Llama without grouped heads."""
    hidden, ffn, vocab = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    shapes = {"model.embed_tokens.weight": [vocab, hidden], "lm_head.weight": [vocab, hidden]}
    shapes["model.norm.weight"] = [hidden]
    for layer in range(sizes["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": [hidden, hidden] for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": [ffn, hidden] for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = [hidden, ffn]
        shapes |= {f"{prefix}{name}_layernorm.weight": [hidden] for name in ("input", "post_attention")}
    return shapes


def child(source: Path, staging: Path, precision: str, dialect: Any) -> None:
    """One export in this process; its time and peak resident memory on stdout."""
    start, busy = time.perf_counter(), time.process_time()
    export_language(source, staging, precision=precision, dialect=dialect)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak}))


def measure(source: Path, precision: str, dialect: Any, weights: int, rounds: int) -> dict[str, Any]:
    """Export `rounds` times, each in a fresh process and a fresh folder."""
    runs: list[dict[str, float]] = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(dir=source.parent) as staging:
            command = [sys.executable, __file__, "--child", str(source), staging, precision, dialect]
            runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            disk = sum(file.stat().st_size for file in Path(staging).rglob("*") if file.is_file())
    peak = max(run["peak_bytes"] for run in runs)
    return {
        "precision": precision,
        "dialect": dialect,
        "weights_mb": round(weights / 1e6, 1),
        "seconds": harness.summary([run["seconds"] for run in runs]),
        "cpu_seconds": harness.summary([run["cpu_seconds"] for run in runs]),
        "peak_rss_mb": round(peak / 1e6, 1),
        "peak_over_weights": round(peak / weights, 3),
        "planned_peak_mb": round(plan_language(source, precision, dialect).peak_bytes / 1e6, 1),
        "disk_mb": round(disk / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="100m")
    parser.add_argument("--precisions", default="fp32,fp16,int8,int4")
    parser.add_argument("--dialects", default="ort,std")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        source, staging, precision, dialect = options.child
        child(Path(source), Path(staging), precision, dialect)
        return
    rows = []
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "model"
        source.mkdir()
        weights = make_checkpoint(source, MODELS[options.model])
        for precision in options.precisions.split(","):
            for dialect in options.dialects.split(","):
                row = measure(source, precision, dialect, weights, options.rounds)
                rows.append({"model": options.model, "parameters": weights // 4, **row})
    harness.record("export", rows)


if __name__ == "__main__":
    main()
