"""An ONNX graph as a list of units: the layers that choose a precision, each with the role its surroundings give it.

A unit is one product with stored weights (Conv, MatMul) or one table that is gathered from. Roles come from the graph's
shape, never from names: what feeds a product and what reads it is the same in every exporter's graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgekit.errors import BadGraph

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]

Role = Literal[
    "conv_in",  # reads a graph input
    "conv_out",  # nothing with weights comes after it
    "proj_out",  # the same of a linear layer
    "shortcut",  # 1x1, beside a block, on the raw residual stream
    "conv",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_out",
    "cross_kv",  # a key or value of another sequence, fed from outside
    "ff_in",
    "ff_out",
    "time",  # of a vector per sample: timestep, pooled text, guidance
    "linear",
    "lm_head",
    "embedding",
]

SHAPE_ONLY = {"Reshape", "Cast", "Identity", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Expand", "Slice"}
ATTENTION = {"MultiHeadAttention", "Attention", "GroupQueryAttention"}
NORMS = {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "InstanceNormalization"}
ACTIVATIONS = {"Gelu", "Erf", "Relu", "Tanh", "Sigmoid", "FastGelu", "QuickGelu", "Silu", "HardSwish", "LeakyRelu"}
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
ORIGIN = "edgekit.origin"  # metadata of an initializer that was made of another
SMALLEST = 256  # weights; below it a scale costs as much as it saves


@dataclass(frozen=True, slots=True)
class Unit:
    """One choice to make.

    Attributes:
        id: the product's node name, unique in the graph.
        op: Conv, MatMul, or Gather for a table.
        weight: name of the initializer.
        role: what the product is for.
        n, k: outputs, and weights per output; a Gather has n rows of k.
        kernel: height and width of a convolution, () otherwise.
        group: of a convolution.
        origin: name of the initializer that `weight` was before normalising: units of one origin share stored weights.
        data: name of the value that is multiplied.
        output: name of the product's value.
    """

    id: str
    op: Literal["Conv", "MatMul", "Gather"]
    weight: str
    role: Role
    n: int
    k: int
    data: str
    output: str
    kernel: tuple[int, ...] = ()
    group: int = 1
    origin: str = ""

    @property
    def params(self) -> int:
        """Stored weights."""
        return self.n * self.k


def load_graph(path: Path) -> ir.Model:
    """Read a graph; weights stay in their file until they are asked for.

    Raises:
        BadGraph: no ONNX graph is there.
    """
    try:
        return ir.load(path)
    except Exception as why:  # the parser's own errors have no common class
        raise BadGraph(f"{path} is no ONNX graph that can be read: {why}") from why


def normalised(model: ir.Model) -> ir.Model:
    """A copy in which every product with weights is a Conv or a MatMul, by a unique name, of an initializer.

    Gemm becomes MatMul and Add; a Transpose or Cast between an initializer and a product is done once, on the weight.
    Weights stay lazy. The function computed is the same, its rounding aside.
    """
    model = model.clone()
    graph = model.graph
    _name_nodes(graph)
    for node in list(graph):
        if node.op_type in ("MatMul", "Conv", "Gemm") and len(node.inputs) > 1:
            _fold_weight(graph, node)
    for node in list(graph):
        if node.op_type == "Gemm" and _is_plain_gemm(node):
            _split_gemm(graph, node)
    _name_nodes(graph)  # a bias's name may be that of another node
    RemoveUnusedNodesPass()(model)
    return model


def find_units(model: ir.Model) -> tuple[Unit, ...]:
    """The units of a normalised graph, in the order they run."""
    products = {id(node): node for node in model.graph if _is_product(node)}
    return tuple(_unit(node, products) for node in model.graph if id(node) in products)


def weight_matrix(model: ir.Model, unit: Unit) -> F32:
    """A unit's weights as float32 (n, k): one row per output, a convolution's inputs and taps along the row."""
    return to_matrix(initializer(model, unit.weight).numpy(), unit)


def to_matrix(weight: Array, unit: Unit) -> F32:
    """A stored weight as (n, k)."""
    rows = weight.T if unit.op == "MatMul" else weight.reshape(unit.n, unit.k)
    return np.ascontiguousarray(rows, dtype=np.float32)


def from_matrix(matrix: F32, unit: Unit, shape: tuple[int, ...]) -> F32:
    """(n, k) back to the shape that the product reads."""
    return np.ascontiguousarray(matrix.T) if unit.op == "MatMul" else matrix.reshape(shape)


def initializer(model: ir.Model, name: str) -> Any:
    """The tensor behind a name.

    Raises:
        BadGraph: no initializer of this name.
    """
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        raise BadGraph(f"the graph has no initializer {name!r}")
    return value.const_value


def lazy_initializer(graph: ir.Graph, name: str, make: Callable[[], Array], dtype: ir.DataType, shape: Any) -> ir.Value:
    """Register an initializer whose numbers are computed when the graph is written."""
    shape = ir.Shape(shape)
    tensor = ir.LazyTensor(lambda: ir.tensor(make(), dtype=dtype, name=name), dtype, shape, name=name)
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape, const_value=tensor)
    graph.initializers[name] = value
    return value


def source(value: ir.Value | None) -> ir.Value | None:
    """The value behind reshapes, casts and transposes."""
    while value is not None and (node := value.producer()) is not None and node.op_type in SHAPE_ONLY:
        value = node.inputs[0]
    return value


def readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """The nodes that read a value behind reshapes, casts and transposes, and at which input."""
    for node, index in value.uses():
        if node.op_type in SHAPE_ONLY and index == 0:
            for output in node.outputs:
                yield from readers(output)
        else:
            yield node, index


def _name_nodes(graph: ir.Graph) -> None:
    seen: set[str] = set()
    for number, node in enumerate(graph):
        name = node.name or f"{node.op_type}_{number}"
        while name in seen:
            name = f"{name}_{number}"
        seen.add(name)
        node.name = name


def _fold_weight(graph: ir.Graph, node: ir.Node) -> None:
    """Do Transposes and Casts between an initializer and a product on its numbers, the one next to it first."""
    value, makers = node.inputs[1], []
    while value is not None and (maker := value.producer()) is not None and maker.op_type in ("Transpose", "Cast"):
        makers.append(maker)
        value = maker.inputs[0]
    if value is None or not value.is_initializer():
        return
    for maker in reversed(makers):
        tensor = value.const_value
        assert tensor is not None
        name = f"{value.name}.{maker.op_type.lower()}.{node.name}"
        folded = _cast(graph, name, maker, tensor) if maker.op_type == "Cast" else _turned(graph, name, maker, tensor)
        folded.metadata_props[ORIGIN] = value.metadata_props.get(ORIGIN, str(value.name))
        node.replace_input_with(1, folded)
        value = folded


def _cast(graph: ir.Graph, name: str, maker: ir.Node, tensor: Any) -> ir.Value:
    dtype = ir.DataType(maker.attributes["to"].as_int())
    return lazy_initializer(graph, name, lambda: tensor.numpy().astype(dtype.numpy()), dtype, tensor.shape)


def _turned(graph: ir.Graph, name: str, maker: ir.Node, tensor: Any) -> ir.Value:
    perm = maker.attributes["perm"].as_ints() if "perm" in maker.attributes else None
    order = perm if perm is not None else list(range(len(tensor.shape)))[::-1]
    shape = [tensor.shape[axis] for axis in order]
    return lazy_initializer(
        graph, name, lambda: np.ascontiguousarray(tensor.numpy().transpose(order)), tensor.dtype, shape
    )


def _is_plain_gemm(node: ir.Node) -> bool:
    attributes = node.attributes
    weight = node.inputs[1]
    return (
        all(attributes[name].as_float() == 1.0 for name in ("alpha", "beta") if name in attributes)
        and not ("transA" in attributes and attributes["transA"].as_int())
        and weight is not None
        and weight.is_initializer()
    )


def _split_gemm(graph: ir.Graph, node: ir.Node) -> None:
    data, weight = node.inputs[0], node.inputs[1]
    assert weight is not None
    tensor = weight.const_value
    assert tensor is not None
    if "transB" in node.attributes and node.attributes["transB"].as_int():
        n, k = tensor.shape
        origin, name = str(weight.name), f"{weight.name}.T.{node.name}"
        weight = lazy_initializer(graph, name, lambda: np.ascontiguousarray(tensor.numpy().T), tensor.dtype, [k, n])
        weight.metadata_props[ORIGIN] = origin
    output = node.outputs[0]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    product = ir.Node("", "MatMul", [data, weight], name=node.name)
    made, result = [product], product.outputs[0]
    result.shape, result.type = output.shape, output.type
    result.name = f"{output.name}.product" if bias is not None else output.name
    if bias is not None:
        add = ir.Node("", "Add", [result, bias], name=f"{node.name}.bias")
        add.outputs[0].shape, add.outputs[0].type = output.shape, output.type
        made.append(add)
        result = add.outputs[0]
    name = output.name
    ir.convenience.replace_nodes_and_values(graph, node, [node], made, [output], [result])
    result.name = name


def _is_product(node: ir.Node) -> bool:
    at = 0 if node.op_type == "Gather" else 1
    if node.op_type not in ("Conv", "MatMul", "Gather") or len(node.inputs) <= at:
        return False
    weight = node.inputs[at]
    if weight is None or not weight.is_initializer() or weight.const_value is None:
        return False
    shape, dtype = weight.const_value.shape, weight.const_value.dtype
    turned = "axis" in node.attributes and node.attributes["axis"].as_int() != 0  # a Gather's: scales lie along rows
    if dtype not in FLOATS or weight.const_value.size < SMALLEST or turned:
        return False
    return len(shape) == 2 if node.op_type != "Conv" else len(shape) in (3, 4)


def _unit(node: ir.Node, products: dict[int, ir.Node]) -> Unit:
    gathers = node.op_type == "Gather"
    weight, data = node.inputs[0 if gathers else 1], node.inputs[1 if gathers else 0]
    assert weight is not None
    assert weight.const_value is not None
    assert data is not None
    shape = tuple(int(size) for size in weight.const_value.shape)
    n, k = (shape[1], shape[0]) if node.op_type == "MatMul" else (shape[0], int(np.prod(shape[1:])))
    group = node.attributes["group"].as_int() if "group" in node.attributes else 1
    role: Role = "embedding" if gathers else _role(node, n, k, products)
    return Unit(
        id=str(node.name),
        op=node.op_type,
        weight=str(weight.name),
        role=role,
        n=n,
        k=k,
        data=str(data.name),
        output=str(node.outputs[0].name),
        kernel=shape[2:] if node.op_type == "Conv" else (),
        group=group,
        origin=weight.metadata_props.get(ORIGIN, str(weight.name)),
    )


def _role(node: ir.Node, n: int, k: int, products: dict[int, ir.Node]) -> Role:
    data, output = node.inputs[0], node.outputs[0]
    behind = source(data)
    assert behind is not None
    if node.op_type == "Conv":
        return _conv_role(node, behind) if _leads_to_product(output, products) else "conv_out"
    if any(value.is_graph_output() for value in _same(output)) and not _leads_to_product(output, products):
        return "lm_head" if n > 4 * k else "proj_out"
    return _linear_role(node, behind, output)


def _conv_role(node: ir.Node, behind: ir.Value) -> Role:
    maker = behind.producer()
    kernel = node.inputs[1].const_value.shape[2:]
    if maker is None or (maker.op_type == "Concat" and all(_is_fed(value) for value in maker.inputs)):
        return "conv_in"
    beside = any(reader.op_type == "Add" for reader, _ in readers(node.outputs[0]))
    raw = maker.op_type in ("Concat", "Conv", "Resize") or (maker.op_type == "Add" and not _reads_constant(maker))
    direct = node.inputs[0] is behind  # a transformer block's last projection reads a reshaped value
    return "shortcut" if all(size == 1 for size in kernel) and beside and raw and direct else "conv"


def _reads_constant(node: ir.Node) -> bool:
    return any(each is not None and each.is_initializer() for each in node.inputs)


def _linear_role(node: ir.Node, behind: ir.Value, output: ir.Value) -> Role:
    data = node.inputs[0]
    assert data is not None
    if _is_text(behind):
        return "cross_kv"
    if data.shape is not None and len(data.shape) == 2:
        return "time"
    maker = behind.producer()
    if maker is not None and (maker.op_type in ATTENTION or _multiplies_activations(maker)):
        return "attn_out"
    through = list(_after(output))
    for reader, index in through:
        if reader.op_type in ATTENTION and index < 3:
            return ("attn_q", "attn_k", "attn_v")[index]
        if _multiplies_activations(reader):  # attention left in primitives: the scores, then what they weigh
            weighed = (other := source(reader.inputs[0])) is not None and _is_made_by(other, "Softmax")
            return "attn_v" if weighed else ("attn_q", "attn_k")[index]
    if any(reader.op_type in ACTIVATIONS for reader, _ in through):
        return "ff_in"
    if maker is not None and (maker.op_type in ACTIVATIONS or maker.op_type == "Mul"):
        return "ff_out"
    return "linear"


def _is_text(value: ir.Value | None) -> bool:
    """Whether a value is a fed sequence, or several beside each other (SDXL's two text encoders)."""
    if value is None:
        return False
    maker = value.producer()
    if maker is not None and maker.op_type == "Concat":
        last = maker.attributes["axis"].as_int() in (-1, 2)
        return last and all(_is_text(source(each)) for each in maker.inputs)
    return _is_fed(value) and value.shape is not None and len(value.shape) == 3


def _multiplies_activations(node: ir.Node) -> bool:
    return node.op_type == "MatMul" and not _reads_constant(node)


def _is_made_by(value: ir.Value, op: str) -> bool:
    maker = value.producer()
    return maker is not None and maker.op_type == op


def _same(value: ir.Value) -> Iterator[ir.Value]:
    """A value, and what it is after reshapes and a bias."""
    yield value
    for node, _ in value.uses():
        if node.op_type in SHAPE_ONLY or (node.op_type == "Add" and _reads_constant(node)):
            yield from _same(node.outputs[0])


def _after(value: ir.Value, depth: int = 4) -> Iterator[tuple[ir.Node, int]]:
    """What reads a value, also behind a bias, a split, a norm or a rotation."""
    for node, index in readers(value):
        yield node, index
        linear = node.op_type in ("Add", "Mul", "Div") and _reads_constant(node)
        if depth and (linear or node.op_type in NORMS or node.op_type in ("Split", "RotaryEmbedding")):
            for output in node.outputs:
                yield from _after(output, depth - 1)


def _is_fed(value: ir.Value | None) -> bool:
    return value is not None and value.is_graph_input()


def _leads_to_product(value: ir.Value, products: dict[int, ir.Node]) -> bool:
    """Whether any unit lies downstream."""
    seen: set[int] = set()
    pending = [value]
    while pending:
        for node, _ in pending.pop().uses():
            if id(node) in products:
                return True
            if id(node) not in seen:
                seen.add(id(node))
                pending += node.outputs
    return False
