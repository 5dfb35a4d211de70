"""The folders that optimum made, copies of them to spoil, and bundles of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgekit.bundle.store import Bundle, read_bundle
from edgekit.export import build
from edgekit.export.build import ExportRequest

FOLDERS = Path(__file__).resolve().parents[2] / "fixtures" / "optimum"
PIPELINES = {"lcm": "lcm", "sd-turbo": "turbo", "sdxl-turbo": "turbo"}  # folder -> family
DECODERS = ("llama", "qwen2")


def quiet(_what: str, _share: float) -> None:
    """Progress nobody looks at."""


def copied(name: str, target: Path) -> Path:
    """A folder of one's own."""
    return shutil.copytree(FOLDERS / name, target / name)


def golden(name: str) -> dict[str, np.ndarray]:
    """What the original answered in torch."""
    with np.load(FOLDERS / f"{name}.npz") as saved:
        return dict(saved)


def adopt(source: Path, target: Path, **options: Any) -> Bundle:
    """Export a folder as the command does, and read the bundle."""
    build.export(ExportRequest(source, target, **options), quiet)
    return read_bundle(target)


def edit(graph: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Change a graph file in place."""
    model = onnx.load(graph)
    change(model)
    onnx.save(model, graph)


def configure(file: Path, **values: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    config = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def declared(model: onnx.ModelProto, name: str) -> onnx.TensorShapeProto:
    """The shape of a graph input or output."""
    value = next(v for v in (*model.graph.input, *model.graph.output) if v.name == name)
    return value.type.tensor_type.shape


def fix(name: str, *sizes: int | None) -> Callable[[onnx.ModelProto], None]:
    """An edit that gives axes of an input or output fixed sizes, where one is given."""

    def change(model: onnx.ModelProto) -> None:
        for dim, size in zip(declared(model, name).dim, sizes, strict=True):
            if size is not None:
                dim.dim_value = size

    return change


def rename(old: str, new: str) -> Callable[[onnx.ModelProto], None]:
    """An edit that gives an input another name, wherever it is read."""

    def change(model: onnx.ModelProto) -> None:
        for value in model.graph.input:
            value.name = new if value.name == old else value.name
        for node in model.graph.node:
            for place, name in enumerate(node.input):
                node.input[place] = new if name == old else name

    return change
