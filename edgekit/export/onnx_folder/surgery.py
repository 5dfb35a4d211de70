"""Small rewritings of a graph, with onnx_ir: names, axes and the few places where exporters and the house differ.

Each function changes the model it is given and says what it raises. Weights stay lazy throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from edgekit.bundle.graphfile import read_graph
from edgekit.bundle.manifest import TensorSpec
from edgekit.errors import BadSource, UnsupportedModel
from edgekit.export.language.store import write_model

ELEMENTS = {"int64": ir.DataType.INT64, "int32": ir.DataType.INT32, "float32": ir.DataType.FLOAT}
Times = Literal["each", "one"]  # whether every row of a batch has its own time, or the first row's is everybody's


def load(path: Path) -> ir.Model:
    """A model whose external tensors are read when they are asked for; weights are no inputs.

    Links are followed: a hub's cache keeps a graph's data elsewhere. That it lies under a plain name beside the graph
    is for `graphs.find_graph` to see to.

    Raises:
        BadSource: it cannot be read.
    """
    try:
        model = ir.load(path)
    except Exception as why:  # protobuf and onnx_ir share no class of errors
        raise BadSource(f"{path} cannot be read as ONNX ({why}); is the download complete?") from why
    common.RemoveInitializersFromInputsPass()(model)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                path.with_name(str(tensor.location)).resolve(),
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=name,
            )
    return model


def value_named(values: Sequence[ir.Value], name: str) -> ir.Value:
    """The graph input or output of this name, which is there."""
    return next(value for value in values if value.name == name)


def rename(model: ir.Model, value: ir.Value, name: str) -> None:
    """Call a graph input or output `name`; an inner value of that name gives way."""
    if value.name == name:
        return
    for node in model.graph:
        for other in node.outputs:
            if other is not value and other.name == name:
                other.name = f"{name}_before_adoption"
    value.name = name


def vector_timestep(model: ir.Model, name: str = "timestep") -> Times:
    """Make the time a float32 (batch,) vector, whatever it was: a scalar or a vector, of floats or integers.

    Where all the graph does with a scalar is to unsqueeze it and expand it to the batch, as diffusers' UNets do, the
    vector goes where the expanded one went, and each row has its own time. Else its first element is the scalar, and
    all rows share that time.
    """
    old = value_named(model.graph.inputs, name)
    rank = 1 if old.shape is None else len(old.shape)
    expanded = _unsqueezed(old) if rank == 0 else []
    single = rank == 0 or (old.shape is not None and old.shape[0] == 1)
    new = _input(name, ir.Shape(["batch"]), ir.TensorType(ir.DataType.FLOAT))
    old.name = f"{name}_as_exported"
    ahead: list[ir.Node] = []
    given: ir.Value = new
    if old.dtype is not None and old.dtype != ir.DataType.FLOAT:
        given = _node(ahead, "Cast", [new], {"to": old.dtype.value}, type=ir.TensorType(old.dtype))
    if expanded:
        for value in expanded:
            value.replace_all_uses_with(given)
    else:
        if single:
            index = _constant(model, f"{name}_index", np.array(0 if rank == 0 else [0], np.int64))
            given = _node(ahead, "Gather", [given, index], {"axis": 0}, type=old.type)
        old.replace_all_uses_with(given)
    model.graph.inputs[model.graph.inputs.index(old)] = new
    _prepend(model, ahead)
    return "each" if expanded or not single else "one"


def join_inputs(model: ir.Model, name: str, parts: Mapping[str, int], axis: int) -> None:
    """Replace input `name` by inputs with these names and widths, joined along `axis` inside the graph."""
    old = value_named(model.graph.inputs, name)
    old.name = f"{name}_joined"
    assert old.shape is not None
    inputs = []
    for part, width in parts.items():
        shape = [width if number == axis else dim for number, dim in enumerate(old.shape)]
        inputs.append(_input(part, ir.Shape(shape), old.type))
    ahead: list[ir.Node] = []
    old.replace_all_uses_with(_node(ahead, "Concat", list(inputs), {"axis": axis}, type=old.type))
    at = model.graph.inputs.index(old)
    model.graph.inputs[at : at + 1] = inputs
    _prepend(model, ahead)


def first_channels(model: ir.Model, name: str, count: int) -> None:
    """Replace an output by its first `count` channels (axis 1), under the same name."""
    old = value_named(model.graph.outputs, name)
    old.name = f"{name}_all"
    bounds = [_constant(model, f"{name}_{what}", np.array([at], np.int64)) for what, at in _slice(count)]
    behind: list[ir.Node] = []
    new = _node(behind, "Slice", [old, *bounds], {}, type=old.type)
    _replace_output(model, old, new, name, behind)


def select_rows(model: ir.Model, name: str = "logits") -> None:
    """Give the graph an input `rows`, int64 (rows,): positions along axis 1 whose `name` is wanted.

    The rows are taken before the last matrix product where the output is made by one, so that a prompt's other rows
    cost no product with the vocabulary; else they are taken from the output.
    """
    rows = _input("rows", ir.Shape(["rows"]), ir.TensorType(ir.DataType.INT64))
    output = value_named(model.graph.outputs, name)
    head = output.producer()
    made: list[ir.Node] = []
    if head is not None and head.op_type == "MatMul" and head.inputs[0] is not None and _is_weight(head.inputs[1]):
        hidden = head.inputs[0]
        head.replace_input_with(0, _node(made, "Gather", [hidden, rows], {"axis": 1}, type=hidden.type))
        model.graph.insert_before(head, made)
    else:
        output.name = f"{name}_of_all_rows"
        new = _node(made, "Gather", [output, rows], {"axis": 1}, type=output.type)
        _replace_output(model, output, new, name, made)
    model.graph.inputs.append(rows)


def output_as_float(model: ir.Model, name: str) -> None:
    """Cast an output to float32, if it is something else."""
    output = value_named(model.graph.outputs, name)
    if output.dtype == ir.DataType.FLOAT:
        return
    output.name = f"{name}_as_exported"
    made: list[ir.Node] = []
    attributes = {"to": ir.DataType.FLOAT.value}
    new = _node(made, "Cast", [output], attributes, type=ir.TensorType(ir.DataType.FLOAT))
    new.shape = output.shape
    _replace_output(model, output, new, name, made)


def add_unused_input(model: ir.Model, spec: TensorSpec) -> None:
    """An input that the graph does not read: it knows by other means what the contract feeds."""
    kind = ir.TensorType(ELEMENTS[spec.dtype])
    model.graph.inputs.append(_input(spec.name, ir.Shape(spec.shape), kind))


def keep_outputs(model: ir.Model, names: Collection[str]) -> None:
    """Drop the other outputs, and whatever only they needed."""
    for value in [value for value in model.graph.outputs if value.name not in names]:
        model.graph.outputs.remove(value)
    common.RemoveUnusedNodesPass()(model)


def parameters(model: ir.Model) -> int:
    """Numbers in floating-point initializers, large tensors in Constant nodes included."""
    held = [value.const_value for value in model.graph.initializers.values()]
    held += [
        node.attributes["value"].value
        for node in model.graph
        if node.op_type == "Constant" and "value" in node.attributes
    ]
    return sum(tensor.size for tensor in held if tensor is not None and tensor.dtype.is_floating_point())


def write(
    model: ir.Model, shapes: Mapping[str, Sequence[int | str]], graph: Path, progress: Callable[[str, float], None]
) -> None:
    """Name the axes of inputs and outputs, forget the exporter's names for inner ones, and write graph and data.

    Args:
        model: adopted.
        shapes: of every input and output, by name.
        graph: the file to write; weights go to `graph`.data.
        progress: told "writing" and the share of it that is done.

    Raises:
        UnsupportedModel: the result is not valid ONNX, or takes bytes from where they will not be.
    """
    ends = {*model.graph.inputs, *model.graph.outputs}
    for node in model.graph:
        for value in node.outputs:
            if value not in ends:
                value.shape = None
    for value in ends:
        value.shape = ir.Shape(shapes[str(value.name)])
    common.RemoveUnusedNodesPass()(model)
    write_model(model, {}, graph, progress)
    data = f"{graph.name}.data"
    if any(external.location != data for external in read_graph(graph).external):
        raise UnsupportedModel(f"{graph.name}: a subgraph keeps weights in a file of its own, which is not adopted")
    try:
        onnx.checker.check_model(str(graph))
    except (onnx.checker.ValidationError, RuntimeError) as why:
        raise UnsupportedModel(f"{graph.name} is not valid ONNX: {why}") from why


def _unsqueezed(scalar: ir.Value) -> list[ir.Value]:
    """The values that a scalar becomes by Unsqueeze, if every way from it is Unsqueeze, Casts, Expand; else nothing."""
    found = []
    for node, _ in scalar.uses():
        if node.op_type != "Unsqueeze" or not _leads_to_expand(node.outputs[0]):
            return []
        found.append(node.outputs[0])
    return found


def _leads_to_expand(value: ir.Value) -> bool:
    users = [node for node, place in value.uses() if place == 0]
    return (
        bool(users)
        and len(users) == len(list(value.uses()))
        and all(
            node.op_type == "Expand" or (node.op_type == "Cast" and _leads_to_expand(node.outputs[0])) for node in users
        )
    )


def _is_weight(value: ir.Value | None) -> bool:
    """An initializer, or one that is transposed."""
    if value is None:
        return False
    node = value.producer()
    return value.is_initializer() or (node is not None and node.op_type == "Transpose" and _is_weight(node.inputs[0]))


def _slice(count: int) -> tuple[tuple[str, int], ...]:
    return (("starts", 0), ("ends", count), ("axes", 1))


def _input(name: str, shape: ir.Shape, type: ir.TypeProtocol | None) -> ir.Value:
    return ir.Value(name=name, shape=shape, type=type)


def _constant(model: ir.Model, name: str, value: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> ir.Value:
    made = ir.Value(name=name, shape=ir.Shape(value.shape), type=ir.TensorType(ir.DataType.INT64))
    made.const_value = ir.tensor(value, name=name)
    model.graph.register_initializer(made)
    return made


def _node(
    into: list[ir.Node],
    kind: str,
    inputs: Sequence[ir.Value],
    attributes: Mapping[str, int],
    type: ir.TypeProtocol | None,
) -> ir.Value:
    """A node with one output, which is returned."""
    names = "_".join(str(value.name) for value in inputs[:1])
    output = ir.Value(name=f"adopted_{kind}_{names}", type=type)
    into.append(ir.node(kind, inputs, dict(attributes), outputs=[output], name=f"adopted/{kind}/{names}"))
    return output


def _prepend(model: ir.Model, nodes: Sequence[ir.Node]) -> None:
    if nodes:
        model.graph.insert_before(model.graph[0], nodes)


def _replace_output(model: ir.Model, old: ir.Value, new: ir.Value, name: str, nodes: Sequence[ir.Node]) -> None:
    model.graph.extend(nodes)
    new.name = name
    model.graph.outputs[model.graph.outputs.index(old)] = new
