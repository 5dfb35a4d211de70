"""The graph that trials run in: an input for everything that a choice changes, with the plain graph as its default.

What an engine does within a product is done here around it, in floats: activations pass through an `If` that rounds
them as the choice and the engine do. Rounded numbers are those of the lowered graph; sums differ by float rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgekit.errors import BadRequest
from edgekit.quant.choices import Choice, get_choice
from edgekit.quant.graph import Unit, lazy_initializer
from edgekit.quant.targets import Target

Array = npt.NDArray[Any]
Range = tuple[float, float]
Form = Literal["override", "delta"]

FP4_BLOCK = 16
FIRST_FLOAT8 = 19  # the opset that has the type
FIRST_AXES_INPUT = 18  # the opset from which ReduceMax takes its axes as an input
TINY = 1e-30  # a scale that divides zeros
E4M3_MAX, E2M1_MAX = 448.0, 6.0


def activation_code(ends: Range, symmetric: bool) -> tuple[np.float32, np.uint8 | np.int8]:
    """Scale and zero point of 8-bit activations in a range: signed around 0 if `symmetric`, else unsigned."""
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    if symmetric:
        return np.float32(max(max(-low, high) / 127, TINY)), np.int8(0)
    scale = np.float32(max((high - low) / 255, TINY))
    return scale, np.uint8(np.clip(np.rint(-low / scale), 0, 255))


def rounding_of(choice: Choice, target: Target, op: str = "MatMul") -> str:
    """How a choice rounds what its product is fed: a row of ROUNDINGS, or "" for floats and for tables (Gather).

    ONNX Runtime's product of stored integers on a CPU rounds its inputs too, token by token, in the weights' blocks.
    """
    kind = choice.weight.kind
    if op == "Gather":
        return ""
    if choice.activation == "float":
        return f"block{choice.weight.block}" if kind == "int" and target.engine == "ort-cpu" else ""
    return {"int": choice.activation, "fp8": "fp8", "fp4": "fp4"}[kind]


def ranges_of(unit: Unit, rounding: str, target: Target) -> tuple[str, ...]:
    """The values whose ranges a rounding needs."""
    if rounding not in ("static", "fp8", "fp4"):
        return ()
    return (unit.data, unit.output) if _rounds_output(unit, target) else (unit.data,)


def input_name(index: int, what: str) -> str:
    """The input of a unit, by its place: `weight`, `delta`, `rounds` or a row of ROUNDINGS."""
    return f"trial.{index}.{what}"


def trial_model(
    model: ir.Model, units: Sequence[Unit], ranges: Mapping[str, Range], target: Target, form: Form = "delta"
) -> ir.Model:
    """A copy of a normalised graph with an input for everything that a choice changes; see the module.

    Args:
        model: a normalised graph; it is not changed.
        units: its units; inputs are named after their places here.
        ranges: (low, high) by value name. A rounding that needs one which is missing gets no gate.
        target: which choices there are, and how its engine rounds.
        form: see the module.

    Raises:
        BadRequest: 8-bit floats in a graph of an opset that has none; no such form.
    """
    if form not in get_args(Form):
        raise BadRequest(f"no trial form {form!r}; known: {', '.join(get_args(Form))}")
    trial = model.clone()
    nodes = {node.name: node for node in trial.graph}
    for index, unit in enumerate(units):
        site = _Site(trial.graph, nodes[unit.id], unit, index, ranges, target)
        site.round_data()
        if form == "delta":
            site.add_delta()
        else:
            site.open_weight()
    return trial


def _rounds_output(unit: Unit, target: Target) -> bool:
    """ONNX Runtime fuses a convolution of integers only if its result is rounded as well."""
    return unit.op == "Conv" and target.engine == "ort-cpu"


class _Site:
    """One unit's place in the graph, while it is rebuilt."""

    def __init__(
        self,
        graph: ir.Graph,
        node: ir.Node,
        unit: Unit,
        index: int,
        ranges: Mapping[str, Range],
        target: Target,
    ) -> None:
        self.graph, self.node, self.unit, self.index = graph, node, unit, index
        self.ranges, self.target = ranges, target
        self.slot = 0 if unit.op == "Gather" else 1
        weight = node.inputs[self.slot]
        assert weight is not None
        assert weight.const_value is not None
        self.weight, self.tensor = weight, weight.const_value
        roundings = {rounding_of(get_choice(name), target, unit.op) for name in target.allowed(unit)} - {""}
        self.roundings = sorted(
            each for each in roundings if all(name in ranges for name in ranges_of(unit, each, target))
        )
        if not {"fp8", "fp4"}.isdisjoint(self.roundings) and self.opset < FIRST_FLOAT8:
            raise BadRequest(f"8-bit floats need opset {FIRST_FLOAT8}, the graph has {self.opset}; export it anew")
        self.gates = {each: self._gate(each) for each in self.roundings}
        self.rounds_output = "static" in self.gates and _rounds_output(unit, target)

    @property
    def opset(self) -> int:
        return int(self.graph.opset_imports.get("", 1))

    def round_data(self) -> None:
        """Let what the product is fed through one If, and within it through one per rounding."""
        data = self.node.inputs[0]
        assert data is not None
        if not self.roundings:
            return
        name = input_name(self.index, "rounds")
        then = _Branch(f"{name}.then", self)
        value = data
        for rounding in self.roundings:
            value = then.add(self._if(rounding, "data", value))
        passed = self._choose(self._gate("rounds"), then.closed(value), _passed(f"{name}.else", self, data), name)
        self.graph.insert_before(self.node, passed)
        self.node.replace_input_with(0, passed.outputs[0])

    def open_weight(self) -> None:
        """Make the weight an input whose default it is; a tied weight becomes one for each of its units."""
        name, tensor = input_name(self.index, "weight"), self.tensor
        opened = lazy_initializer(self.graph, name, lambda: tensor.numpy(), tensor.dtype, tensor.shape)
        self.graph.inputs.append(opened)
        self.node.replace_input_with(self.slot, opened)
        if not self.weight.uses() and not self.weight.is_graph_output():
            del self.graph.initializers[str(self.weight.name)]
        if self.rounds_output:
            self._splice(lambda value: self._if("static", "output", value))

    def add_delta(self) -> None:
        """Add the product with the weight's change, and round the sum where the choice does."""
        name, rank = input_name(self.index, "weight"), len(self.tensor.shape)
        change = _input(self.graph, name, np.zeros((0,) * rank, self.tensor.dtype.numpy()), rank)
        gate = self._gate("delta")

        def sum_with_change(value: ir.Value) -> ir.Node:
            then = _Branch(f"{name}.then", self)
            inputs = list(self.node.inputs[:2])  # a bias is in the product already
            inputs[self.slot] = change
            total = then.op("Add", value, then.op(self.unit.op, *inputs, like=self.node))
            if self.rounds_output:
                total = then.add(self._if("static", "output", total))
            return self._choose(gate, then.closed(total), _passed(f"{name}.else", self, value), f"{name}.sum")

        self._splice(sum_with_change)

    def _gate(self, what: str) -> ir.Value:
        return _input(self.graph, input_name(self.index, what), np.array(False), 0)

    def _if(self, rounding: str, where: str, value: ir.Value) -> ir.Node:
        """If(gate){rounded value} else {value}."""
        name = f"{input_name(self.index, rounding)}.{where}"
        then = _Branch(f"{name}.then", self)
        ends = self.ranges.get(self.unit.data if where == "data" else self.unit.output, (0.0, 0.0))
        rounded = then.in_float(value, lambda x: ROUNDINGS[rounding](then, x, ends))
        return self._choose(self.gates[rounding], then.closed(rounded), _passed(f"{name}.else", self, value), name)

    def _choose(self, gate: ir.Value, then: ir.Graph, otherwise: ir.Graph, name: str) -> ir.Node:
        branches = [ir.AttrGraph("then_branch", then), ir.AttrGraph("else_branch", otherwise)]
        node = ir.Node("", "If", [gate], branches, name=name)
        node.outputs[0].name, node.outputs[0].type = f"{name}.value", ir.TensorType(self.tensor.dtype)
        return node

    def _splice(self, make: Callable[[ir.Value], ir.Node]) -> None:
        """Put a node behind the product: all who read the product read it from then on, under the product's name."""
        value = self.node.outputs[0]
        uses = tuple(value.uses())
        added = make(value)
        self.graph.insert_after(self.node, added)
        result = added.outputs[0]
        for user, place in uses:
            user.replace_input_with(place, result)
        result.shape, result.type, name = value.shape, value.type, value.name
        if value.is_graph_output():
            self.graph.outputs[list(self.graph.outputs).index(value)] = result
        value.name, result.name = f"{name}.plain", name


class _Branch:
    """The nodes of one branch of an If, under names that the whole file has once."""

    def __init__(self, prefix: str, site: _Site) -> None:
        self.prefix, self.site, self.nodes = prefix, site, list[ir.Node]()

    def op(self, kind: str, *inputs: ir.Value | None, like: ir.Node | None = None, **attributes: Any) -> ir.Value:
        """A node's value; `like` lends its attributes."""
        name = f"{self.prefix}.{len(self.nodes)}"
        copied = list(like.attributes.values()) if like else []
        given = [*copied, *ir.convenience.convert_attributes(attributes)]
        node = ir.Node("", kind, inputs, given, name=name)
        node.outputs[0].name = f"{name}.value"
        self.nodes.append(node)
        return node.outputs[0]

    def add(self, node: ir.Node) -> ir.Value:
        """A node made elsewhere; its value."""
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, array: Any) -> ir.Value:
        """A number."""
        return self.op("Constant", value=ir.tensor(np.asarray(array)))

    def number(self, value: float) -> ir.Value:
        """A float."""
        return self.constant(np.float32(value))

    def peak(self, x: ir.Value) -> ir.Value:
        """max|x| over the last axis, which stays."""
        size = self.op("Abs", x)
        if self.site.opset < FIRST_AXES_INPUT:
            return self.op("ReduceMax", size, axes=[-1], keepdims=1)
        return self.op("ReduceMax", size, self.constant(np.array([-1])), keepdims=1)

    def clipped(self, x: ir.Value, reach: float) -> ir.Value:
        """To [-reach, reach]."""
        return self.op("Min", self.op("Max", x, self.number(-reach)), self.number(reach))

    def in_blocks(self, x: ir.Value, size: int, make: Callable[[ir.Value], ir.Value]) -> ir.Value:
        """Change blocks (., size) of the last axis, which is k long; the last of them is padded with zeros."""
        k = self.site.unit.k
        short = -k % size
        blocks = self.op("Reshape", x, self.constant(np.array([-1, k])))
        if short:
            blocks = self.op("Pad", blocks, self.constant(np.array([0, 0, 0, short])))
        changed = make(self.op("Reshape", blocks, self.constant(np.array([-1, size]))))
        if short:
            ends = [self.constant(np.array([at])) for at in (0, k, 1)]
            changed = self.op("Slice", self.op("Reshape", changed, self.constant(np.array([-1, k + short]))), *ends)
        return self.op("Reshape", changed, self.op("Shape", x))

    def in_float(self, x: ir.Value, make: Callable[[ir.Value], ir.Value]) -> ir.Value:
        """Compute in float32, whatever type the graph has."""
        dtype = self.site.tensor.dtype
        if dtype == ir.DataType.FLOAT:
            return make(x)
        return self.op("Cast", make(self.op("Cast", x, to=int(ir.DataType.FLOAT))), to=int(dtype))

    def closed(self, result: ir.Value) -> ir.Graph:
        """The branch, with its result."""
        result.type = ir.TensorType(self.site.tensor.dtype)
        return ir.Graph([], [result], nodes=self.nodes, name=self.prefix)


def _passed(name: str, site: _Site, value: ir.Value) -> ir.Graph:
    """The branch that changes nothing."""
    branch = _Branch(name, site)
    return branch.closed(branch.op("Identity", value))


def _input(graph: ir.Graph, name: str, default: Array, rank: int) -> ir.Value:
    """An input that need not be fed."""
    tensor = ir.tensor(default, name=name)
    shape = ir.Shape([f"{name}.{axis}" for axis in range(rank)])
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    graph.initializers[name] = value
    graph.inputs.append(value)
    return value


def _static(branch: _Branch, x: ir.Value, ends: Range) -> ir.Value:
    """8-bit integers, one scale measured beforehand."""
    given = [branch.constant(each) for each in activation_code(ends, branch.site.target.symmetric)]
    return branch.op("DequantizeLinear", branch.op("QuantizeLinear", x, *given), *given)


def _row(branch: _Branch, x: ir.Value, _: Range) -> ir.Value:
    """Signed 8-bit integers, one scale per row, taken from it."""
    scale = branch.op("Max", branch.op("Mul", branch.peak(x), branch.number(1 / 127)), branch.number(TINY))
    return branch.op("Mul", branch.op("Round", branch.op("Div", x, scale)), scale)


def _block(size: int) -> Callable[[_Branch, ir.Value, Range], ir.Value]:
    """Signed 8-bit integers, one scale per `size` inputs of a token."""

    def rounded(branch: _Branch, x: ir.Value, ends: Range) -> ir.Value:
        return branch.in_blocks(x, size, lambda blocks: _row(branch, blocks, ends))

    return rounded


def _fp8(branch: _Branch, x: ir.Value, ends: Range) -> ir.Value:
    """E4M3, one scale measured beforehand; what lies outside goes to the largest number."""
    scale = branch.number(max(max(-ends[0], ends[1]) / E4M3_MAX, TINY))
    return branch.op("Mul", _e4m3(branch, branch.op("Div", x, scale)), scale)


def _fp4(branch: _Branch, x: ir.Value, ends: Range) -> ir.Value:
    """E2M1 in blocks of 16 with an E4M3 scale taken as it runs, and one scale for all measured beforehand."""
    whole = branch.number(max(max(-ends[0], ends[1]) / (E4M3_MAX * E2M1_MAX), TINY))

    def rounded(blocks: ir.Value) -> ir.Value:
        relative = branch.op("Div", branch.op("Div", branch.peak(blocks), whole), branch.number(E2M1_MAX))
        scale = branch.op("Max", branch.op("Mul", _e4m3(branch, relative), whole), branch.number(TINY))
        return branch.op("Mul", _e2m1(branch, branch.op("Div", blocks, scale)), scale)

    return branch.in_blocks(x, FP4_BLOCK, rounded)


def _e2m1(branch: _Branch, x: ir.Value) -> ir.Value:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives: one mantissa bit, so steps of 0.5, 1 and 2."""
    clipped = branch.clipped(x, E2M1_MAX)
    size = branch.op("Abs", clipped)
    from_2, from_4 = (branch.op("Cast", branch.op("GreaterOrEqual", size, branch.number(end)), to=1) for end in (2, 4))
    step = branch.op("Sum", branch.number(0.5), branch.op("Mul", from_2, branch.number(0.5)), from_4)
    return branch.op("Mul", branch.op("Round", branch.op("Div", clipped, step)), step)


def _e4m3(branch: _Branch, x: ir.Value) -> ir.Value:
    narrow = branch.op("Cast", branch.clipped(x, E4M3_MAX), to=int(ir.DataType.FLOAT8E4M3FN))
    return branch.op("Cast", narrow, to=int(ir.DataType.FLOAT))


ROUNDINGS: dict[str, Callable[[_Branch, ir.Value, Range], ir.Value]] = {
    "static": _static,
    "row": _row,
    "block32": _block(32),
    "block64": _block(64),
    "block128": _block(128),
    "fp8": _fp8,
    "fp4": _fp4,
}
