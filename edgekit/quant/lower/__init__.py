"""Lowering: what a plan chose becomes operators that the target's engine fuses. One module per engine, one row each.

Every module has one entry, `lower`, of the same signature as the one here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module

import onnx_ir as ir

from edgekit.quant.graph import Unit
from edgekit.quant.lower.common import Ranges, Store, rtn_store
from edgekit.quant.targets import Target

LOWERINGS = {
    "ort-cpu": "edgekit.quant.lower.ort_cpu",
    "ort-cuda": "edgekit.quant.lower.ort_cuda",
    "tensorrt": "edgekit.quant.lower.tensorrt",
    "openvino": "edgekit.quant.lower.openvino",
}


def lower(
    model: ir.Model,
    units: Sequence[Unit],
    choices: Mapping[str, str],
    ranges: Ranges,
    target: Target,
    store: Store = rtn_store,
) -> None:
    """Give every chosen unit the spelling that the target runs fast. Inputs, outputs and other units stay as they are.

    Args:
        model: a normalised graph; it is changed in place. Its weights are quantized when it is written.
        units: of `find_units`, before anything was lowered.
        choices: by unit id; a unit that is not named stays as it is.
        ranges: lowest and highest of the values that become integers, by value name.
        target: a row of TARGETS.
        store: how a weight matrix is rounded.

    Raises:
        BadRequest: a unit that is not there, a choice that the target does not allow it, or a range that is missing.
    """
    import_module(LOWERINGS[target.engine]).lower(model, units, choices, ranges, target, store)
