"""Roles come from a graph's shape alone: the same block is told by what feeds it and what reads it, not by names."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from edgekit.quant.graph import find_units
from tests.quant.lowering import attention_graph
from tests.quant.tiny_graphs import Graph, Shape, keys_and_values, normal_form, tiny_unet, two_texts
from tests.quant.trial_graphs import tiny

C = 16
SEQUENCE: Shape = ("batch", "tokens", C)
PICTURE: Shape = ("batch", C, "height", "width")


def roles(model: ir.Model) -> dict[str, str]:
    """Role by unit, names without their prefix."""
    return {unit.id.removeprefix("node."): unit.role for unit in find_units(model)}


def built(make: Graph, inputs: dict[str, Shape], output: str, shape: Shape) -> ir.Model:
    """The normal form of what was made so far; operators beyond ONNX' own are taken as they are."""
    infos = [
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, each) for name, each in side.items()]
        for side in (inputs, {output: shape})
    ]
    graph = helper.make_graph(make.nodes, "g", *infos, make.weights)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return normal_form(onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets, ir_version=10)))


def contrib(make: Graph, op: str, *inputs: str, **attributes: Any) -> str:
    """One of ONNX Runtime's own operators."""
    name = make(op, *inputs, **attributes)
    make.nodes[-1].domain = "com.microsoft"
    return name


def test_a_unet_is_read_from_its_shape() -> None:
    """Every role that a denoiser of pictures has, attention left in primitives."""
    assert roles(normal_form(tiny_unet())) == {
        "conv_in": "conv_in",
        "down": "conv",
        "to_q": "attn_q",
        "to_k": "cross_kv",
        "to_v": "cross_kv",
        "to_out": "attn_out",
        "ff_in": "ff_in",
        "ff_out": "ff_out",
        "shortcut": "shortcut",
        "conv1": "conv",
        "out_sample": "conv_out",
    }


def test_names_mean_nothing() -> None:
    """The same graph with its nodes and values numbered has the same roles in the same order."""
    proto = tiny_unet()
    wanted = [unit.role for unit in find_units(normal_form(proto))]
    values: dict[str, str] = {}
    fixed = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    for number, node in enumerate(proto.graph.node):
        node.name = f"n{number}"
        for names in (node.input, node.output):
            for at, name in enumerate(names):
                names[at] = name if name in fixed or not name else values.setdefault(name, f"v{len(values)}")
    for each in (*proto.graph.initializer, *proto.graph.value_info):
        each.name = values.get(each.name, each.name)
    assert [unit.role for unit in find_units(normal_form(proto))] == wanted


def test_other_graphs_of_the_same_kind() -> None:
    """Two more exports of attention and feed-forward pairs."""
    assert roles(tiny()) == {
        "entry": "conv_in",
        "inner": "conv",
        "beside": "shortcut",
        "query": "attn_q",
        "key": "cross_kv",
        "value": "cross_kv",
        "told": "attn_out",
        "wide": "ff_in",
        "narrow": "ff_out",
        "out": "conv_out",
    }
    assert roles(normal_form(ir.serde.serialize_model(attention_graph()))) == {
        "first": "conv_in",
        "conv1": "conv",
        "conv2": "conv",
        "to_q": "attn_q",
        "to_k": "attn_k",
        "to_v": "attn_v",
        "to_out": "attn_out",
        "up": "ff_in",
        "down": "ff_out",
        "last": "conv_out",
    }


@pytest.mark.parametrize("model", [keys_and_values(), two_texts()], ids=["one text", "two texts"])
def test_keys_and_values_of_a_fed_text(model: ir.Model) -> None:
    """Also where two texts lie side by side."""
    assert roles(model) == {"key": "cross_kv", "value": "cross_kv"}


@pytest.mark.parametrize("op", ["MultiHeadAttention", "Attention", "GroupQueryAttention"])
def test_attention_as_one_operator(op: str) -> None:
    """Its first three inputs are query, key and value, also behind a bias or a norm; what it makes goes out."""
    make = Graph()
    start = make("Relu", "x")
    q = make("Add", make("MatMul", start, make.normal(C, C), name="a"), make.normal(C, 1)[:, 0])
    k = make("LayerNormalization", make("MatMul", start, make.normal(C, C), name="b"), np.ones(C, np.float32))
    v = make("Reshape", make("MatMul", start, make.normal(C, C), name="c"), np.array([0, 0, C]))
    heard = contrib(make, op, q, k, v, num_heads=2, **({"kv_num_heads": 2} if op[0] == "G" else {}))
    out = make("MatMul", heard, make.normal(C, C), name="d")
    model = built(make, {"x": SEQUENCE}, make("Relu", make("Add", out, start), name="y"), SEQUENCE)
    assert roles(model) == {"a": "attn_q", "b": "attn_k", "c": "attn_v", "d": "attn_out"}


@pytest.mark.parametrize("op", ["Gelu", "Relu", "Sigmoid", "Tanh"])
def test_a_feed_forward_pair(op: str) -> None:
    """What an activation reads goes in, what reads it goes out; the last of a graph is its projection."""
    make = Graph()
    start = make("Neg", "x")
    wide = make("Add", make("MatMul", start, make.normal(C, 4 * C), name="up"), make.normal(4 * C, 1)[:, 0])
    down = make("MatMul", make(op, wide), make.normal(4 * C, C), name="down")
    make("MatMul", make("Add", down, start), make.normal(C, C), name="y")
    model = normal_form(make.done({"x": SEQUENCE}, {"y": SEQUENCE}))
    assert roles(model) == {"up": "ff_in", "down": "ff_out", "y": "proj_out"}


def test_a_feed_forward_pair_of_an_older_export() -> None:
    """GELU written out: x / sqrt(2), the error function, and two products."""
    make = Graph()
    start = make("Neg", "x")
    wide = make("Add", make("MatMul", start, make.normal(C, 4 * C), name="up"), make.normal(4 * C, 1)[:, 0])
    share = make("Add", make("Erf", make("Div", wide, np.float32(2**0.5))), np.float32(1))
    bent = make("Mul", make("Mul", wide, share), np.float32(0.5))
    down = make("MatMul", bent, make.normal(4 * C, C), name="down")
    make("MatMul", make("Add", down, start), make.normal(C, C), name="y")
    model = normal_form(make.done({"x": SEQUENCE}, {"y": SEQUENCE}))
    assert roles(model) == {"up": "ff_in", "down": "ff_out", "y": "proj_out"}


def test_a_gated_feed_forward() -> None:
    """silu(gate) * up, then down, as language models have it: the gate goes in, and down goes out."""
    make = Graph()
    start = make("Relu", "x")
    gate = make("MatMul", start, make.normal(C, 2 * C), name="gate")
    up = make("MatMul", start, make.normal(C, 2 * C), name="up")
    both = make("Mul", make("Mul", gate, make("Sigmoid", gate)), up)
    down = make("MatMul", both, make.normal(2 * C, C), name="down")
    make("MatMul", make("Add", down, start), make.normal(C, 5 * C), name="logits")
    found = roles(normal_form(make.done({"x": SEQUENCE}, {"logits": ("batch", "tokens", 5 * C)})))
    assert (found["gate"], found["down"], found["logits"]) == ("ff_in", "ff_out", "lm_head")


@pytest.mark.parametrize(("width", "role"), [(4 * C, "proj_out"), (4 * C + 1, "lm_head")])
@pytest.mark.parametrize("bias", [True, False])
def test_the_last_layer(width: int, role: str, bias: bool) -> None:
    """A vocabulary is wide; a bias or a reshape after the product changes nothing."""
    make = Graph()
    value = make("MatMul", make("Relu", "x"), make.normal(C, width), name="head")
    value = make("Add", value, make.normal(width, 1)[:, 0]) if bias else value
    model = normal_form(make.done({"x": SEQUENCE}, {make("Reshape", value, np.array([-1, width])): ("rows", width)}))
    assert roles(model) == {"head": role}


def test_a_vector_for_each_sample_is_of_time() -> None:
    """Timesteps and pooled texts have no tokens."""
    make = Graph()
    inner = make("MatMul", make("Sigmoid", "t"), make.normal(C, C), name="first")
    shift = make(
        "Reshape", make("MatMul", make("Tanh", inner), make.normal(C, C), name="second"), np.array([0, C, 1, 1])
    )
    mixed = make("Add", make("Conv", "x", make.normal(C, C, 3, 3), name="in", pads=[1] * 4), shift)
    make("Conv", mixed, make.normal(C, C, 3, 3), name="y", pads=[1] * 4)
    found = roles(normal_form(make.done({"x": PICTURE, "t": ("batch", C)}, {"y": PICTURE})))
    assert found == {"first": "time", "second": "time", "in": "conv_in", "y": "conv_out"}


@pytest.mark.parametrize("side", [1, 3])
def test_a_shortcut_is_a_point_on_the_raw_stream(side: int) -> None:
    """1 x 1, added to what came the long way, reading what no activation has touched."""
    make = Graph()
    pads = [side // 2] * 4
    stream = make("Conv", "x", make.normal(C, C, 3, 3), name="in", pads=[1] * 4)
    beside = make("Conv", stream, make.normal(C, C, side, side), name="beside", pads=pads)
    bent = make("Conv", make("Relu", stream), make.normal(C, C, side, side), name="bent", pads=pads)
    make("Conv", make("Add", beside, bent), make.normal(C, C, 3, 3), name="y", pads=[1] * 4)
    found = roles(normal_form(make.done({"x": PICTURE}, {"y": PICTURE})))
    assert found == {"in": "conv_in", "beside": "shortcut" if side == 1 else "conv", "bent": "conv", "y": "conv_out"}


def test_several_inputs_side_by_side_are_an_entry() -> None:
    """A mask beside a picture, as inpainting has it."""
    make = Graph()
    both = make("Concat", "x", "mask", axis=1)
    value = make("Conv", both, make.normal(C, 2 * C, 3, 3), name="in", pads=[1] * 4)
    make("Conv", make("Relu", value), make.normal(C, C, 3, 3), name="y", pads=[1] * 4)
    assert roles(normal_form(make.done({"x": PICTURE, "mask": PICTURE}, {"y": PICTURE})))["in"] == "conv_in"


def test_a_product_that_fits_nothing_is_a_linear_layer() -> None:
    """Read by a sum, reading a norm: no attention, no activation."""
    make = Graph()
    normed = make("LayerNormalization", "x", np.ones(C, np.float32))
    value = make("Add", make("MatMul", normed, make.normal(C, C), name="mix"), "x")
    make("MatMul", value, make.normal(C, C), name="y")
    assert roles(normal_form(make.done({"x": SEQUENCE}, {"y": SEQUENCE}))) == {"mix": "linear", "y": "proj_out"}
