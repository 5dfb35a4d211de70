"""Lowering for OpenVINO: ONNX Runtime's spelling, and that OpenVINO runs it on integers. Its tests are opt-in."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.errors import BadRequest
from edgekit.quant.graph import normalised
from edgekit.quant.lower import lower
from edgekit.quant.targets import get_target
from edgekit.runtime.backends import open_session
from tests.quant.engine_graphs import python_with, written
from tests.quant.lowering import Array, attention_graph, find_units, wide_ranges

VINO = replace(get_target("openvino"), code_bits=7)  # exact with and without VNNI

# Runs a graph on one thread and tells its output's file which layer ran in which precision.
RUN = """
import json, sys
import numpy as np
import openvino

options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
compiled = openvino.Core().compile_model(sys.argv[1], "CPU", options)
np.save(sys.argv[3], next(iter(compiled({"x": np.load(sys.argv[2])}).values())))
text = lambda value: value if isinstance(value, str) else value.astype(str)
ran = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
print(json.dumps([[text(info["layerType"]), text(info["runtimePrecision"])] for info in ran]))
"""


def openvino(folder: Path, graph: Path, x: Array) -> tuple[Array, list[tuple[str, str]]]:
    """What OpenVINO gives, and the precision of every layer it ran."""
    interpreter = python_with("openvino", "EDGEKIT_OPENVINO_PYTHON")
    np.save(folder / "x.npy", x)
    command = [interpreter, "-c", RUN, str(graph), str(folder / "x.npy"), str(folder / "y.npy")]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    return np.load(folder / "y.npy"), [(layer, precision) for layer, precision in json.loads(told.splitlines()[-1])]


def feeds() -> Array:
    return np.random.default_rng(8).standard_normal((2, 4, 8, 8)).astype(np.float32)


def int8_choices(model: ir.Model) -> dict[str, str]:
    units = find_units(normalised(model))
    return {unit.id: "w8a8" for unit in units if "w8a8" in VINO.allowed(unit)}


@pytest.mark.parametrize("choice", ["w8a8", "fp16", "fp32"])
def test_the_spelling_is_onnx_runtimes(choice: str, tmp_path: Path):
    """Byte for byte the same graph as for the CPU target of the same code width."""
    graphs = []
    for target in (VINO, replace(get_target("cpu:any"), allowed=VINO.allowed)):
        model = normalised(attention_graph())
        units = find_units(model)
        choices = {unit.id: choice for unit in units if choice in target.allowed(unit)}
        lower(model, units, choices, wide_ranges(units), target)
        graphs.append(ir.to_proto(model).SerializeToString())
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize("choice", ["w4a16-32", "w8a8-row", "fp8", "bf16"])
def test_what_it_does_not_run_is_refused(choice: str, tmp_path: Path):
    """The message names the unit and what it may be."""
    with pytest.raises(BadRequest, match=f"cannot be {choice} on openvino; it may be fp32, fp16, w8a8"):
        written(tmp_path, attention_graph(), {"to_q": choice}, target=VINO)


def test_openvino_runs_integers_and_gives_onnx_runtimes_numbers(tmp_path: Path):
    """Every planned Conv and MatMul runs on u8, and the answer is the one ONNX Runtime has for the same file."""
    python_with("openvino", "EDGEKIT_OPENVINO_PYTHON")
    model, x = attention_graph(), feeds()
    choices = int8_choices(model)
    units = find_units(normalised(model))
    path = written(tmp_path, model, choices, wide_ranges(units), VINO)
    got, ran = openvino(tmp_path, path, x)
    integers = [layer for layer, precision in ran if precision in ("u8", "i8")]
    wanted = [unit.op for unit in units if unit.id in choices]
    assert integers.count("Convolution") == wanted.count("Conv") > 0
    assert integers.count("FullyConnected") == wanted.count("MatMul") > 0
    same = next(iter(open_session(path, threads=1).run({"x": x}).values()))
    assert np.square(got - same).sum() < 1e-6 * np.square(same).sum()


def test_openvino_reads_float16_storage(tmp_path: Path):
    """Weights that are float16 behind a Cast mean what they mean elsewhere."""
    python_with("openvino", "EDGEKIT_OPENVINO_PYTHON")
    x = feeds()
    path = written(tmp_path, attention_graph(), "fp16", target=VINO)
    got, ran = openvino(tmp_path, path, x)
    same = next(iter(open_session(path, threads=1).run({"x": x}).values()))
    assert np.abs(got - same).max() < 1e-4 * np.abs(same).max()
    assert "u8" not in {precision for layer, precision in ran if layer in ("Convolution", "FullyConnected")}
