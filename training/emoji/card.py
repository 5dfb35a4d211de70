"""The model card and the training record, filled with measured numbers."""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

import torch

from training.emoji.data import FAMILIES, Glyph
from training.emoji.evaluate import DEMO
from training.emoji.teacher import SEED

STAGES = ("teacher", "student", "upscaler")
PYTHON_PACKAGES = ("torch", "diffusers", "transformers", "tokenizers", "safetensors", "numpy", "pillow")
DEBIAN_PACKAGES = ("fonts-noto-color-emoji", "unicode-cldr-core")
DEFAULT_STEPS = 4
PROMPTS = DEMO[:10]


def stage_record(work: Path) -> dict[str, Any]:
    """Seed, steps, samples and seconds of every stage that has run."""
    record = {}
    for stage in STAGES:
        if (work / f"{stage}.pt").exists():
            state = torch.load(work / f"{stage}.pt")
            cpu, wall = state["clock"]
            counts = {"seed": SEED, "steps": state["step"], "samples": state["samples"]}
            record[stage] = {**counts, "cpu_seconds": round(cpu), "wall_seconds": round(wall)}
    return record


def debian_version(package: str) -> str:
    """The installed version, or "unknown" elsewhere than on Debian."""
    try:
        command = ["dpkg-query", "-W", "-f=${Version}", package]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def training_record(work: Path, glyphs: list[Glyph], parameters: dict[str, int]) -> dict[str, Any]:
    """Everything `training_record.json` says; `metrics` is missing until the folder has been measured."""
    held = [glyph.name for glyph in glyphs if glyph.held_out]
    record: dict[str, Any] = {
        "stages": stage_record(work),
        "data": {"renders": len(glyphs), "held_out": held, **{name: debian_version(name) for name in DEBIAN_PACKAGES}},
        "parameters": parameters,
        "packages": {name: version(name) for name in PYTHON_PACKAGES},
    }
    if (work / "notes.txt").exists():  # whatever the run's history adds
        record["notes"] = (work / "notes.txt").read_text().strip()
    if (work / "metrics.json").exists():
        record["metrics"] = json.loads((work / "metrics.json").read_text())
    return record


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def score(cell: dict[str, float]) -> str:
    return f"{cell['recall']:.3f} / {cell['mse']:.4f}"


def steps_table(steps: dict[str, Any]) -> str:
    """R@1 / MSE by grid, step count and set of prompts."""
    names = {"even": "1, 1 - 1/n, ..., 1/n", "stock": "the scheduler's own"}
    sets = ("trained", "favourite", "unseen")
    rows = [
        [names[grid], n, *(score(row[name]) for name in sets)]
        for grid, by_n in steps.items()
        for n, row in by_n.items()
    ]
    return table(["sigmas", "steps n", *(f"{name}, R@1 / MSE" for name in sets)], rows)


def sweep_table(sweep: dict[str, Any]) -> str:
    """R@1 / MSE by guidance scale and step count."""
    counts = list(next(iter(sweep.values())))
    rows = [[scale, *(score(row[n]) for n in counts)] for scale, row in sweep.items()]
    return table(["guidance", *(f"{n} step{'s' * (n != '1')}" for n in counts)], rows)


def stages_table(stages: dict[str, Any]) -> str:
    """Seconds and samples."""
    rows = [
        [name, f"{s['cpu_seconds']:,}", f"{s['wall_seconds']:,}", f"{s['steps']:,}", f"{s['samples']:,}"]
        for name, s in stages.items()
    ]
    return table(["stage", "CPU seconds", "wall seconds", "steps", "samples seen"], rows)


def card(template: Path, record: dict[str, Any], glyphs: list[Glyph], vocabulary: int, megabytes: float) -> str:
    """The model card; the record must hold metrics."""
    metrics, data = record["metrics"], record["data"]
    sizes = {f"{name}_parameters": f"{count / 1e6:.2f}" for name, count in record["parameters"].items()}
    held = len(data["held_out"])
    values = {
        "size": f"{megabytes:.1f}",
        "vocabulary": f"{vocabulary:,}",
        **sizes,
        "default_steps": DEFAULT_STEPS,
        "guidance": metrics["guidance"],
        "prompts": ", ".join(f'"{prompt}"' for prompt in PROMPTS),
        "renders": f"{len(glyphs):,}",
        "trained_renders": f"{len(glyphs) - held:,}",
        "chance": f"{100 / len(glyphs):.2f}",
        "n_trained": metrics["counts"]["trained"],
        "n_favourite": metrics["counts"]["favourite"],
        "held_out": held,
        "tones": sum(bool(glyph.family) for glyph in glyphs),
        "families": FAMILIES,
        "steps_table": steps_table(metrics["steps"]),
        "sweep_table": sweep_table(metrics["sweep"]),
        "stages_table": stages_table(record["stages"]),
        "seed": SEED,
        "anchor": metrics["anchor"],
        "notes": record.get("notes", ""),
        "sr_images": metrics["upscaler"]["images"],
        "sr_psnr": f"{metrics['upscaler']['psnr']:.2f}",
        "sr_bicubic": f"{metrics['upscaler']['psnr_bicubic']:.2f}",
        "e2e_images": metrics["end_to_end"]["images"],
        "e2e_psnr": f"{metrics['end_to_end']['psnr']:.2f}",
        "e2e_bicubic": f"{metrics['end_to_end']['psnr_bicubic']:.2f}",
        "font_version": data["fonts-noto-color-emoji"],
        "cldr_version": data["unicode-cldr-core"],
    }
    return Template(template.read_text(encoding="utf-8")).substitute(values)
