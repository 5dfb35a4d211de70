"""TensorRT 10, 11 and TensorRT-RTX, strongly typed: the types in the graph are the plan, the builder adds none.

    fp32, fp16, bf16  a product of that type between Casts; see `typed`. An Attention that such a product feeds takes
                      the type too: TensorRT-RTX 1.7 does not build one with Casts at some of its inputs.
    w8a8              Q/DQ of int8 on the input, one scale; int8 weights, one scale per output
    w4a16             int4 weights in blocks along K, straight into a MatMul of floats
    fp8               Q/DQ of E4M3 on the input and E4M3 weights, one scale each; compute capability 8.9
    nvfp4             E2M1 weights and activations in blocks of 16 with E4M3 scales, and one float scale each; 10.0

The rules ("Working with Quantized Types" in TensorRT's documentation) are the reverse of ONNX Runtime's: every zero
point is 0, inputs are rounded and outputs are not, a bias stays float, and a residual that is added to an int8
convolution is rounded too, so that the addition happens inside it. Scales must be above 0, so 4-bit codes are stored
with positive ones, and a block must divide K. nvfp4's block scales of activations are taken as it runs, by an operator
that only TensorRT knows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgekit.errors import BadRequest
from edgekit.quant.choices import Choice, get_choice
from edgekit.quant.graph import F32, Unit, from_matrix, initializer
from edgekit.quant.lower.common import Ranges, Store, StoredWeight, checked, constant, insert_behind, make_node
from edgekit.quant.lower.typed import (
    FLOAT_TYPES,
    cancel_casts,
    cast_back,
    cast_of,
    check_typed,
    lazy_once,
    product_type,
    retype,
)
from edgekit.quant.targets import Target
from edgekit.quant.weights import E2M1_MAX, E4M3_MAX

Array = npt.NDArray[Any]

TRT = "trt"  # the domain of TensorRT's own operators
INT8_MAX = 127
OPSETS = {"w8a8": 13, "fp8": 19, "w4a16-64": 21, "w4a16-128": 21, "nvfp4": 23}  # the first that can spell it
HALF_SCALES_OPSET = 19  # first whose scales may be float16 or bfloat16
CODE_TYPES = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}
REACHES = {"int8": float(INT8_MAX), "fp8": float(E4M3_MAX), "fp4": float(E4M3_MAX * E2M1_MAX)}


def lower(
    model: ir.Model,
    units: Sequence[Unit],
    choices: Mapping[str, str],
    ranges: Ranges,
    target: Target,
    store: Store,
) -> None:
    """See `edgekit.quant.lower.lower`. `ranges` may also name `residuals`; those that it does not stay float.

    Raises:
        BadRequest: also an opset before the choice's, a block that does not divide K, or activations of nvfp4 that are
            not (m, k) or (b, m, k).
    """
    work = checked(units, choices, ranges, target, _ranged)
    nodes = {str(node.name): node for node in model.graph}
    for unit, choice in work:
        _check(model, nodes[unit.id], unit, choice, ranges)
    added = _residuals(nodes, work)
    writer = _Writer(model, ranges, target, store)
    for unit, choice in work:
        if choice.name in FLOAT_TYPES:
            retype(model, nodes[unit.id], unit, choice.name)
        else:
            writer.write(nodes[unit.id], unit, choice)
    for add, index in added:
        value = add.inputs[index]
        if value is not None and value.name in ranges:
            add.replace_input_with(index, writer.rounded(value, str(value.name), "int8"))
    _narrow_attention(model.graph)
    cancel_casts(model.graph)
    RemoveUnusedNodesPass()(model)


def residuals(model: ir.Model, units: Sequence[Unit], choices: Mapping[str, str]) -> tuple[str, ...]:
    """The values that are added to an int8 convolution: calibrate these as well, and `lower` rounds them."""
    nodes = {str(node.name): node for node in model.graph}
    work = [(unit, get_choice(choices[unit.id])) for unit in units if unit.id in choices]
    values = (add.inputs[index] for add, index in _residuals(nodes, work))
    return tuple(dict.fromkeys(str(value.name) for value in values if value is not None))


def _residuals(nodes: Mapping[str, ir.Node], work: Sequence[tuple[Unit, Choice]]) -> list[tuple[ir.Node, int]]:
    """Adds of an int8 convolution's output that nothing else reads, and the input that holds the other term.

    Of two convolutions that meet the later one takes the Add in, so the earlier one's output is the other term.
    """
    found: dict[str, tuple[ir.Node, int]] = {}
    for unit, choice in work:
        if unit.op != "Conv" or choice.name != "w8a8":
            continue
        output = nodes[unit.id].outputs[0]
        uses = list(output.uses())
        if len(uses) != 1 or output.is_graph_output() or uses[0][0].op_type != "Add":
            continue
        add, index = uses[0]
        other = add.inputs[1 - index]
        if other is not None and not other.is_initializer():
            found[str(add.name)] = (add, 1 - index)
    return list(found.values())


def _narrow_attention(graph: ir.Graph) -> None:
    """Run an Attention in the float type in which a projection was made for it; bfloat16 where both types meet.

    One that keeps a cache keeps its type: the cache is an input of the graph.
    """
    for node in list(graph):
        if node.op_type != "Attention" or len(node.outputs) > 1:
            continue
        narrow = {found for value in node.inputs[:3] if (found := _narrow_source(value)) is not None}
        if not narrow:
            continue
        dtype = ir.DataType.BFLOAT16 if ir.DataType.BFLOAT16 in narrow else ir.DataType.FLOAT16
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in FLOAT_TYPES.values():
                node.replace_input_with(index, cast_of(graph, value, dtype))
        cast_back(graph, node, dtype, "narrow")


def _narrow_source(value: ir.Value | None) -> ir.DataType | None:
    """The 16-bit type that a value was cast from."""
    maker = None if value is None else value.producer()
    if maker is None or maker.op_type != "Cast" or maker.inputs[0] is None:
        return None
    dtype = maker.inputs[0].dtype
    return dtype if dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) else None


def _ranged(unit: Unit, choice: Choice) -> tuple[str, ...]:
    return (unit.data,) if choice.activation == "static" else ()


def _check(model: ir.Model, node: ir.Node, unit: Unit, choice: Choice, ranges: Ranges) -> None:
    if choice.is_float:
        check_typed(model, unit, choice.name, ranges)
        return
    what, opset = f"unit {unit.id!r} is to be {choice.name}", model.opset_imports.get("", 0)
    needed = OPSETS[choice.name]
    if product_type(model, unit) != ir.DataType.FLOAT:
        needed = max(needed, HALF_SCALES_OPSET)
    if opset < needed:
        raise BadRequest(
            f"{what}, which opset {needed} can say first; the graph has opset {opset}. "
            "Export it with --device trt or trt-rtx."
        )
    block = choice.weight.block
    if block and unit.k % block:
        raise BadRequest(f"{what}, and its {unit.k} inputs are no multiple of {block}; choose another block or w8a8")
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if choice.weight.kind == "fp4" and shape is not None and len(shape) not in (2, 3):
        raise BadRequest(f"{what}, and it reads {len(shape)} axes; TensorRT rounds 2 or 3 of them. Choose fp8.")


class _Writer:
    """One pass over one graph, with what its units share."""

    def __init__(self, model: ir.Model, ranges: Ranges, target: Target, store: Store) -> None:
        self.model = model
        self.graph = model.graph
        self.ranges = ranges
        self.target = target
        self.store = store
        self._rounded: dict[tuple[str, str], ir.Value] = {}

    def write(self, node: ir.Node, unit: Unit, choice: Choice) -> None:
        """Give one unit its quantized operands."""
        data = node.inputs[0]
        assert data is not None
        kind = "int8" if choice.name == "w8a8" else choice.weight.kind
        weights = {"int8": self._per_output, "int": self._blocks, "fp8": self._whole, "fp4": self._two_levels}
        if kind == "fp4":
            node.replace_input_with(0, self._rounded_blocks(data, unit))
        elif choice.activation == "static":
            node.replace_input_with(0, self.rounded(data, unit.data, kind))
        node.replace_input_with(1, weights[kind](unit, choice))

    def rounded(self, value: ir.Value, name: str, kind: str) -> ir.Value:
        """`value` rounded to int8 or fp8 around 0 and widened again, once for all that read it so."""
        if (name, kind) not in self._rounded:
            dtype, floats = CODE_TYPES[kind], value.dtype or ir.DataType.FLOAT
            scale = self._scale_of(name, kind, floats)
            zero = constant(self.graph, f"quant.{kind}.zero", np.zeros((), dtype.numpy()))
            narrow = make_node("QuantizeLinear", [value, scale, zero], f"{name}.{kind}", value, dtype=dtype)
            inputs = [narrow.outputs[0], scale, zero]
            widen = make_node("DequantizeLinear", inputs, f"{name}.{kind}.meant", value, dtype=floats)
            insert_behind(self.graph, value, [narrow, widen])
            self._rounded[name, kind] = widen.outputs[0]
        return self._rounded[name, kind]

    def _rounded_blocks(self, value: ir.Value, unit: Unit) -> ir.Value:
        """`value` in E2M1, with an E4M3 scale per 16 that is taken as it runs."""
        name = unit.data
        if (name, "fp4") not in self._rounded:
            floats, block = value.dtype or ir.DataType.FLOAT, get_choice("nvfp4").weight.block
            scale = self._scale_of(name, "fp4", floats)
            attributes = {"axis": -1, "block_size": block, "scale_type": int(ir.DataType.FLOAT8E4M3FN)}
            narrow = ir.node(
                "TRT_FP4DynamicQuantize", [value, scale], attributes, domain=TRT, num_outputs=2, name=f"{name}.fp4"
            )
            codes, widths = narrow.outputs
            codes.name, codes.shape, codes.type = f"{name}.fp4", value.shape, ir.TensorType(ir.DataType.FLOAT4E2M1)
            widths.name, widths.type = f"{name}.fp4.widths", ir.TensorType(ir.DataType.FLOAT8E4M3FN)
            if value.shape is not None:
                widths.shape = ir.Shape([*value.shape[:-1], unit.k // block])
            scales = make_node("DequantizeLinear", [widths, scale], f"{name}.fp4.scales", widths, dtype=floats)
            inputs = [codes, scales.outputs[0]]
            axes: dict[str, Any] = {"axis": -1, "block_size": block}
            widen = make_node("DequantizeLinear", inputs, f"{name}.fp4.meant", value, dtype=floats, **axes)
            insert_behind(self.graph, value, [narrow, scales, widen])
            self.model.opset_imports.setdefault(TRT, 1)
            self._rounded[name, "fp4"] = widen.outputs[0]
        return self._rounded[name, "fp4"]

    def _scale_of(self, name: str, kind: str, floats: ir.DataType) -> ir.Value:
        """What brings a value's range to the largest code; 1 if it is always 0."""
        reach = max(abs(self.ranges[name][0]), abs(self.ranges[name][1])) / REACHES[kind]
        scale = positive(np.array(reach, np.float32), floats)
        return constant(self.graph, f"{name}.{kind}.scale", scale)

    # weights

    def _per_output(self, unit: Unit, choice: Choice) -> ir.Value:
        """int8 in the weight's own shape, a scale per output."""
        axis = 0 if unit.op == "Conv" else 1
        weight = self._weight(unit, choice)
        return self._dequantized(unit, choice, weight, np.int8, lambda: weight.scales()[:, 0], (unit.n,), axis=axis)

    def _blocks(self, unit: Unit, choice: Choice) -> ir.Value:
        """int4 (k, n), scales (k / block, n)."""
        # A choice of the same format that meets rounded activations is what `store` gives positive scales.
        weight = self._weight(unit, dataclasses.replace(choice, activation="static"))
        size, block = (weight.blocks, unit.n), choice.weight.block
        return self._dequantized(
            unit, choice, weight, ml_dtypes.int4, lambda: weight.scales().T, size, axis=0, block_size=block
        )

    def _whole(self, unit: Unit, choice: Choice) -> ir.Value:
        """E4M3 in the weight's own shape, one scale."""
        weight = self._weight(unit, choice)
        return self._dequantized(unit, choice, weight, ml_dtypes.float8_e4m3fn, weight.whole, ())

    def _two_levels(self, unit: Unit, choice: Choice) -> ir.Value:
        """E2M1 (k, n); its scales (k / 16, n) are E4M3, times one float."""
        weight, name = self._weight(unit, choice), f"{unit.weight}.{choice.name}"
        floats, narrow = product_type(self.model, unit), ir.DataType.FLOAT8E4M3FN
        size = (weight.blocks, unit.n)
        codes = self._codes(unit, choice, weight, ml_dtypes.float4_e2m1fn)
        widths = lazy_once(
            self.graph, f"{name}.widths", lambda: weight.scales().T.astype(ml_dtypes.float8_e4m3fn), narrow, size
        )
        whole = lazy_once(self.graph, f"{name}.scale", lambda: positive(weight.whole(), floats), floats, ())
        scales = make_node("DequantizeLinear", [widths, whole], f"{unit.id}.weight.scales", widths, dtype=floats)
        inputs = [codes, scales.outputs[0]]
        axes: dict[str, Any] = {"axis": 0, "block_size": choice.weight.block}
        widen = make_node("DequantizeLinear", inputs, f"{unit.id}.weight", codes, dtype=floats, **axes)
        self.graph.insert_before(self.graph[0], [scales, widen])
        return widen.outputs[0]

    def _dequantized(
        self,
        unit: Unit,
        choice: Choice,
        weight: _Weight,
        code_type: Any,
        scales: Callable[[], Array],
        size: Sequence[int],
        **attributes: Any,
    ) -> ir.Value:
        floats = product_type(self.model, unit)
        codes = self._codes(unit, choice, weight, code_type)
        name = f"{unit.weight}.{choice.name}.scales"
        stored = lazy_once(self.graph, name, lambda: positive(scales(), floats), floats, size)
        widen = make_node("DequantizeLinear", [codes, stored], f"{unit.id}.weight", codes, dtype=floats, **attributes)
        self.graph.insert_before(self.graph[0], [widen])
        return widen.outputs[0]

    def _codes(self, unit: Unit, choice: Choice, weight: _Weight, code_type: Any) -> ir.Value:
        shape = tuple(initializer(self.model, unit.weight).shape.numpy())

        def make() -> Array:
            return from_matrix(weight.stored().codes.astype(np.float32), unit, shape).astype(code_type)

        dtype = ir.DataType.from_numpy(np.dtype(code_type))
        return lazy_once(self.graph, f"{unit.weight}.{choice.name}.codes", make, dtype, shape)

    def _weight(self, unit: Unit, choice: Choice) -> _Weight:
        return _Weight(self.model, unit, choice, self.target.code_bits, self.store)


class _Weight(StoredWeight):
    """One that keeps the whole matrix's scale as well."""

    _whole: float | None = None

    def stored(self) -> Any:
        """Round the matrix."""
        stored = super().stored()
        self._whole = stored.tensor_scale
        return stored

    def whole(self) -> F32:
        """()."""
        if self._whole is None:
            self.stored()
        return np.array(self._whole, np.float32)


def positive(scales: F32, dtype: ir.DataType) -> Array:
    """Scales in the product's float type, each above 0 as TensorRT's parser asks; 1 for what holds nothing but zeros.

    Raises:
        BadRequest: a scale is below 0.
    """
    if (scales < 0).any():
        raise BadRequest(f"a weight was stored with a scale of {scales.min():.3g}; TensorRT takes scales above 0")
    least = ml_dtypes.finfo(dtype.numpy()).smallest_subnormal
    narrow: Array = np.where(scales > 0, np.maximum(scales, np.float32(least)), np.float32(1)).astype(dtype.numpy())
    return narrow
