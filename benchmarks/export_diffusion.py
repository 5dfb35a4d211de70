"""Exporting an 860 M latent consistency UNet (Stable Diffusion 1.5's shape, random weights): time and peak memory.

    python benchmarks/export_diffusion.py [--stored fp16|fp32] [--attention ort|std] [--work FOLDER]

The targets are 4 GiB in any one process and two minutes. The pipeline is made on the fly and deleted, text encoder and
autoencoder included at a small size, so that the figure is the UNet's. Wall time depends on what else the machine does;
CPU seconds of all children stand beside it.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import harness  # noqa: E402

SD15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "time_cond_proj_dim": 256,
}
WATCH_SECONDS = 0.1


def make(folder: Path, stored: str) -> None:
    """Write the pipeline; run in a process of its own, so that its memory is not counted."""
    import torch
    from diffusers import UNet2DConditionModel

    from tests.export.diffusion import tiny_pipelines as tiny

    pipeline = tiny.lcm()
    pipeline.save_pretrained(folder)
    torch.manual_seed(0)
    large = UNet2DConditionModel(**SD15)
    shutil.rmtree(folder / "unet")
    large.to(torch.float16 if stored == "fp16" else torch.float32).save_pretrained(folder / "unet")
    words = tiny.text_encoder(tiny.CLIPTextModel, pipeline.tokenizer, hidden=768, num_attention_heads=12)
    words.save_pretrained(folder / "text_encoder")


def resident(pid: int) -> int:
    """Peak resident bytes of a process, 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


class Peak(threading.Thread):
    """The largest resident memory any child of this process has reached."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0

    def run(self) -> None:
        import os

        me = os.getpid()
        while True:
            for task in Path(f"/proc/{me}/task").iterdir():
                children = (task / "children").read_text().split()
                self.bytes = max([self.bytes, *(resident(int(child)) for child in children)])
            time.sleep(WATCH_SECONDS)


def measure(folder: Path, target: Path, attention: Any) -> dict[str, Any]:
    """Export once; seconds by stage, CPU seconds and peak memory of the children."""
    from edgekit.export.families.export import DiffusionOptions, export_diffusion, plan_diffusion
    from edgekit.export.sources import read_source

    source, options = read_source(folder), DiffusionOptions(attention=attention)
    plan = plan_diffusion(source, options)
    stages: list[tuple[float, str]] = []
    peak, before = Peak(), resource.getrusage(resource.RUSAGE_CHILDREN)
    peak.start()
    start = time.perf_counter()
    manifest = export_diffusion(
        source, target, options=options, progress=lambda text, _: stages.append((time.perf_counter() - start, text))
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    gate = next(gate for gate in manifest.precision.gates if gate.what.startswith("unet"))
    return {
        "what": "export",
        "parameters": manifest.parts["unet"].parameters,
        "attention": attention,
        "wall_s": round(wall, 1),
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_child_gib": round(peak.bytes / 2**30, 2),
        "planned_peak_gib": round(plan.peak_bytes / 2**30, 2),
        "unet_difference": gate.value,
        "stages_s": {text: round(at, 1) for at, text in stages if text.startswith("unet")},
        "n": 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stored", choices=("fp16", "fp32"), default="fp16")
    parser.add_argument("--attention", choices=("ort", "std"), default="ort")
    parser.add_argument("--work", type=Path, help="where 6 to 9 GB of files go for the time being")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.make is not None:
        make(asked.make, asked.stored)
        return
    with tempfile.TemporaryDirectory(dir=asked.work) as work:
        folder = Path(work, "pipeline")
        subprocess.run([sys.executable, __file__, "--stored", asked.stored, "--make", str(folder)], check=True)
        row = measure(folder, Path(work, "bundle"), asked.attention)
    harness.record("export_diffusion", [{**row, "stored": asked.stored}])


if __name__ == "__main__":
    main()
