"""ONNX Runtime on a CPU (rules measured with 1.32; edgekit.quant.fused checks that they held).

    Conv w8a8       Q/DQ of uint8 around it, int8 weights per output, int32 bias: all of it becomes one QLinearConv.
                    With the input alone rounded nothing is fused and it is slower than float32.
    MatMul w8a8     MatMulIntegerToFloat written as such: it takes the bias too, which the engine's own fusion leaves as
                    an Add. Its output stays float.
    MatMul w8a8-row the same, with one activation scale per token, taken as it runs.
    wXa16           MatMulNBits at accuracy level 4, which rounds activations to int8 within the product. Scales are
                    stored as float16; the Cast that it needs is folded when the graph is opened.
    table wXa16     GatherBlockQuantized, which widens the rows that are asked for. A product that shares the table's
                    weights reads the same codes.
    fp16            storage alone: a Cast of weights is folded when the graph is opened, a table's comes after Gather.

Activations are uint8 with a zero point: signed ones are 17 times slower here. A value is rounded once for all its
readers; Conv outputs are read rounded by everyone, since only the rounded ones exist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgekit.errors import BadRequest
from edgekit.quant.choices import Choice
from edgekit.quant.graph import F32, Unit, initializer, lazy_initializer
from edgekit.quant.lower.channel_weight import ChannelWeight
from edgekit.quant.lower.common import (
    Array,
    Ranges,
    Store,
    StoredWeight,
    bias_behind,
    checked,
    constant,
    exchange,
    half_initializer,
    insert_behind,
    make_node,
    redirect,
    stored_name,
)
from edgekit.quant.lower.tables import for_each, rows_of
from edgekit.quant.targets import Target
from edgekit.quant.weights import pack_nbits

MICROSOFT = "com.microsoft"
LEVELS = 255
MIDDLE = 128  # the code of zero, where a token has its own scale
REACH = 127
INT8_ROUNDING = 4  # MatMulNBits' accuracy level
PER_AXIS_OPSET = 13  # first with per-output scales
AXES_OPSET = 18  # first whose ReduceMax takes its axes as an input
BLOCK_OPSET = 21  # first whose QuantizeLinear takes a scale per token


def lower(
    model: ir.Model,
    units: Sequence[Unit],
    choices: Mapping[str, str],
    ranges: Ranges,
    target: Target,
    store: Store,
) -> None:
    """See `edgekit.quant.lower.lower`."""
    work = checked(units, choices, ranges, target, _ranged)
    _check_graph(model, work)
    _Lowering(model, ranges, target, store).run(work)


def _ranged(unit: Unit, choice: Choice) -> tuple[str, ...]:
    if choice.activation != "static":
        return ()
    return (unit.data, unit.output) if unit.op == "Conv" else (unit.data,)


def _check_graph(model: ir.Model, work: Sequence[tuple[Unit, Choice]]) -> None:
    opset = model.opset_imports.get("", 0)
    nodes = {node.name: node for node in model.graph}
    for unit, choice in work:
        if choice.is_float:
            continue
        if opset < PER_AXIS_OPSET:
            raise BadRequest(
                f"the graph has opset {opset}; integers need {PER_AXIS_OPSET}, so export it with a later one"
            )
        dtype = initializer(model, unit.weight).dtype
        if dtype != ir.DataType.FLOAT:
            raise BadRequest(f"unit {unit.id!r} has weights of {dtype}; integers are lowered from a float32 graph")
        bias = nodes[unit.id].inputs[2] if len(nodes[unit.id].inputs) > 2 else None
        if bias is not None and not bias.is_initializer():
            raise BadRequest(f"unit {unit.id!r} has a bias that is computed; {choice.name} needs a stored one")


@dataclass(frozen=True)
class _Rounded:
    """A value as uint8 codes and what they mean."""

    codes: ir.Value
    meant: ir.Value
    scale: ir.Value
    zero: ir.Value
    step: float


class _Lowering:
    """One pass over one graph, with what its units share."""

    def __init__(self, model: ir.Model, ranges: Ranges, target: Target, store: Store) -> None:
        self.model = model
        self.graph = model.graph
        self.ranges = dict(ranges)
        self.target = target
        self.store = store
        self.nodes = {str(node.name): node for node in model.graph}
        self.rounded: dict[str, _Rounded] = {}  # by name in the graph as it came
        self.tokens: dict[str, tuple[ir.Value, ir.Value]] = {}
        self.widened: dict[str, ir.Value] = {}  # a float16 weight as float32, by its name

    def run(self, work: Sequence[tuple[Unit, Choice]]) -> None:
        """Lower every unit."""
        for unit, choice in work:
            node = self.nodes[unit.id]
            if choice.is_float:
                if choice.name == "fp16":
                    self._half(node, unit)
            elif unit.op == "Gather":
                self._table(node, unit, choice)
            elif choice.activation == "float":
                self._nbits(node, unit, choice)
            elif choice.activation == "row":
                self._row_product(node, unit, choice)
            elif unit.op == "Conv":
                self._conv(node, unit, choice)
            else:
                self._product(node, unit, choice)
        if any(node.domain == MICROSOFT for node in self.graph):
            self.model.opset_imports.setdefault(MICROSOFT, 1)
        RemoveUnusedNodesPass()(self.model)

    # floats

    def _half(self, node: ir.Node, unit: Unit) -> None:
        if initializer(self.model, unit.weight).dtype != ir.DataType.FLOAT:
            return  # it is narrow already
        half = half_initializer(self.model, unit)
        if unit.op == "Gather":  # widening what was gathered keeps the table narrow in memory as well
            output = node.outputs[0]
            gather = make_node("Gather", [half, node.inputs[1]], f"{unit.id}.fp16", output, dtype=ir.DataType.FLOAT16)
            for key, attribute in node.attributes.items():
                gather.attributes[key] = attribute
            exchange(self.graph, [node], [gather, _cast(gather.outputs[0], unit.id)])
            return
        if unit.weight not in self.widened:
            cast = _cast(half, f"{unit.weight}.float")
            self.graph.insert_before(self.graph[0], [cast])
            self.widened[unit.weight] = cast.outputs[0]
        node.replace_input_with(1, self.widened[unit.weight])

    # integers, the activation's range known

    def _conv(self, node: ir.Node, unit: Unit, choice: Choice) -> None:
        data = self._round(unit.data, node.inputs[0])
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        weight = self._channel_weight(unit, choice, bias, data.step)
        node.replace_input_with(0, data.meant)
        node.replace_input_with(1, weight[0])
        if bias is not None:
            node.replace_input_with(2, weight[1])
        output, name = node.outputs[0], unit.output
        reader = _only_reader(output)
        if reader is not None and reader.op_type == "Relu":  # becomes the lower end of the range
            output = reader.outputs[0]
            name = str(output.name)
            self.ranges.setdefault(name, (0.0, max(self.ranges[unit.output][1], 0.0)))
        rounded = self._round(name, output)
        redirect(self.graph, output, rounded.meant, but=rounded.codes.producer())

    def _product(self, node: ir.Node, unit: Unit, choice: Choice) -> None:
        data = self._round(unit.data, node.inputs[0])
        codes, scales = self._column_weight(unit, choice)
        inputs = [data.codes, codes, data.scale, scales, data.zero, None]
        self._exchange_product(node, unit, "MatMulIntegerToFloat", inputs)

    def _round(self, name: str, value: ir.Value | None) -> _Rounded:
        """`value` to the nearest of 256 numbers, one of which is 0; made once for each name."""
        if name in self.rounded:
            return self.rounded[name]
        assert value is not None
        low, high = min(self.ranges[name][0], 0.0), max(self.ranges[name][1], 0.0)
        step = np.float32((high - low) / LEVELS) or np.float32(1)
        middle = np.uint8(np.clip(np.round(-low / step), 0, LEVELS))
        scale = constant(self.graph, f"{name}.u8.scale", np.array(step, np.float32))
        zero = constant(self.graph, f"{name}.u8.zero", np.array(middle, np.uint8))
        narrow = make_node("QuantizeLinear", [value, scale, zero], f"{name}.u8", value, dtype=ir.DataType.UINT8)
        codes = narrow.outputs[0]
        widen = make_node("DequantizeLinear", [codes, scale, zero], f"{name}.u8.meant", value)
        insert_behind(self.graph, value, [narrow, widen])
        self.rounded[name] = _Rounded(codes, widen.outputs[0], scale, zero, float(step))
        return self.rounded[name]

    # integers, one scale per token

    def _row_product(self, node: ir.Node, unit: Unit, choice: Choice) -> None:
        """The integer product, one scale per output within it and one per token after it."""
        codes, scales = self._tokens_of(unit.data, node.inputs[0], unit.k)
        weights, weight_scales = self._column_weight(unit, choice)
        one = constant(self.graph, "quant.one", np.array(1, np.float32))
        middle = constant(self.graph, "quant.middle", np.array(MIDDLE, np.uint8))
        output = node.outputs[0]
        product = make_node(
            "MatMulIntegerToFloat", [codes, weights, one, weight_scales, middle], unit.id, output, domain=MICROSOFT
        )
        product.outputs[0].name = f"{unit.output}.codes"
        scaled = make_node("Mul", [product.outputs[0], scales], f"{unit.id}.tokens", output)
        exchange(self.graph, [node], [product, scaled])

    def _tokens_of(self, name: str, value: ir.Value | None, k: int) -> tuple[ir.Value, ir.Value]:
        """Codes around 128 and each token's scale, its largest magnitude over 127: no token changes another's numbers.

        A token of zeros has scale 0, and whatever its codes, comes out as zeros.
        """
        if name in self.tokens:
            return self.tokens[name]
        assert value is not None
        rows = ir.Value(name="", shape=_with_last(value.shape, 1))
        size = make_node("Abs", [value], f"{name}.size", value)
        peak = self._peak(f"{name}.peak", size.outputs[0], rows)
        step = constant(self.graph, "quant.step", np.array(1 / REACH, np.float32))
        scale = make_node("Mul", [peak.outputs[0], step], f"{name}.tokens", rows)
        narrow = self._narrow(name, value, scale.outputs[0], k)
        insert_behind(self.graph, value, [size, peak, scale, *narrow])
        self.tokens[name] = (narrow[-1].outputs[0], scale.outputs[0])
        return self.tokens[name]

    def _peak(self, name: str, value: ir.Value, like: ir.Value) -> ir.Node:
        if self.model.opset_imports[""] < AXES_OPSET:
            return make_node("ReduceMax", [value], name, like, axes=[-1], keepdims=1)
        last = constant(self.graph, "quant.last", np.array([-1], np.int64))
        return make_node("ReduceMax", [value, last], name, like, keepdims=1)

    def _narrow(self, name: str, value: ir.Value, scale: ir.Value, k: int) -> list[ir.Node]:
        """Codes by a scale per token: in one node, or by a division where the opset has no scales per block."""
        output = {"name": f"{name}.token_codes", "like": value, "dtype": ir.DataType.UINT8}
        if self.model.opset_imports[""] < BLOCK_OPSET:
            one = constant(self.graph, "quant.one", np.array(1, np.float32))
            middle = constant(self.graph, "quant.middle", np.array(MIDDLE, np.uint8))
            ratio = make_node("Div", [value, scale], f"{name}.ratio", value)
            return [ratio, make_node("QuantizeLinear", [ratio.outputs[0], one, middle], **output)]
        shape = make_node("Shape", [scale], f"{name}.rows", ir.Value(name=""), dtype=ir.DataType.INT64)
        middle = ir.tensor(np.array([MIDDLE], np.uint8))
        zeros = make_node(
            "ConstantOfShape", [shape.outputs[0]], f"{name}.middles", scale, dtype=ir.DataType.UINT8, value=middle
        )
        inputs = [value, scale, zeros.outputs[0]]
        return [shape, zeros, make_node("QuantizeLinear", inputs, **output, axis=-1, block_size=k)]

    # weights alone

    def _nbits(self, node: ir.Node, unit: Unit, choice: Choice) -> None:
        """MatMulNBits; a K that is no multiple of the block is padded in what is stored."""
        form = choice.weight
        codes, scales, *zeros = self._block_weight(unit, choice)
        attributes = {"K": unit.k, "N": unit.n, "bits": form.bits, "block_size": form.block}
        inputs = [node.inputs[0], codes, scales, zeros[0] if zeros else None, None]
        self._exchange_product(node, unit, "MatMulNBits", inputs, accuracy_level=INT8_ROUNDING, **attributes)

    def _table(self, node: ir.Node, unit: Unit, choice: Choice) -> None:
        """GatherBlockQuantized of codes (n, blocks, bytes), as MatMulNBits has them: one copy serves both."""
        form, (codes, scales, *zeros) = choice.weight, self._block_weight(unit, choice)
        output, ids, count = node.outputs[0], node.inputs[1], form.blocks(unit.k)
        attributes = {"bits": form.bits, "block_size": form.block, "gather_axis": 0, "quantize_axis": 2}
        inputs = [codes, ids]
        for stored, bits in [(scales, 0), *((packed, form.bits) for packed in zeros)]:
            name = f"{stored.name}.each"
            if name not in self.widened:
                self.widened[name] = for_each(self.graph, stored, count, bits)
            inputs.append(self.widened[name])
        blocks = make_node("GatherBlockQuantized", inputs, unit.id, ir.Value(name=""), domain=MICROSOFT, **attributes)
        blocks.outputs[0].name = f"{unit.id}.blocks"
        made = [blocks, *rows_of(self.graph, blocks.outputs[0], ids, unit, count * form.block, output)]
        exchange(self.graph, [node], made)

    def _exchange_product(
        self, node: ir.Node, unit: Unit, op: str, inputs: list[ir.Value | None], **attributes: int
    ) -> None:
        """Put a product of `inputs` in a MatMul's place, and in that of the bias behind it."""
        found = bias_behind(node, unit.n)
        old = [node] if found is None else [node, found[0]]
        inputs.append(None if found is None else found[1])
        while inputs[-1] is None:
            inputs.pop()
        product = make_node(op, inputs, unit.id, node.outputs[0], domain=MICROSOFT, **attributes)
        exchange(self.graph, old, [product])

    # how weights are stored

    def _weight(self, unit: Unit, choice: Choice) -> StoredWeight:
        return StoredWeight(self.model, unit, choice, self.target.code_bits, self.store)

    def _channel_weight(self, unit: Unit, choice: Choice, bias: ir.Value | None, step: float) -> list[ir.Value]:
        """A convolution's weights and its bias, each as what DequantizeLinear makes of its codes."""
        shape = tuple(initializer(self.model, unit.weight).shape)
        made = ChannelWeight(self._weight(unit, choice), None if bias is None else bias.const_value, step)
        name = f"{unit.id}.weight"
        codes = self._lazy(f"{name}.codes", lambda: made.codes().reshape(shape), "INT8", *shape)
        scales = self._lazy(f"{name}.scales", made.scales, "FLOAT", unit.n)
        nodes = [make_node("DequantizeLinear", [codes, scales], name, codes, axis=0)]
        if bias is not None:
            name = f"{unit.id}.bias"
            codes = self._lazy(f"{name}.codes", made.bias, "INT32", unit.n)
            scales = self._lazy(f"{name}.scales", made.bias_scales, "FLOAT", unit.n)
            nodes.append(make_node("DequantizeLinear", [codes, scales], name, codes, axis=0))
        self.graph.insert_before(self.graph[0], nodes)
        return [node.outputs[0] for node in nodes]

    def _column_weight(self, unit: Unit, choice: Choice) -> tuple[ir.Value, ...]:
        """int8 (k, n) and float32 (n,); the same for all units that share the weight."""
        weight, name = self._weight(unit, choice), f"{unit.weight}.{choice.name}"
        codes = self._lazy(f"{name}.codes", lambda: weight.stored().codes.T, "INT8", unit.k, unit.n)
        return codes, self._lazy(f"{name}.scales", lambda: weight.scales()[:, 0], "FLOAT", unit.n)

    def _block_weight(self, unit: Unit, choice: Choice) -> tuple[ir.Value, ...]:
        """uint8 (n, blocks, bytes), float32 (n, blocks), and uint8 zero points where the format has them."""
        weight, name, form = self._weight(unit, choice), f"{stored_name(unit)}.{choice.name}", choice.weight
        size = (unit.n, weight.blocks, form.block * form.bits // 8)
        codes = self._lazy(f"{name}.codes", lambda: pack_nbits(weight.stored()), "UINT8", *size)
        scales = self._widened(f"{name}.scales", weight.scales, unit.n, weight.blocks)
        if not form.zero:
            return codes, scales
        width = -(-weight.blocks * form.bits // 8)
        zeros = self._lazy(f"{name}.zeros", weight.zeros, "UINT8", unit.n, width)
        return codes, scales, zeros

    def _widened(self, name: str, make: Callable[[], F32], *shape: int) -> ir.Value:
        """Numbers stored as float16, read as float32."""
        if name not in self.widened:
            half = self._lazy(name, lambda: make().astype(np.float16), "FLOAT16", *shape)
            cast = _cast(half, f"{name}.float")
            self.graph.insert_before(self.graph[0], [cast])
            self.widened[name] = cast.outputs[0]
        return self.widened[name]

    def _lazy(self, name: str, make: Callable[[], Array], dtype: str, *shape: int) -> ir.Value:
        """An initializer that is computed when it is written, one per name."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        return lazy_initializer(self.graph, name, lambda: np.ascontiguousarray(make()), ir.DataType[dtype], shape)


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None


def _cast(value: ir.Value, name: str) -> ir.Node:
    return make_node("Cast", [value], name, value, to=int(ir.DataType.FLOAT))


def _with_last(shape: ir.Shape | None, size: int) -> ir.Shape | None:
    return None if shape is None else ir.Shape([*shape[:-1], size])
