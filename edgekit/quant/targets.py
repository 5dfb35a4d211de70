"""What each device really fuses: TARGETS says which choices a unit may take there, measured or read per row.

ONNX Runtime on a CPU (measured, 1.32): Conv as QLinearConv and MatMul as MatMulIntegerToFloat run on integers; a
product of stored integers and float activations is MatMulNBits, which a Conv has not, and GatherBlockQuantized reads a
table of the same codes. Floats of 16 bits are storage alone: they are widened when the graph is opened. Without an
8-bit dot product (VNNI on x86) the integer kernels add two products in 16 bits and saturate, so weight codes keep to 7
bits there (64 * 255 * 2 < 2**15).
TensorRT (its documentation, "Working with Quantized Types"): signed symmetric activations, weights of 4 bits in blocks
for MatMul alone, FP8 from compute capability 8.9, FP4 from 10.0.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from edgekit.errors import UnknownDevice
from edgekit.quant.choices import CHOICES, Choice, get_choice
from edgekit.quant.graph import Unit

Engine = Literal["ort-cpu", "ort-cuda", "tensorrt", "openvino"]

STORED = ("fp32", "fp16")
NBITS = ("w8a16", "w4a16-32", "w4a16-64", "w4a16-128", "w2a16-32")
TENSORRT_PRODUCTS = ("w8a8", "fp8", "w4a16-64", "w4a16-128", "nvfp4")  # blocks must divide the row
MOST_BITS_WITH_ZEROS = 4  # with 8, what a zero point gains is nothing beside the error of 4-bit neighbours
CAREFUL = {"conv_in", "conv_out", "proj_out", "time"}  # few weights, much harm: integers only if asked for


@dataclass(frozen=True, slots=True)
class Target:
    """A device to lower for.

    Attributes:
        name: as typed after `--device`.
        engine: what runs it, and so which spelling of quantized operators it is given.
        code_bits: of an 8-bit weight that meets integer activations.
        symmetric: whether activations are signed, with zero point 0.
        allowed: the choices a unit may take, most accurate first.
        zeros: whether weights of 2 and 4 bits that meet floats have a zero point per block beside its scale. On a model
            of text, 1/16 bit per weight of zero points took 8 % off the KL divergence, and no time.
    """

    name: str
    engine: Engine
    allowed: Callable[[Unit], tuple[str, ...]]
    code_bits: int = 8
    symmetric: bool = False
    zeros: bool = False

    def choice(self, name: str) -> Choice:
        """A row of CHOICES as this device stores it.

        Raises:
            BadRequest: no such choice.
        """
        choice = get_choice(name)
        form = choice.weight
        if not self.zeros or form.kind != "int" or not form.block or form.bits > MOST_BITS_WITH_ZEROS:
            return choice
        return replace(choice, weight=replace(form, zero=True))


def _ort_cpu(unit: Unit) -> tuple[str, ...]:
    if unit.op == "Gather":
        return (*STORED, *NBITS)
    if unit.op == "Conv":
        return (*STORED, "w8a8") if unit.role not in CAREFUL and unit.group == 1 else STORED
    integers = ("w8a8", "w8a8-row") if unit.role not in CAREFUL else ()
    return (*STORED, "w8a16", *integers, *NBITS[1:])


def _ort_cuda(unit: Unit) -> tuple[str, ...]:
    return (*STORED, *NBITS) if unit.op == "MatMul" else STORED


def _tensorrt(unit: Unit) -> tuple[str, ...]:
    floats = ("fp32", "bf16", "fp16")
    if unit.op == "Gather" or unit.role in CAREFUL:
        return floats
    if unit.op == "Conv":
        return (*floats, "w8a8")
    return (*floats, *(name for name in TENSORRT_PRODUCTS if unit.k % (CHOICES[name].weight.block or 1) == 0))


def _openvino(unit: Unit) -> tuple[str, ...]:
    if unit.op == "Gather" or unit.role in CAREFUL:
        return STORED
    return (*STORED, "w8a8")


def has_int8_dot() -> bool:
    """Whether this machine multiplies four pairs of bytes into 32 bits (VNNI; every 64-bit Arm of the last years)."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_vnni" in flags or "avx_vnni" in flags


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("cpu:vnni", "ort-cpu", _ort_cpu, code_bits=8, zeros=True),
        Target("cpu:any", "ort-cpu", _ort_cpu, code_bits=7, zeros=True),
        Target("cuda", "ort-cuda", _ort_cuda),
        Target("trt", "tensorrt", _tensorrt, symmetric=True),
        Target("trt-rtx", "tensorrt", _tensorrt, symmetric=True),
        Target("openvino", "openvino", _openvino, code_bits=8 if has_int8_dot() else 7),
    )
}


def get_target(device: str) -> Target:
    """The row of TARGETS for a device; `cpu` is the row that fits this machine's processor.

    Raises:
        UnknownDevice: no such row.
    """
    if device == "cpu":
        device = "cpu:vnni" if has_int8_dot() else "cpu:any"
    if device not in TARGETS:
        raise UnknownDevice(f"no precision target {device!r}; known: cpu, {', '.join(TARGETS)}")
    return TARGETS[device]
