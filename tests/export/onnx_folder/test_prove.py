"""The proof of adopted parts can fail: graphs that mix rows, give no numbers, other shapes, or run at few sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from edgekit.bundle.manifest import TensorSpec
from edgekit.errors import ParityFailed, SessionFailed
from edgekit.export.onnx_folder.probe import Probe, apart, finest_multiple, prove, resolved
from tests.bundle.tiny import model

X = TensorSpec("x", "float32", ("batch", 4, "side"))
Y = TensorSpec("y", "float32", ("batch", 4, "side"))
PROBE = Probe("part", (X,), (Y,), {}, ({"side": 5}, {"side": 2}))


def graph(
    folder: Path, *nodes: onnx.NodeProto, shape=("batch", 4, "side"), out=("batch", 4, "side"), **weights
) -> Path:
    """A graph of `x` to `y` as a file."""
    made = model(list(nodes), [("x", "float32", shape)], [("y", "float32", out)], weights, 18)
    onnx.save(made, folder / "g.onnx")
    return folder / "g.onnx"


def node(kind: str, *inputs: str, to: str = "y", **attributes) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [to], **attributes)


def test_an_honest_graph_passes_with_its_figure(tmp_path: Path) -> None:
    """Two shapes, alone and in a batch: the gate says what was compared and on what."""
    gate = prove(PROBE, graph(tmp_path, node("Tanh", "x")))
    assert gate.value <= 1e-6
    assert gate.limit == 1e-4
    assert gate.what == "part: rows of a batch of two against each alone, of max|x|, first answers 1x4x5, 1x4x2"


def test_a_graph_that_mixes_a_batch_is_refused(tmp_path: Path) -> None:
    """A maximum over the batch changes a row by its neighbour, as one scale for a whole quantized tensor does."""
    mixing = (node("ReduceMax", "x", "first", to="m"), node("Add", "x", "m"))
    with pytest.raises(ParityFailed, match=r"part: a row of a batch differs .* dynamic batch, or with batch 1"):
        prove(PROBE, graph(tmp_path, *mixing, first=np.array([0])))


def test_a_fixed_batch_is_run_alone(tmp_path: Path) -> None:
    """There are no two rows to compare; the answer is checked all the same."""
    fixed = replace(PROBE, inputs=(replace_shape(X, 1),), outputs=(replace_shape(Y, 1),))
    gate = prove(fixed, graph(tmp_path, node("Tanh", "x"), shape=(1, 4, "side"), out=(1, 4, "side")))
    assert (gate.value, gate.what.split(",")[0]) == (0.0, "part: runs")


def replace_shape(spec: TensorSpec, batch: int) -> TensorSpec:
    return TensorSpec(spec.name, spec.dtype, (batch, *spec.shape[1:]))


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ((node("Log", "x"),), "not finite"),
        ((node("Mul", "x", "zero"),), "same number everywhere"),
    ],
    ids=["nan", "constant"],
)
def test_answers_without_content_are_refused(tmp_path: Path, nodes, words: str) -> None:
    """What is no number, or one and the same, proves nothing."""
    with pytest.raises(ParityFailed, match=f"part: y is .*{words}.*weights whole"):
        prove(PROBE, graph(tmp_path, *nodes, zero=np.zeros(1, "float32")))


def test_another_shape_than_the_configs_is_refused(tmp_path: Path) -> None:
    """A dynamic axis hides a size until the graph runs: then both shapes are in the message."""
    doubled = graph(tmp_path, node("Concat", "x", "x", axis=2), out=("batch", 4, "other"))
    with pytest.raises(ParityFailed, match=r"y is \(1, 4, 10\) where the configs say \(1, 4, 5\)"):
        prove(PROBE, doubled)


def test_a_graph_the_engine_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    """An operator that ONNX Runtime has no kernel for."""
    unknown = graph(tmp_path, helper.make_node("Nothing", ["x"], ["y"], domain="com.microsoft"))
    made = onnx.load(unknown)
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(made, unknown)
    with pytest.raises(SessionFailed, match="Nothing"):
        prove(PROBE, unknown)


@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_the_finest_sizes_that_run_are_found(tmp_path: Path, multiple: int, capfd: pytest.CaptureFixture[str]) -> None:
    """A network that folds its sides by `multiple` runs on multiples of it; trying says nothing on the terminal."""
    fold = np.array([0, 4, -1, multiple])
    nodes = (
        node("Reshape", "x", "fold", to="folded"),
        node("Shape", "x", to="size"),
        node("Reshape", "folded", "size"),
    )
    assert finest_multiple(PROBE, graph(tmp_path, *nodes, fold=fold), ["side"], 4) == multiple
    assert capfd.readouterr() == ("", "")


def test_a_network_that_runs_at_no_size_is_an_error(tmp_path: Path) -> None:
    """Not even at the coarsest multiple: that is no matter of sizes."""
    fold = np.array([0, 4, -1, 7])
    with pytest.raises(SessionFailed):
        finest_multiple(PROBE, graph(tmp_path, node("Reshape", "x", "fold"), fold=fold), ["side"], 4)


def test_inputs_are_the_same_everywhere_and_differ_by_row(tmp_path: Path) -> None:
    """Filled within bounds, of the right type; a shared input has one row for all."""
    specs = (X, TensorSpec("ids", "int32", ("batch", 9)), TensorSpec("t", "float32", ("batch",)))
    probe = Probe("part", specs, (Y,), {"ids": (0, 5), "t": (0.0, 999.0)}, ({"side": 3},), shared=("t",))
    feeds = probe.feeds({"side": 3, "batch": 2})
    again = probe.feeds({"side": 3, "batch": 2})
    assert all(np.array_equal(feeds[name], again[name]) for name in feeds)
    assert {name: (value.dtype.name, value.shape) for name, value in feeds.items()} == {
        "x": ("float32", (2, 4, 3)),
        "ids": ("int32", (2, 9)),
        "t": ("float32", (2,)),
    }
    assert feeds["ids"].min() >= 0
    assert feeds["ids"].max() < 5
    assert feeds["t"][0] == feeds["t"][1]
    assert not np.array_equal(feeds["x"][0], feeds["x"][1])


def test_distances_are_shares_of_the_largest_number() -> None:
    """Also of float16, where a difference of two large numbers would overflow."""
    assert apart(np.array([1.0, 2.5]), np.array([1.0, 2.0])) == 0.25
    assert apart(np.array([-60000], "float16"), np.array([60000], "float16")) == 2.0
    assert resolved(X, {"batch": 2, "side": 3}) == (2, 4, 3)
