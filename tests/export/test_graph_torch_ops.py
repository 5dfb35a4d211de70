"""Every operator is what ONNX Runtime computes, with the right gradients; what is not modelled is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgekit.errors import UnsupportedModel
from edgekit.export.graph_torch import run_graph
from edgekit.export.graph_torch_ops import OPS
from tests.export.operator_cases import CASES, EVERY, QKV, SCALES, f, n, node_of, tensors
from tests.export.toy_graphs import run_ort, single

pytestmark = pytest.mark.torch


def test_no_operator_is_untested() -> None:
    """Every row of OPS has cases, and every case a row."""
    assert CASES.keys() == OPS.keys()
    assert all(CASES.values())


@pytest.mark.parametrize(("name", "number"), EVERY, ids=[f"{name}-{number}" for name, number in EVERY])
def test_an_operator_is_what_onnx_runtime_computes(name: str, number: int) -> None:
    """Equal types, shapes and numbers, of every case of every operator."""
    model, feeds = node_of(name, number)
    wanted, found = run_ort(model, feeds), run_graph(model, tensors(feeds))
    assert list(found) == [f"y{i}" for i in range(len(wanted))]
    for theirs, ours in zip(wanted, found.values(), strict=True):
        assert (ours.numpy().dtype, tuple(ours.shape)) == (theirs.dtype, theirs.shape)
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5, atol=2e-6)


REFUSED = {
    "Cast": ({"to": int(ir.DataType.FLOAT8E4M3FN)}, [f(3)], "casts"),
    "Conv": ({"auto_pad": "SAME_UPPER"}, [f(1, 2, 4, 4), f(2, 2, 3, 3)], "auto_pad"),
    "ConvTranspose": ({"pads": [0, 1]}, [f(1, 2, 4), f(2, 2, 3)], "unequal pads"),
    "Constant": ({"value_string": "x"}, [], "value_string"),
    "CumSum": ({"reverse": 1}, [f(3), np.array(0)], "reverse"),
    "GatherND": ({"batch_dims": 1}, [f(2, 3), np.array([[0], [1]])], "batch_dims"),
    "ArgMax": ({"select_last_index": 1}, [f(3)], "select_last_index"),
    "Pad": ({"mode": "wrap"}, [f(3), n(1, 1)], "wrap"),
    "Resize": ({"mode": "linear", "antialias": 1}, [f(1, 1, 4, 4), None, SCALES], "antialias"),
    "Attention": ({"softcap": 2.0, "q_num_heads": 2, "kv_num_heads": 2}, QKV, "softcap"),
    "com.microsoft.MultiHeadAttention": ({"num_heads": 2}, [*QKV, f(24)], "bias"),
}
REFUSED_TOO = [
    ("Resize", {"coordinate_transformation_mode": "tf_crop_and_resize"}, [f(1, 1, 4, 4), f(8), SCALES], "crop"),
    ("Attention", {"q_num_heads": 2, "kv_num_heads": 2, "is_causal": 1}, QKV, "causal"),
    ("com.microsoft.MultiHeadAttention", {"num_heads": 2}, [f(2, 5, 2, 3, 4)], "packed"),
]


@pytest.mark.parametrize(
    ("name", "attributes", "inputs", "word"), [*((k, *v) for k, v in REFUSED.items()), *REFUSED_TOO]
)
def test_forms_that_are_not_modelled_are_refused_by_name(
    name: str, attributes: dict[str, Any], inputs: list[np.ndarray | None], word: str
) -> None:
    """What the table does not model is named, with the node, and never approximated."""
    domain, _, op = name.rpartition(".")
    model = single(op, inputs, attributes, opset=23, domain=domain)
    feeds = {f"x{i}": each for i, each in enumerate(inputs) if each is not None}
    with pytest.raises(UnsupportedModel, match=f"{op}.*{word}"):
        run_graph(model, tensors(feeds))


DIFFERENTIABLE = [
    (name, number)
    for name, number in EVERY
    if CASES[name][number][1]
    and np.asarray(CASES[name][number][1][0]).dtype == np.float32
    and name not in ("ArgMax", "Cast", "Ceil", "Floor", "Round", "IsNaN", "Range", "Shape")
    and name not in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
]


@pytest.mark.parametrize(("name", "number"), DIFFERENTIABLE, ids=[f"{a}-{b}" for a, b in DIFFERENTIABLE])
def test_every_operator_lets_gradients_through(name: str, number: int) -> None:
    """Along a random direction each case's gradient is its finite difference."""
    model, feeds = node_of(name, number)
    wide = {key: each.double() if each.is_floating_point() else each for key, each in tensors(feeds).items()}
    start = wide.pop("x0").requires_grad_()

    def answer(x: Any) -> Any:
        outputs = run_graph(model, {"x0": x, **wide}).values()
        return sum((each.double() * torch.linspace(0.5, 1, each.numel()).reshape(each.shape)).sum() for each in outputs)

    if not start.numel():
        return
    (gradient,) = torch.autograd.grad(answer(start), start)
    along = torch.from_numpy(f(*start.shape)).double().reshape(start.shape)
    with torch.no_grad():
        change = (answer(start + 1e-5 * along) - answer(start - 1e-5 * along)) / 2e-5
    assert float((gradient * along).sum()) == pytest.approx(float(change), rel=2e-3, abs=2e-3)
