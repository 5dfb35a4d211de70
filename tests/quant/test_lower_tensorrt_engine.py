"""TensorRT-RTX builds what is lowered for it, on a machine without a GPU. Opt-in: it needs the tensorrt_rtx package."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from edgekit.quant.graph import find_units, normalised
from edgekit.quant.targets import get_target
from tests.quant.engine_graphs import CHANNELS, network, open_target, picture, python_with, ranges_of, written
from tests.quant.lowering import graph, value

RTX = get_target("trt-rtx")

# Attention has no fused kernel for every type and size, so it may fall apart into MatMul and Softmax.
BUILD = """
import sys
import tensorrt_rtx as trt

log = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(log)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, log)
if not parser.parse_from_file(sys.argv[1]):
    sys.exit("not parsed: " + "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
for i in range(network.num_layers):
    layer = network.get_layer(i)
    if "ATTENTION" in str(layer.type):
        layer.__class__ = trt.IAttentionBoundaryLayer
        layer.attention.decomposable = True
config = builder.create_builder_config()
if sys.argv[3] != "-":
    profile = builder.create_optimization_profile()
    shape = tuple(map(int, sys.argv[3].split(",")))
    profile.set_shape("x", shape, shape, shape)
    config.add_optimization_profile(profile)
config.num_compute_capabilities = 1
config.set_compute_capability(getattr(trt.ComputeCapability, sys.argv[2]), 0)
engine = builder.build_serialized_network(network, config)
if engine is None:
    sys.exit("not built")
print(engine.nbytes)
"""


def built(graph_file: Path, capability: str, shape: str = "-") -> subprocess.CompletedProcess[str]:
    """Build in a process of its own: an engine's crash is an answer too."""
    interpreter = python_with("tensorrt_rtx", "EDGEKIT_TENSORRT_RTX_PYTHON")
    command = [interpreter, "-c", BUILD, str(graph_file), capability, shape]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.parametrize(
    ("preferred", "capability"),
    [
        (["fp32"], "SM86"),
        (["fp16"], "SM86"),
        (["bf16"], "SM86"),
        (["w8a8"], "SM86"),
        (["w8a8", "fp16"], "SM86"),
        (["w4a16-64"], "SM86"),
        (["fp8", "w8a8", "fp16"], "SM89"),
        (["nvfp4", "w8a8", "bf16"], "SM120"),
    ],
)
def test_an_engine_is_built(preferred: list[str], capability: str, tmp_path: Path):
    """Every choice, alone and mixed with others, becomes an engine for the processors that have it."""
    python_with("tensorrt_rtx", "EDGEKIT_TENSORRT_RTX_PYTHON")
    model = network()
    units = find_units(normalised(model))
    choices = {}
    for unit in units:
        choices[unit.id] = next((name for name in preferred if name in RTX.allowed(unit)), "fp32")
    path = written(tmp_path, model, choices, ranges_of(tmp_path, normalised(model), picture()), RTX)
    answer = built(path, capability, "2,8,8,8")
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize("narrow", [["to_q"], ["to_k"], ["to_k", "to_v"], ["to_q", "to_k", "to_v"]])
def test_an_engine_is_built_when_some_projections_are_narrow(narrow: list[str], tmp_path: Path):
    """Casts at some of an Attention's inputs make TensorRT-RTX 1.7 fail or crash; as it is lowered there are none."""
    python_with("tensorrt_rtx", "EDGEKIT_TENSORRT_RTX_PYTHON")
    path = written(tmp_path, network(), dict.fromkeys(narrow, "fp16"), target=RTX)
    answer = built(path, "SM86", "2,8,8,8")
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize(("choice", "capability"), [("fp8", "SM86"), ("nvfp4", "SM89")])
def test_a_processor_without_the_type_is_refused(choice: str, capability: str, tmp_path: Path):
    """FP8 needs 8.9 and FP4 needs 10.0; the builder says so and makes no engine."""
    python_with("tensorrt_rtx", "EDGEKIT_TENSORRT_RTX_PYTHON")
    model = network()
    path = written(tmp_path, model, choice, ranges_of(tmp_path, normalised(model), picture()), RTX)
    answer = built(path, capability, "2,8,8,8")
    assert answer.returncode != 0
    assert "HW-specific datatypes" in answer.stdout + answer.stderr


@pytest.mark.parametrize(
    ("op", "choice", "capability", "share"),
    [
        ("MatMul", "fp16", "SM89", 0.52),
        ("MatMul", "w8a8", "SM89", 0.28),
        ("MatMul", "fp8", "SM89", 0.28),
        ("MatMul", "w4a16-64", "SM89", 0.16),
        ("MatMul", "nvfp4", "SM120", 0.18),
        ("Conv", "w8a8", "SM89", 0.32),
    ],
)
def test_an_engine_holds_the_narrow_weights(op: str, choice: str, capability: str, share: float, tmp_path: Path):
    """The builder keeps codes as codes: the engine is as much smaller as the choice says."""
    python_with("tensorrt_rtx", "EDGEKIT_TENSORRT_RTX_PYTHON")
    sizes = {}
    for name in ("fp32", choice):
        path = written(tmp_path, _large(op), name, {"x": (-4.0, 4.0)}, open_target("trt-rtx"))
        answer = built(path, capability)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        sizes[name] = int(answer.stdout.split()[-1])
    assert sizes[choice] < share * sizes["fp32"]


def _large(op: str) -> ir.Model:
    """One product of fixed shape whose weights outweigh an engine's code."""
    random = np.random.default_rng(1)
    wide = CHANNELS * (8 if op == "Conv" else 32)
    shape, kernel = ([1, wide, 16, 16], [wide, wide, 3, 3]) if op == "Conv" else ([1, 64, wide], [wide, wide])
    attributes = {"pads": [1] * 4} if op == "Conv" else {}
    node = helper.make_node(op, ["x", "w"], ["y"], name="product", **attributes)
    weight = (random.standard_normal(kernel) * 0.02).astype(np.float32)
    made = graph([node], {"w": weight}, [value("x", shape)], [value("y", shape)], opset=23)
    made.ir_version = 11
    return made
