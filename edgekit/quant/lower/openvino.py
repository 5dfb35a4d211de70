"""OpenVINO's CPU plugin reads ONNX Runtime's spelling, its com.microsoft products included, and runs it on integers.

Checked with 2026.4.1: Conv between Q/DQ pairs becomes a u8 convolution, MatMulIntegerToFloat a u8 fully connected
layer, and both give the numbers that ONNX Runtime gives for the same file. Like ONNX Runtime it adds pairs of products
in 16 bits where the processor has no VNNI, and saturates: weight codes need a `Target.code_bits` of 7 there as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from edgekit.quant.graph import Unit
from edgekit.quant.lower import ort_cpu
from edgekit.quant.lower.common import Ranges, Store
from edgekit.quant.targets import Target


def lower(
    model: ir.Model,
    units: Sequence[Unit],
    choices: Mapping[str, str],
    ranges: Ranges,
    target: Target,
    store: Store,
) -> None:
    """See `edgekit.quant.lower.lower`."""
    ort_cpu.lower(model, units, choices, ranges, target, store)
