"""Lowering for ONNX Runtime on CUDA: float16 products between Casts, and stored integers as MatMulNBits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgekit.errors import BadRequest
from edgekit.quant.choices import CHOICES
from edgekit.quant.graph import find_units, normalised
from edgekit.quant.targets import get_target
from tests.quant.engine_graphs import network, open_target, picture, run, written
from tests.quant.lowering import NBITS, bias_of, linear, stored_of

CUDA = get_target("cuda")
OPEN = open_target("cuda")
HALF = onnx.TensorProto.FLOAT16


def types_of(model: onnx.ModelProto, name: str) -> dict[str, int]:
    """Element types of everything a node reads and gives, by name."""
    infos = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    known = {info.name: info.type.tensor_type.elem_type for info in infos}
    known |= {each.name: each.data_type for each in model.graph.initializer}
    node = next(node for node in model.graph.node if node.name == name)
    return {each: known[each] for each in (*node.input, *node.output)}


@pytest.mark.parametrize("choice", NBITS)
@pytest.mark.parametrize(("n", "k", "shape"), [(16, 64, (3, 64)), (8, 129, (1, 7, 129)), (24, 256, (2, 5, 256))])
@pytest.mark.parametrize("bias", [True, False])
def test_stored_integers_meet_float16(choice: str, n: int, k: int, shape: tuple[int, ...], bias: bool, tmp_path: Path):
    """The product is of the stored weights and float16 activations; a bias is added in the graph's own type."""
    model = linear(n, k, bias=bias, rank=len(shape))
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    path = written(tmp_path, model, choice, target=OPEN)
    _, weight = stored_of(model, choice, target=OPEN)
    wanted = x.astype(np.float16).astype(np.float64) @ weight.T + bias_of(model)
    got = run(path, x=x)
    assert np.abs(got - wanted).max() <= 5e-3 * np.abs(wanted).max()
    product = next(node for node in onnx.load(path).graph.node if node.op_type == "MatMulNBits")
    attributes = {each.name: each.i for each in product.attribute}
    form = CHOICES[choice].weight
    assert attributes == {"K": k, "N": n, "bits": form.bits, "block_size": form.block}
    assert len(product.input) == 3
    types = types_of(onnx.load(path), "product")
    assert [types[name] for name in (*product.input, *product.output)] == [HALF, onnx.TensorProto.UINT8, HALF, HALF]


def test_a_float16_graph_needs_no_casts(tmp_path: Path):
    """Activations that are float16 already go straight in."""
    model = network(dtype=np.float16)
    found = onnx.load(written(tmp_path, model, {"to_q": "w4a16-32", "up": "w8a16", "conv1": "fp16"}, target=CUDA))
    assert "Cast" not in {node.op_type for node in found.graph.node}
    assert {entry.domain: entry.version for entry in found.opset_import} == {"": 23, "com.microsoft": 1}


def test_a_float16_unit_lies_between_casts(tmp_path: Path):
    """Product and weights are float16, inputs and outputs of the graph what they were."""
    model, x = network(), picture()
    path = written(tmp_path, model, "fp16", target=CUDA)
    found = onnx.load(path)
    for unit in find_units(normalised(model)):
        assert set(types_of(found, unit.id).values()) == {HALF}
    before = ir.to_proto(model)
    assert list(found.graph.input) == list(before.graph.input)
    assert list(found.graph.output) == list(before.graph.output)
    ir.save(model, tmp_path / "float.onnx")
    exact = run(tmp_path / "float.onnx", x=x)
    assert np.square(run(path, x=x) - exact).sum() < 1e-5 * np.square(exact).sum()


def test_neighbours_in_float16_do_not_bounce(tmp_path: Path):
    """MatMulNBits and a float16 product share the Cast of what both read; nothing is widened to be narrowed again."""
    choices = {"to_q": "w4a16-64", "to_k": "fp16", "to_v": "w8a16"}
    found = onnx.load(written(tmp_path, network(), choices, target=CUDA))
    casts = [node for node in found.graph.node if node.op_type == "Cast"]
    assert len([node for node in casts if node.input[0] == "t"]) == 1
    makers = {name: node.op_type for node in found.graph.node for name in node.output}
    assert "Cast" not in {makers[node.input[0]] for node in casts}


@pytest.mark.parametrize("choice", ["w8a8", "w8a8-row", "fp8", "nvfp4", "bf16"])
def test_what_cuda_does_not_fuse_is_refused(choice: str, tmp_path: Path):
    """int8 Q/DQ above all: the message names the unit and what it may be."""
    with pytest.raises(BadRequest, match=f"'to_q' .* cannot be {choice} on cuda; it may be fp32, fp16"):
        written(tmp_path, network(), {"to_q": choice}, target=CUDA)


def test_activations_beyond_float16_are_refused(tmp_path: Path):
    """A stored-integer product runs in float16 too, so a known range beyond it is refused by name."""
    with pytest.raises(BadRequest, match="value 't' reaches 7e"):
        written(tmp_path, network(), {"to_q": "w4a16-32"}, {"t": (-7e4, 1.0)}, CUDA)
