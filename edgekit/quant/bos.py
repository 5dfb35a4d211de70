"""The first text token aside: keys and values of a row that never changes are numbers, not products.

The first token of a CLIP text encoder is the same for every prompt and far larger than all others, so one activation
scale for a key or value projection is ruined by it (MixDQ, Zhao et al. 2024, arXiv 2405.17873). Here
K = Concat(a * C, MatMul(text[:, 1:], W)), where C is computed once, in float64, from the float weights. `a` is 1, and 0
for the zeros that some pipelines feed for an empty negative prompt. The graph watches its input by a guard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.bundle.manifest import GUARD
from edgekit.errors import BadRequest
from edgekit.quant.graph import F32, Array, Unit, lazy_initializer
from edgekit.quant.insert import Inserter
from edgekit.quant.plan import Rewrite

SAME = 1e-4  # of its largest element a row may differ between prompts: kernels differ with the batch
LARGER = 4.0  # times all other rows: less is not worth a guard
ROW_KEEPING = {"Identity", "Cast", "Reshape", "Unsqueeze", "Squeeze", "Expand"}  # if the last two axes stay
BETWEEN = " + "  # the names of several inputs of one product
END = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class ConstantRows:
    """Token rows that are the same for every prompt.

    Attributes:
        rows: which, ascending.
        values: float32 (rows, width).
    """

    rows: tuple[int, ...]
    values: F32

    @property
    def are_leading(self) -> bool:
        """Whether they are the first rows, which alone can be split off."""
        return self.rows == tuple(range(len(self.rows)))


def find_constant_rows(samples: Sequence[Array]) -> ConstantRows:
    """Token rows that are the same for all prompts and LARGER than all others; by their numbers, not by name.

    Prompts that are all zeros (what stands for an empty negative prompt) say nothing and are left out.

    Args:
        samples: what a graph input was fed, each (B, tokens, width); at least two different prompts.

    Returns:
        The rows, none where nothing stands out.

    Raises:
        BadRequest: arrays of another rank, or of different widths.
    """
    if any(each.ndim != 3 for each in samples) or len({each.shape[2] for each in samples if each.ndim == 3}) > 1:
        shapes = ", ".join(str(each.shape) for each in samples)
        raise BadRequest(f"rows are looked for in arrays (batch, tokens, width) of one width; given are {shapes}")
    prompts = [prompt for each in samples for prompt in each if prompt.any()]
    width = samples[0].shape[2] if samples else 0
    none = ConstantRows((), np.zeros((0, width), np.float32))
    if len(prompts) < 2:
        return none
    tokens = min(len(prompt) for prompt in prompts)
    stacked = np.stack([prompt[:tokens] for prompt in prompts]).astype(np.float64)
    beyond = max((float(np.abs(prompt[tokens:]).max()) for prompt in prompts if len(prompt) > tokens), default=0.0)
    peaks = np.abs(stacked).max(axis=(0, 2))
    chosen = (stacked.max(axis=0) - stacked.min(axis=0)).max(axis=1) <= SAME * peaks
    if chosen.all() and not beyond:
        return none  # one prompt many times
    while chosen.any():
        larger = chosen & (peaks > LARGER * max(beyond, float(peaks[~chosen].max(initial=0.0))))
        if (larger == chosen).all():
            break
        chosen = larger
    rows = tuple(int(row) for row in np.flatnonzero(chosen))
    return ConstantRows(rows, stacked[:, list(rows)].mean(axis=0).astype(np.float32))


def split_bos(model: ir.Model, units: Sequence[Unit], name: str, constant: ConstantRows) -> tuple[Rewrite, ...]:
    """`split_rows` of one graph input."""
    return split_rows(model, units, {name: constant})


def split_rows(model: ir.Model, units: Sequence[Unit], rows: Mapping[str, ConstantRows]) -> tuple[Rewrite, ...]:
    """Take the constant leading rows of graph inputs out of the keys and values that are made from them.

    Each batch entry's rows are a * `values`, with a as found in the entry itself: 1, and 0 where zeros are fed for an
    empty negative prompt. For each input the graph gets an output `guard.<input>`, float32 (): the largest
    |row - a * values| relative to the largest |values|.

    Args:
        model: a normalised graph.
        units: its units; products whose rows are an input's, or those of several inputs side by side along the width
            (two text encoders), are split, the rest stays.
        rows: what `find_constant_rows` found, by graph input (B, tokens, width). A product of several inputs needs
            as many rows of each.

    Returns:
        One rewrite per product; several inputs are joined by " + ".

    Raises:
        BadRequest: rows that are not the first ones, all rows, rows of another width, or a graph that is split already.
    """
    graph = model.graph
    fed = {str(value.name): value for value in graph.inputs if value.name in rows and rows[value.name].rows}
    found = [(node, names) for node, names in _products(graph, units) if names and fed.keys() >= set(names)]
    found = [(node, names) for node, names in found if len({rows[name].rows for name in names}) == 1]
    if not found:
        return ()
    first, shares = next(iter(graph)), {}
    for name in dict.fromkeys(name for _, names in found for name in names):
        _check_rows(model, fed[name], rows[name])
        add, values = Inserter(graph, first), rows[name].values
        lead = _lead(add, fed[name], len(values))
        shares[name] = _share(add, f"{name}.share", lead, values)
        _add_guard(add, name, lead, shares[name], values)
    heads: dict[str | None, _Head] = {}
    for node, names in found:
        data, add = node.inputs[0], Inserter(graph, node)
        assert data is not None
        if data.name not in heads:
            known = (shares[names[0]],) if data is fed[names[0]] else ()
            heads[data.name] = _head(add, data, [rows[name].values for name in names], known)
        _split_product(add, node, heads[data.name])
    return tuple(Rewrite("bos", str(node.name), BETWEEN.join(names)) for node, names in found)


def _products(graph: ir.Graph, units: Sequence[Unit]) -> Iterator[tuple[ir.Node, tuple[str, ...]]]:
    """Products, each with the graph inputs whose rows it reads."""
    nodes = {node.name: node for node in graph}
    for unit in units:
        node = nodes.get(unit.id)
        if node is not None and unit.op == "MatMul" and not node.outputs[0].is_graph_output():
            yield node, _sources(node.inputs[0])


def _sources(value: ir.Value | None) -> tuple[str, ...]:
    """The graph inputs whose rows a value (B, tokens, width) has, side by side along its width; () if others."""
    value = _kept(value)
    if value is None or value.is_graph_input():
        return (str(value.name),) if value is not None else ()
    maker = value.producer()
    if maker is None or maker.op_type != "Concat" or maker.attributes["axis"].as_int() % 3 != 2:
        return ()
    inputs = [_kept(each) for each in maker.inputs]
    if not all(each is not None and each.is_graph_input() for each in inputs):
        return ()
    return tuple(str(each.name) for each in inputs if each is not None)


def _kept(value: ir.Value | None) -> ir.Value | None:
    """What a value (B, tokens, width) is, at most of another type or repeated along its batch; None if not known."""
    if value is None or value.shape is None or len(value.shape) != 3:
        return None
    tail = [_size(dim) for dim in value.shape[1:]]
    while (maker := value.producer()) is not None and maker.op_type in ROW_KEEPING:
        value = maker.inputs[0]
        if value is None or value.shape is None or None in tail or [_size(dim) for dim in value.shape[-2:]] != tail:
            return None
    return value if value.shape is not None and len(value.shape) == 3 else None


def _size(dim: Any) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value


def _check_rows(model: ir.Model, fed: ir.Value, constant: ConstantRows) -> None:
    count, width = constant.values.shape
    assert fed.shape is not None
    tokens, wide = (_size(dim) for dim in fed.shape[1:])
    if not constant.are_leading:
        raise BadRequest(f"{fed.name}: rows {constant.rows} are constant; only the first rows can be split off")
    if count != len(constant.rows) or width != wide or (isinstance(tokens, int) and count >= tokens):
        raise BadRequest(f"{fed.name} is {fed.shape}; {constant.values.shape} constant numbers do not go with it")
    if any(value.name == f"{GUARD}{fed.name}" for value in model.graph.outputs):
        raise BadRequest(f"{fed.name} is split already; split all units of an input at once")
    if (opset := model.opset_imports.get("", 0)) < 13:
        raise BadRequest(f"the graph is of opset {opset}; splitting needs 13 or later. Export it anew.")


def _lead(add: Inserter, value: ir.Value, r: int) -> ir.Value:
    """The first r rows of a value, float32 (B, r, width)."""
    assert value.shape is not None
    batch, _, width = value.shape
    lead = add("Slice", f"{value.name}.lead", [value, *_ints([0], [r], [1])], value.dtype, (batch, r, width))
    if value.dtype != ir.DataType.FLOAT:
        lead = add("Cast", f"{value.name}.lead.float", [lead], ir.DataType.FLOAT, lead.shape, to=ir.DataType.FLOAT)
    return lead


def _share(add: Inserter, name: str, lead: ir.Value, values: F32) -> ir.Value:
    """How much of `values` (r, width) is in the first rows, float32 (B, 1, 1): least squares, <rows, v> / <v, v>."""
    assert lead.shape is not None
    exact = values[None].astype(np.float64)
    weights = (exact / (exact**2).sum()).astype(np.float32)
    weighed = add("Mul", f"{name}.weighed", [lead, weights], lead.dtype, lead.shape)
    return add("ReduceSum", name, [weighed, *_ints([1, 2])], lead.dtype, (lead.shape[0], 1, 1), keepdims=1)


def _add_guard(add: Inserter, name: str, lead: ir.Value, share: ir.Value, values: F32) -> None:
    """A graph output: how far the first rows are from their share of the constant."""
    largest = np.float32(np.abs(values).max())
    told = add("Mul", f"{name}.told", [share, values[None]], lead.dtype, lead.shape)
    off = add("Sub", f"{name}.off", [lead, told], lead.dtype, lead.shape)
    size = add("Abs", f"{name}.off.size", [off], lead.dtype, lead.shape)
    most = add("ReduceMax", f"{name}.off.most", [size], lead.dtype, (), keepdims=0)
    add.graph.outputs.append(add("Div", f"{GUARD}{name}", [most, np.asarray(largest)], lead.dtype, ()))


@dataclass(frozen=True, slots=True)
class _Head:
    """What the products of one value share: it without its first rows, and of each input the constant and its share."""

    rest: ir.Value
    constants: tuple[tuple[F32, ir.Value], ...]


def _head(add: Inserter, data: ir.Value, values: Sequence[F32], known: Sequence[ir.Value]) -> _Head:
    """Cut a value that holds the inputs' rows side by side; shares that are `known` are not computed again."""
    assert data.shape is not None
    (batch, tokens, width), r = data.shape, len(values[0])
    left = tokens - r if isinstance(tokens, int) else ir.SymbolicDim(tokens.value and f"{tokens.value} - {r}")
    rest = add("Slice", f"{data.name}.rest", [data, *_ints([r], [END], [1])], data.dtype, (batch, left, width))
    shares = list(known)
    if not shares:
        lead = _lead(add, data, r)
        for number in range(len(values)):
            beside = [each if at == number else np.zeros_like(each) for at, each in enumerate(values)]
            shares.append(_share(add, f"{data.name}.share.{number}", lead, np.concatenate(beside, axis=1)))
    if data.dtype != ir.DataType.FLOAT:
        name = f"{data.name}.share.cast"
        shares = [
            add("Cast", f"{name}.{number}", [share], data.dtype, (batch, 1, 1), to=data.dtype)
            for number, share in enumerate(shares)
        ]
    return _Head(rest, tuple(zip(values, shares, strict=True)))


def _split_product(add: Inserter, node: ir.Node, head: _Head) -> None:
    """MatMul(x, W) becomes Concat(share * (constant @ W), MatMul(rest of x, W)), under the old name."""
    weight, output = node.inputs[1], node.outputs[0]
    assert weight is not None
    tensor, name, shape = weight.const_value, output.name, output.shape
    assert tensor is not None
    assert head.rest.shape is not None
    dtype, (batch, left, _), n = tensor.dtype, head.rest.shape, tensor.shape[1]
    lead, at = None, 0
    for number, (values, share) in enumerate(head.constants):
        r, width = values.shape
        make = partial(_product, values, tensor, at)
        at += width
        stored = lazy_initializer(add.graph, f"{name}.stored.{number}", make, dtype, (1, r, n))
        part = add("Mul", f"{name}.lead.{number}", [share, stored], dtype, (batch, r, n))
        lead = part if lead is None else add("Add", f"{name}.lead.to.{number}", [lead, part], dtype, (batch, r, n))
    node.replace_input_with(0, head.rest)
    reading = list(output.uses())
    joined = ir.node("Concat", [lead, output], attributes={"axis": 1}, name=f"{node.name}.joined")
    output.name, output.shape = f"{name}.rest", ir.Shape((batch, left, n))
    whole = joined.outputs[0]
    whole.name, whole.type, whole.shape = name, output.type, shape
    node.append(joined)
    for reader, index in reading:
        reader.replace_input_with(index, whole)


def _product(values: F32, weight: ir.TensorProtocol, at: int) -> Array:
    """Constant rows times the rows of a weight from `at` on, in float64."""
    beside = weight.numpy()[at : at + values.shape[1]].astype(np.float64)
    exact: Array = (values.astype(np.float64) @ beside)[None]
    stored: Array = exact.astype(weight.dtype.numpy())
    return stored


def _ints(*rows: Sequence[int]) -> list[Array]:
    return [np.array(row, np.int64) for row in rows]
