"""`benchmarks/peers/precision_engines.py`: a process that stays, what it answers, and what the tools make."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

WORKER = Path(__file__).resolve().parents[2] / "benchmarks" / "peers" / "precision_engines.py"
MARK = "answer: "
WIDTH = 32


@pytest.fixture
def graph(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """y = x W, and W."""
    weights = np.random.default_rng(0).normal(size=(WIDTH, WIDTH)).astype(np.float32)
    w = ir.Value(name="w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(weights.shape))
    w.const_value = ir.tensor(weights, name="w")
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4, WIDTH]))
    product = ir.node("MatMul", [x, w], name="product")
    y = product.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([4, WIDTH])
    made = ir.Graph([x], [y], nodes=[product], initializers=[w], opset_imports={"": 20}, name="made")
    path = tmp_path / "graph.onnx"
    ir.save(ir.Model(made, ir_version=10), path)
    return path, weights


@pytest.fixture
def feeds(tmp_path: Path) -> tuple[Path, list[np.ndarray]]:
    """Eleven calls: as names of numbers, 10 sorts before 2."""
    calls = [np.random.default_rng(seed).normal(size=(4, WIDTH)).astype(np.float32) for seed in range(11)]
    path = tmp_path / "feeds.npz"
    np.savez(path, **{f"{number}/x": call for number, call in enumerate(calls)})  # type: ignore[arg-type]
    return path, calls


def serve(graph: Path, feeds: Path, orders: str) -> subprocess.CompletedProcess[str]:
    """All orders to one process of plain ONNX Runtime."""
    command = [sys.executable, WORKER, "serve", "ort", graph, feeds, "--threads", "1"]
    return subprocess.run(command, input=orders, capture_output=True, text=True, check=False)


def test_one_process_answers_every_order_and_its_outputs_are_those_of_the_calls_in_their_order(
    tmp_path: Path, graph: tuple[Path, np.ndarray], feeds: tuple[Path, list[np.ndarray]]
) -> None:
    """The time and memory of a step, and then what the graph says of every call."""
    done = serve(graph[0], feeds[0], f"first\nstep\nstep\noutputs {tmp_path / 'out.npz'}\n")
    answers = [json.loads(line.removeprefix(MARK)) for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert len(answers) == 4, done.stderr
    assert "onnxruntime" in answers[0]["version"]
    assert all(0 < answer["seconds"] < 60 for answer in answers[1:3])
    assert 0 < answers[1]["anonymous_mb"] <= answers[1]["resident_mb"] <= answers[1]["peak_mb"]
    with np.load(tmp_path / "out.npz") as outputs:
        for number, call in enumerate(feeds[1]):
            np.testing.assert_allclose(outputs[str(number)], call @ graph[1], rtol=1e-4, atol=1e-4)


def test_a_step_before_the_first_run_ends_the_process(
    graph: tuple[Path, np.ndarray], feeds: tuple[Path, list[np.ndarray]]
) -> None:
    """A coordinator that forgot to open the graph must not time an opening."""
    done = serve(graph[0], feeds[0], "step\n")
    assert done.returncode != 0
    assert "before 'first'" in done.stderr


@pytest.mark.parametrize("maker", ["dynamic", "static"])
def test_what_the_tool_makes_is_quantized_and_near(
    tmp_path: Path, graph: tuple[Path, np.ndarray], feeds: tuple[Path, list[np.ndarray]], maker: str
) -> None:
    """ONNX Runtime's two tools, by their defaults, of a graph and recorded calls."""
    command = [sys.executable, WORKER, "make", maker, graph[0], feeds[0], tmp_path / maker]
    subprocess.run(command, capture_output=True, check=True)
    made = tmp_path / maker / "model.onnx"
    kinds = {value.const_value.dtype for value in ir.load(made).graph.initializers.values() if value.const_value}
    assert ir.DataType.INT8 in kinds
    done = serve(made, feeds[0], f"first\noutputs {tmp_path / 'out.npz'}\n")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as outputs:
        wanted = feeds[1][3] @ graph[1]
        error = float(np.square(outputs["3"] - wanted).sum() / np.square(wanted).sum())
    assert 0 < error < 1e-2
