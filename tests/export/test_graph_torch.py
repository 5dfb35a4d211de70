"""Torch runs a whole ONNX graph as ONNX Runtime does, with the right gradients, and keeps nothing it need not."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgekit.errors import BadRequest, SessionFailed, UnsupportedModel
from edgekit.export.graph_torch import read_weight, run_graph
from edgekit.export.graph_torch_layers import name_of
from edgekit.quant.graph import load_graph, normalised
from tests.export.operator_cases import f, tensors
from tests.export.toy_graphs import SIDE, TEXT, TOKENS, linear_chain, run_ort, single, toy_unet

pytestmark = pytest.mark.torch

FIXTURES = Path(__file__).parents[1] / "fixtures" / "optimum"


def test_unknown_operators_are_all_named_before_anything_runs() -> None:
    """Two operators without a row are in one message, with their domain; the input is not even asked for."""
    model = single("Det", [f(2, 2)], {})
    model.graph.append(ir.node("FusedMatMul", [model.graph.inputs[0]] * 2, domain="com.microsoft"))
    with pytest.raises(UnsupportedModel, match=r"Det, com\.microsoft\.FusedMatMul.*scan"):
        run_graph(model, {})


def test_an_old_opset_is_refused() -> None:
    """Softmax of opset 11 means something else than it does now."""
    with pytest.raises(UnsupportedModel, match="not 11"):
        run_graph(single("Softmax", [f(2, 3, 4)], {}, opset=11), {"x0": torch.zeros(2, 3, 4)})


def test_a_missing_input_is_named() -> None:
    """And so is what was fed instead."""
    with pytest.raises(BadRequest, match=r"'x'.*there is y"):
        run_graph(linear_chain(), {"y": torch.zeros(1, 24)})


def test_shapes_that_do_not_fit_name_the_node() -> None:
    """Torch's own words follow the node's name and the shapes."""
    with pytest.raises(SessionFailed, match=r"node\.matmul0 \(MatMul\) on \(1, 23\), \(24, 32\)"):
        run_graph(linear_chain(), {"x": torch.zeros(1, 23)})


PARTS = sorted(path.parent.relative_to(FIXTURES).as_posix() for path in FIXTURES.glob("*/*/model.onnx"))
SIZES = {"batch_size": 2, "sequence_length": 7, "height": 16, "width": 16, "latent_height": 8, "latent_width": 8}


def feeds_of(graph: ir.Graph, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Random inputs of a whole graph; sizes by the axes' names, numbers among them as they are."""
    random, feeds = np.random.default_rng(3), {}
    for value in graph.inputs:
        names = [str(getattr(axis, "value", axis)) for axis in value.shape]
        shape = [int(name) if name.isdigit() else sizes.get(name, 16) for name in names]
        dtype = value.dtype.numpy()
        noise = random.standard_normal(shape) if np.dtype(dtype).kind == "f" else random.integers(0, 9, shape)
        feeds[value.name] = np.asarray(noise).astype(dtype)
    return feeds


@pytest.mark.parametrize("part", PARTS)
def test_whole_graphs_of_another_exporter(part: str) -> None:
    """UNets, autoencoders and text encoders that Optimum wrote give ONNX Runtime's numbers, normalised or not."""
    model = load_graph(FIXTURES / part / "model.onnx")
    feeds = feeds_of(model.graph, SIZES)
    wanted = run_ort(model, feeds)
    with torch.no_grad():
        plain, folded = (run_graph(each, tensors(feeds)) for each in (model, normalised(model)))
    assert list(plain) == list(folded) == [value.name for value in model.graph.outputs]
    for theirs, *ours in zip(wanted, plain.values(), folded.values(), strict=True):
        for each in ours:
            np.testing.assert_allclose(each.numpy(), theirs, atol=1e-4 * np.abs(theirs).max())


def test_a_toy_denoiser() -> None:
    """The graph that the probes are tested on gives ONNX Runtime's numbers too."""
    model = toy_unet()
    feeds = {"sample": f(2, 4, SIDE, SIDE), "text": f(2, TOKENS, TEXT)}
    (wanted,) = run_ort(model, feeds)
    found = run_graph(model, tensors(feeds))["out"]
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5 * np.abs(wanted).max())


def test_gradients_are_those_of_finite_differences() -> None:
    """In float64, through convolutions, norms, attention and everything between."""
    model = toy_unet()
    text = torch.from_numpy(f(1, TOKENS, TEXT)).double()
    start = torch.from_numpy(f(1, 4, SIDE, SIDE)).double().requires_grad_()

    def wide(value: ir.Value) -> Any:
        weight = read_weight(value)
        return weight.double() if weight.is_floating_point() else weight

    def answer(sample: Any) -> Any:
        return run_graph(model, {"sample": sample, "text": text}, weights=wide)["out"]

    along, towards = (torch.from_numpy(f(1, 4, SIDE, SIDE)).double() for _ in range(2))
    (gradient,) = torch.autograd.grad(answer(start), start, towards)
    step = 1e-5
    with torch.no_grad():
        change = (answer(start + step * along) - answer(start - step * along)) / (2 * step)
    assert float((gradient * along).sum()) == pytest.approx(float((change * towards).sum()), rel=1e-7)


def test_values_are_let_go_when_nobody_reads_them_any_more() -> None:
    """In a chain of forty nodes never more than three tensors live, and after it only the output."""
    x = value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4]))
    nodes = []
    for _ in range(40):
        nodes.append(ir.node("Tanh", [value]))
        value = nodes[-1].outputs[0]
    value.name = "y"
    model = ir.Model(ir.Graph([x], [value], nodes=nodes, opset_imports={"": 20}), ir_version=10)
    seen: list[weakref.ref[Any]] = []
    most = 0

    def watch(_: ir.Node, inputs: Any, outputs: Any) -> None:
        nonlocal most
        seen.extend(weakref.ref(each) for each in outputs)
        most = max(most, sum(each() is not None for each in seen))

    with torch.no_grad():
        found = run_graph(model, {"x": torch.zeros(4)}, watch=watch)
    assert len(seen) == 40
    assert most <= 3
    assert [each() for each in seen if each() is not None] == [found["y"]]


def test_weights_in_a_file_are_not_copied(tmp_path: Path) -> None:
    """The tensor that torch reads has the address of the mapped file."""
    ir.save(linear_chain(), tmp_path / "m.onnx", external_data="m.onnx.data")
    model = load_graph(tmp_path / "m.onnx")
    for value in model.graph.initializers.values():
        assert isinstance(value.const_value, ir.ExternalTensor)
        assert read_weight(value).data_ptr() == value.const_value.numpy().ctypes.data


@pytest.mark.parametrize("dtype", ["FLOAT16", "BFLOAT16", "DOUBLE", "INT32", "BOOL", "INT8"])
def test_weights_of_other_types(dtype: str) -> None:
    """Every type of DTYPES that numpy has, and bfloat16, which it has not."""
    kind = ir.DataType[dtype]
    array = np.array([1, 0, 1, 1]).astype(kind.numpy())
    value = ir.Value(name="w", const_value=ir.tensor(array, dtype=kind))
    weight = read_weight(value)
    assert str(weight.dtype).removeprefix("torch.").upper() == dtype.replace("DOUBLE", "FLOAT64")
    assert weight.double().tolist() == [1, 0, 1, 1]


def test_who_watches_hears_every_node_and_may_ask_for_gradients() -> None:
    """Nodes come in order, with what they read; a made leaf has the gradient of what follows."""
    heard: list[str] = []
    leaves: list[Any] = []

    def watch(node: ir.Node, inputs: Any, outputs: Any) -> None:
        heard.append(name_of(node))
        assert len(inputs) == 2
        if not outputs[0].requires_grad:
            leaves.append(outputs[0].requires_grad_())

    model = linear_chain()
    out = run_graph(model, {"x": torch.ones(1, 24)}, watch=watch)["out0"]
    assert heard == ["MatMul", "MatMul"]
    (gradient,) = torch.autograd.grad(out.sum(), leaves)
    last = read_weight(list(model.graph)[1].inputs[1])
    torch.testing.assert_close(gradient[0], last.sum(1))


def test_an_input_with_a_default_may_be_left_out() -> None:
    """Weights that are listed as inputs are read where they are not fed, and fed where they are."""
    model = linear_chain()
    weight = list(model.graph)[1].inputs[1]
    model.graph.inputs.append(weight)
    x = torch.ones(1, 24)
    assert run_graph(model, {"x": x})["out0"].abs().sum() > 0
    assert run_graph(model, {"x": x, weight.name: torch.zeros(32, 16)})["out0"].abs().sum() == 0
