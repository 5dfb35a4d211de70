"""What lowerings share: what they refuse, weights that are stored only when written, and how nodes are exchanged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgekit.errors import BadRequest
from edgekit.quant.choices import Choice
from edgekit.quant.graph import F32, Unit, initializer, lazy_initializer, to_matrix
from edgekit.quant.targets import Target
from edgekit.quant.weights import Stored, pack_zeros, store

Array = npt.NDArray[Any]
Ranges = Mapping[str, tuple[float, float]]
Store = Callable[[F32, Choice, int, Unit], Stored]  # matrix (n, k), choice, bits of a code, whose weights

FLOAT16_MAX = float(np.finfo(np.float16).max)


def rtn_store(matrix: F32, choice: Choice, code_bits: int, unit: Unit) -> Stored:  # noqa: ARG001
    """Round to nearest, whatever the unit."""
    return store(matrix, choice, code_bits=code_bits)


def checked(
    units: Sequence[Unit],
    choices: Mapping[str, str],
    ranges: Ranges,
    target: Target,
    ranged: Callable[[Unit, Choice], Sequence[str]],
) -> list[tuple[Unit, Choice]]:
    """The units that have a choice, in the order of `units`.

    Args:
        units, choices, ranges, target: as given to `lower`.
        ranged: names of the values whose range the engine needs for one unit's choice.

    Raises:
        BadRequest: a unit that is not there, a choice that the target does not allow it, or a range that is missing,
            not finite or upside down.
    """
    if unknown := sorted(choices.keys() - {unit.id for unit in units}):
        raise BadRequest(f"the graph has no unit {', '.join(map(repr, unknown))}; make the plan again for this graph")
    work = [(unit, target.choice(choices[unit.id])) for unit in units if unit.id in choices]
    for unit, choice in work:
        allowed = target.allowed(unit)
        if choice.name not in allowed:
            raise BadRequest(
                f"unit {unit.id!r} ({unit.op}, {unit.role}) cannot be {choice.name} on {target.name}; "
                f"it may be {', '.join(allowed)}"
            )
        for name in ranged(unit, choice):
            _check_range(ranges, name, unit, choice)
    return work


def _check_range(ranges: Ranges, name: str, unit: Unit, choice: Choice) -> None:
    if name not in ranges:
        raise BadRequest(f"unit {unit.id!r} is to be {choice.name} and value {name!r} has no range; calibrate it")
    low, high = ranges[name]
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise BadRequest(f"value {name!r} of unit {unit.id!r} has the range ({low}, {high}); calibrate it again")


class StoredWeight:
    """A unit's weights as its choice stores them, made when asked for.

    Codes are made anew each time, so that at most one matrix is in memory; scales and zero points are kept once they
    were made. Writing a graph asks for initializers in the order of their registration: codes before scales makes each
    matrix once.
    """

    def __init__(self, model: ir.Model, unit: Unit, choice: Choice, code_bits: int, store: Store) -> None:
        self.unit = unit
        self.format = choice.weight
        self.blocks = choice.weight.blocks(unit.k)
        tensor = initializer(model, unit.weight)
        self._scales: F32 | None = None
        self._zeros: npt.NDArray[np.uint8] | None = None

        def make() -> Stored:
            return store(to_matrix(tensor.numpy(), unit), choice, code_bits, unit)

        self._make = make

    def stored(self) -> Stored:
        """Round the matrix."""
        stored = self._make()
        self._scales, self._zeros = stored.scales, pack_zeros(stored)
        return stored

    def scales(self) -> F32:
        """(n, blocks), float32."""
        if self._scales is None:
            self.stored()
        assert self._scales is not None
        return self._scales

    def zeros(self) -> npt.NDArray[np.uint8]:
        """Packed zero points, for a format that has them."""
        if self._zeros is None:
            self.stored()
        assert self._zeros is not None
        return self._zeros


def stored_name(unit: Unit) -> str:
    """What a unit's codes are called: the same for all that were one matrix before normalising, and so are now.

    A square matrix may be read as it is by one and turned by another, so there only equal names count.
    """
    return unit.weight if unit.n == unit.k else unit.origin or unit.weight


def half_initializer(model: ir.Model, unit: Unit) -> ir.Value:
    """A unit's weights as float16, in their own shape; one initializer for all units that share them.

    Writing it raises BadRequest where a weight is beyond float16's reach.
    """
    name = f"{unit.weight}.fp16"
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    tensor = initializer(model, unit.weight)

    def make() -> Array:
        weight = tensor.numpy()
        reach = max(float(weight.max()), -float(weight.min()))
        if not reach <= FLOAT16_MAX:
            raise BadRequest(
                f"unit {unit.id!r} has a weight of size {reach:.3g}; fp16 ends at 65504. Choose fp32 for it."
            )
        half: Array = weight.astype(np.float16)
        return half

    return lazy_initializer(model.graph, name, make, ir.DataType.FLOAT16, tensor.shape)


def constant(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """A small initializer, one per name."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        graph.initializers[name] = value
    return graph.initializers[name]


def make_node(
    op: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    like: ir.Value,
    *,
    dtype: ir.DataType = ir.DataType.FLOAT,
    domain: str = "",
    **attributes: Any,
) -> ir.Node:
    """A node of one output, called `name` as the node is, with the shape of `like`."""
    node = ir.node(op, inputs, attributes, domain=domain, name=name)
    output = node.outputs[0]
    output.name, output.shape, output.type = name, like.shape, ir.TensorType(dtype)
    return node


def insert_behind(graph: ir.Graph, value: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Put nodes where `value` exists and nothing has read it yet."""
    maker = value.producer()
    if maker is not None:
        graph.insert_after(maker, nodes)
    else:
        graph.insert_before(graph[0], nodes)


def exchange(graph: ir.Graph, old: Sequence[ir.Node], new: Sequence[ir.Node]) -> None:
    """Put `new` where the first of `old` was; the last of `new` gives what the last of `old` gave, by the same name."""
    before, after = old[-1].outputs[0], new[-1].outputs[0]
    dtype = after.type
    ir.convenience.replace_nodes_and_values(graph, old[0], old, new, [before], [after])
    after.type = before.type or dtype


def redirect(graph: ir.Graph, value: ir.Value, new: ir.Value, but: ir.Node) -> None:
    """Let everything that reads `value`, except the node `but`, read `new`. A graph output keeps its name."""
    for node, index in list(value.uses()):
        if node is not but:
            node.replace_input_with(index, new)
    for index, output in enumerate(graph.outputs):
        if output is value:
            name = value.name
            value.name = f"{name}.float"
            new.name, new.shape, new.type = name, value.shape, value.type
            graph.outputs[index] = new


def bias_behind(node: ir.Node, n: int) -> tuple[ir.Node, ir.Value] | None:
    """The Add of an (n,) float32 initializer that alone reads a product, and the initializer."""
    output = node.outputs[0]
    uses = list(output.uses())
    if len(uses) != 1 or output.is_graph_output() or uses[0][0].op_type != "Add":
        return None
    add, index = uses[0]
    bias = add.inputs[1 - index]
    if bias is None or not bias.is_initializer() or bias.const_value is None:
        return None
    fits = tuple(bias.const_value.shape) == (n,) and bias.const_value.dtype == ir.DataType.FLOAT
    return (add, bias) if fits and add.graph is node.graph else None
