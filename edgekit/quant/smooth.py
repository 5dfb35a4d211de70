"""Smoothing: what is hard to round in activations moves into weights, through the norm before them.

A channel j of a norm's output is divided by s_j, and row j of every weight that reads it is multiplied by s_j. With
s_j = max|x_j|^alpha / max|W_j|^(1 - alpha) (SmoothQuant, Xiao et al. 2022, arXiv 2211.10438, eq. 4) an outlier channel
no longer sets the one scale of the tensor. The division is done on the norm's own weight and bias: nothing more runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from edgekit.errors import BadRequest
from edgekit.quant.graph import Array, Unit, initializer, lazy_initializer
from edgekit.quant.plan import Rewrite

F64 = npt.NDArray[np.float64]

# Where a norm keeps its scale and its bias, by operator.
VECTORS = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2,),
}


@dataclass(frozen=True, slots=True)
class _Norm:
    """A value that only products with weights read, and the constants that scale and shift it."""

    value: str
    k: int
    constants: tuple[tuple[ir.Node, int], ...]
    readers: tuple[Unit, ...]


def smooth(
    model: ir.Model,
    units: Sequence[Unit],
    channel_max: Mapping[str, Array],
    alpha: float = 0.5,
    only: Collection[str] | None = None,
) -> tuple[Rewrite, ...]:
    """Smooth every norm that can be, in place; the function computed is the same.

    Args:
        model: a normalised graph.
        units: its units.
        channel_max: largest |x| of each channel over the calibration set, (k,), by value name; others stay.
        alpha: how much of the difficulty moves, from 0 to 1.
        only: ids of units that integers will feed; a norm none of them reads stays. None is all.

    Returns:
        One rewrite per norm, by the first product that reads it.

    Raises:
        BadRequest: alpha is out of range, or a maximum has another shape or is no number.
    """
    return divide(model, units, smoothing_factors(model, units, channel_max, alpha, only))


def smoothing_factors(
    model: ir.Model,
    units: Sequence[Unit],
    channel_max: Mapping[str, Array],
    alpha: float = 0.5,
    only: Collection[str] | None = None,
) -> dict[str, F64]:
    """The factors s (k,) of every norm that `smooth` would change, by value name: what a replay needs.

    Raises:
        BadRequest: as `smooth`.
    """
    if not 0 <= alpha <= 1:
        raise BadRequest(f"smoothing by alpha {alpha}; it is from 0 (all difficulty in activations) to 1 (in weights)")
    factors = {}
    for norm in _norms(model, units):
        wanted = only is None or any(unit.id in only for unit in norm.readers)
        if wanted and norm.value in channel_max:
            peaks = _checked(norm, channel_max[norm.value])
            weights = [np.abs(initializer(model, unit.weight).numpy()).max(axis=1) for unit in norm.readers]
            most = np.max(np.asarray(weights, np.float64), axis=0)
            dead = (peaks == 0) | (most == 0)  # nothing to move, or nowhere
            safe = [np.where(dead, 1.0, each) for each in (peaks, most)]
            factors[norm.value] = safe[0] ** alpha / safe[1] ** (1 - alpha)
    return factors


def divide(model: ir.Model, units: Sequence[Unit], factors: Mapping[str, Array]) -> tuple[Rewrite, ...]:
    """Divide norms by given factors (k,), by value name, and multiply what reads them; in place, weights stay lazy.

    A value that is not a norm's output with products as its only readers stays as it is.

    Raises:
        BadRequest: factors of another shape, or not all above 0.
    """
    rewrites = []
    nodes = {node.name: node for node in model.graph}
    for norm in list(_norms(model, units)):
        if norm.value not in factors:
            continue
        s = _checked(norm, factors[norm.value])
        if not s.all():
            raise BadRequest(f"smoothing {norm.value!r}: a factor is 0; factors are above it")
        for node, index in norm.constants:
            _scaled(model.graph, node, index, 1 / s)
        for unit in norm.readers:
            _scaled(model.graph, nodes[unit.id], 1, s[:, None])
        rewrites.append(Rewrite("smooth", norm.readers[0].id))
    if rewrites:
        RemoveUnusedNodesPass()(model)
    return tuple(rewrites)


def _checked(norm: _Norm, given: Array) -> F64:
    numbers = np.asarray(given, np.float64)
    if numbers.shape != (norm.k,) or not np.isfinite(numbers).all() or (numbers < 0).any():
        raise BadRequest(
            f"smoothing {norm.value!r}: {norm.k} finite numbers, none below 0, are needed, one per channel; "
            f"given is an array of shape {numbers.shape}"
        )
    return numbers


def _norms(model: ir.Model, units: Sequence[Unit]) -> Iterator[_Norm]:
    """Values that only products read and a constant of theirs scales, in the order their first readers run."""
    nodes = {node.name: node for node in model.graph}
    by_value: dict[str, list[Unit]] = {}
    for unit in units:
        if unit.op == "MatMul" and unit.id in nodes:
            by_value.setdefault(unit.data, []).append(unit)
    for name, readers in by_value.items():
        value = nodes[readers[0].id].inputs[0]
        assert value is not None
        mine = {id(nodes[unit.id]) for unit in readers}
        if value.is_graph_output() or any(id(node) not in mine or index for node, index in value.uses()):
            continue
        constants = _constants(value, readers[0].k)
        if constants:
            yield _Norm(name, readers[0].k, constants, tuple(readers))


def _constants(value: ir.Value, k: int) -> tuple[tuple[ir.Node, int], ...]:
    """The vectors to divide so that a value is divided: of a norm, or of a Mul and the Add behind it; () if none."""
    found: list[tuple[ir.Node, int]] = []
    maker = value.producer()
    if maker is not None and maker.op_type == "Add" and (index := _vector_input(maker, k)) is not None:
        found.append((maker, index))
        inner = maker.inputs[1 - index]
        if inner is None or inner.is_graph_output() or len(inner.uses()) > 1:
            return ()
        value, maker = inner, inner.producer()
    if maker is None:
        return ()
    if maker.op_type == "Mul" and (index := _vector_input(maker, k)) is not None:
        return ((maker, index), *found)
    places = [at for at in VECTORS.get(maker.op_type, ()) if at < len(maker.inputs) and maker.inputs[at] is not None]
    if not places or maker.outputs[0] is not value or not all(_is_vector(maker.inputs[at], k) for at in places):
        return ()
    return (*((maker, at) for at in places), *found)


def _vector_input(node: ir.Node, k: int) -> int | None:
    """Which input is a constant along the last axis, where one is."""
    return next((index for index in (0, 1) if _is_vector(node.inputs[index], k)), None)


def _is_vector(value: ir.Value | None, k: int) -> bool:
    if value is None or not value.is_initializer() or value.const_value is None:
        return False
    shape = value.const_value.shape
    return len(shape) > 0 and shape[-1] == k and value.const_value.size == k


def _scaled(graph: ir.Graph, node: ir.Node, index: int, by: F64) -> None:
    """Read a constant times `by`, under a name of its own: others may read the old one."""
    value = node.inputs[index]
    assert value is not None
    tensor = value.const_value
    assert tensor is not None
    dtype = tensor.dtype

    def make() -> Array:
        scaled: Array = (tensor.numpy().astype(np.float64) * by).astype(dtype.numpy())
        return scaled

    name = f"{value.name}.smooth.{node.name}"
    node.replace_input_with(index, lazy_initializer(graph, name, make, dtype, tensor.shape))
