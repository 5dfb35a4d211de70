"""Graphs that are written for a while: where they go, that they go again, and that weights are not copied."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.quant.graph import load_graph
from edgekit.quant.scratch import SMALL, scratch_graph
from edgekit.runtime.backends import open_session

WIDTH = 256  # a weight of four times SMALL bytes


def product() -> ir.Model:
    """x @ w, with a weight that is large."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, WIDTH]))
    weight = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    assert weight.nbytes > SMALL
    w = ir.Value(name="w", const_value=ir.tensor(weight, name="w"))
    node = ir.node("MatMul", [x, w])
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[w], opset_imports={"": 20})
    return ir.Model(graph, ir_version=10)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """The product with its weight in a file beside it."""
    path = tmp_path / "home" / "product.onnx"
    path.parent.mkdir()
    ir.save(product(), path, external_data="product.onnx.data")
    return path


def answer(path: Path) -> np.ndarray:
    return open_session(path, planned=False).run({"x": np.ones((1, WIDTH), np.float32)})["y"]


def test_weights_in_a_file_stay_there(stored: Path) -> None:
    """The written graph is small, lies beside the weights' file and reads it."""
    before = set(stored.parent.iterdir())
    with scratch_graph(load_graph(stored), "trying") as path:
        assert path.parent == stored.parent
        assert set(stored.parent.iterdir()) == before | {path}
        assert path.stat().st_size < SMALL
        np.testing.assert_array_equal(answer(path), answer(stored))
    assert set(stored.parent.iterdir()) == before


def test_weights_in_memory_are_written_with_it() -> None:
    """A graph of no folder goes to a temporary one, which goes when the block ends."""
    with scratch_graph(product(), "trying") as path:
        assert answer(path).shape == (1, WIDTH)
        folder = path.parent
    assert not folder.exists()


def test_a_new_large_weight_takes_the_others_along(stored: Path) -> None:
    """One file cannot hold weights that are in memory: all go to a temporary folder, and nothing is added at home."""
    model = load_graph(stored)
    tensor = ir.tensor(np.ones((WIDTH, WIDTH), np.float32), name="w")
    model.graph.initializers["w"].const_value = tensor
    before = set(stored.parent.iterdir())
    with scratch_graph(model, "trying") as path:
        assert path.parent != stored.parent
        np.testing.assert_allclose(answer(path), np.full((1, WIDTH), float(WIDTH)), rtol=1e-6)
    assert set(stored.parent.iterdir()) == before


def test_a_stopped_block_leaves_nothing(stored: Path) -> None:
    """Ctrl-C within the block removes the graph as well."""
    before = set(stored.parent.iterdir())
    with pytest.raises(KeyboardInterrupt), scratch_graph(load_graph(stored), "trying"):
        raise KeyboardInterrupt
    assert set(stored.parent.iterdir()) == before


def test_eager_runs_say_the_same(stored: Path) -> None:
    """The order in which nodes run changes no bit."""
    feeds = {"x": np.linspace(-1, 1, WIDTH, dtype=np.float32)[None]}
    one, other = (open_session(stored, planned=False, eager=eager).run(feeds) for eager in (False, True))
    np.testing.assert_array_equal(one["y"], other["y"])
