"""A small picture network of standard operators, and what lowering for an engine makes of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper

from edgekit.quant.choices import CHOICES
from edgekit.quant.graph import Unit, find_units, normalised
from edgekit.quant.lower import lower
from edgekit.quant.targets import Target, get_target
from tests.quant.lowering import Array, graph, value

CHANNELS = 64
SIDE = 8


def open_target(device: str, **changes: Any) -> Target:
    """A device's row that allows every choice: one layer alone is always a graph's first and last."""
    return replace(get_target(device), allowed=lambda unit: tuple(CHOICES), **changes)


def network(opset: int = 23, dtype: Any = np.float32, seed: int = 0) -> ir.Model:
    """A residual block with a shortcut, a transformer block with attention, and a convolution at either end."""
    random = np.random.default_rng(seed)
    wide, node = CHANNELS, helper.make_node

    def weight(*shape: int) -> Array:
        fan = shape[0] if len(shape) == 2 else int(np.prod(shape[1:]))
        return (random.standard_normal(shape) / np.sqrt(fan)).astype(dtype)

    weights = {
        "w.in": weight(wide, 8, 3, 3),
        "w.1": weight(wide, wide, 3, 3),
        "w.2": weight(wide, wide, 3, 3),
        "w.out": weight(8, wide, 3, 3),
        **{f"w.{name}": weight(wide, wide) for name in "qkvo"},
        "w.up": weight(wide, 2 * wide),
        "w.down": weight(2 * wide, wide),
        **{f"b.{name}": weight(wide, 1)[:, 0] for name in ("in", "1", "2", "o", "down")},
        "rows": np.array([0, wide, -1]),
        "picture": np.array([0, wide, SIDE, SIDE]),
    }
    pads = {"pads": [1] * 4}
    nodes = [
        node("Conv", ["x", "w.in", "b.in"], ["c0"], name="conv_in", **pads),
        node("Relu", ["c0"], ["r0"], name="relu0"),
        node("Conv", ["r0", "w.1", "b.1"], ["c1"], name="conv1", **pads),
        node("Relu", ["c1"], ["r1"], name="relu1"),
        node("Conv", ["r1", "w.2", "b.2"], ["c2"], name="conv2", **pads),
        node("Add", ["r0", "c2"], ["sum"], name="residual"),
        node("Reshape", ["sum", "rows"], ["flat"], name="flatten"),
        node("Transpose", ["flat"], ["t"], name="tokens", perm=[0, 2, 1]),
        *(node("MatMul", ["t", f"w.{name}"], [f"{name}v"], name=f"to_{name}") for name in "qkv"),
        node("Attention", ["qv", "kv", "vv"], ["mixed"], name="attend", q_num_heads=2, kv_num_heads=2),
        node("MatMul", ["mixed", "w.o"], ["ov"], name="to_out"),
        node("Add", ["ov", "b.o"], ["out"], name="out_bias"),
        node("Add", ["out", "t"], ["h"], name="skip"),
        node("MatMul", ["h", "w.up"], ["upped"], name="up"),
        node("Tanh", ["upped"], ["bent"], name="bend"),
        node("MatMul", ["bent", "w.down"], ["dv"], name="down"),
        node("Add", ["dv", "b.down"], ["downed"], name="down_bias"),
        node("Transpose", ["downed"], ["back"], name="back", perm=[0, 2, 1]),
        node("Reshape", ["back", "picture"], ["image"], name="image"),
        node("Conv", ["image", "w.out"], ["y"], name="conv_out", **pads),
    ]
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    ends = [[value(name, ["batch", 8, SIDE, SIDE], element)] for name in ("x", "y")]
    made = graph(nodes, weights, *ends, opset=opset)
    made.ir_version = 11
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(made)))


def picture(batch: int = 2, dtype: Any = np.float32) -> Array:
    """What the network reads."""
    return np.random.default_rng(7).standard_normal((batch, 8, SIDE, SIDE)).astype(dtype)


def ranges_of(folder: Path, model: ir.Model, x: Array) -> dict[str, tuple[float, float]]:
    """The ends of every float value that the graph makes of `x`."""
    copy = model.clone()
    ends = {str(output.name) for output in copy.graph.outputs}
    for made in list(copy.graph):
        copy.graph.outputs.extend(v for v in made.outputs if v.name not in ends and v.type is not None)
    ir.save(copy, folder / "all.onnx")
    session = session_of(folder / "all.onnx")
    found = {
        "x": x,
        **dict(zip([each.name for each in session.get_outputs()], session.run(None, {"x": x}), strict=True)),
    }
    return {name: (float(array.min()), float(array.max())) for name, array in found.items()}


def written(
    folder: Path,
    model: ir.Model,
    choices: str | Mapping[str, str],
    ranges: Mapping[str, tuple[float, float]] | None = None,
    target: Target | None = None,
    **options: Any,
) -> Path:
    """Lower a graph and write it; one choice for all units that may take it, or one each by id."""
    model, target = normalised(model), target or open_target("trt")
    units = find_units(model)
    lower(model, units, by_unit(units, choices, target), ranges or {}, target, **options)
    path = folder / "lowered.onnx"
    ir.save(model, path, external_data=f"{path.name}.data")
    return path


def by_unit(units: Sequence[Unit], choices: str | Mapping[str, str], target: Target) -> dict[str, str]:
    """Choices by unit id."""
    if isinstance(choices, str):
        return {unit.id: choices for unit in units if choices in target.allowed(unit)}
    return dict(choices)


def session_of(path: Path) -> ort.InferenceSession:
    """The graph as it is written: nothing is fused, and a signed Q/DQ stays signed."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options)


def run(path: Path, **feeds: Array) -> npt.NDArray[np.float64]:
    """What a written graph gives, node by node."""
    return np.asarray(session_of(path).run(None, feeds)[0]).astype(np.float64)


def python_with(package: str, variable: str) -> str:
    """An interpreter that has a package: this one, or the one that a variable of the environment names."""
    interpreters = (os.environ.get(variable), sys.executable)
    found = next((each for each in interpreters if each and _has(each, package)), None)
    if found is None:
        pytest.skip(f"no {package} here; install it, or let {variable} name an interpreter that has it")
    return found


@cache
def _has(interpreter: str, package: str) -> bool:
    looked = [interpreter, "-c", f"from importlib.util import find_spec; raise SystemExit(not find_spec('{package}'))"]
    return subprocess.run(looked, capture_output=True, check=False).returncode == 0
