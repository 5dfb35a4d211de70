"""What one unit may become: CHOICES names every way of storing its weights and feeding its product.

A choice says two things: how the weight matrix is stored (`weight`), and what the product is fed (`activation`). What a
device can really fuse of it is a row of TARGETS (targets.py); how it is written into a graph is `lower`.

    fp32, fp16, bf16     floats; where the device has no arithmetic of that type they are storage alone
    w8a8                 integers on both sides, one activation scale for the whole tensor, measured beforehand
    w8a8-row             integers on both sides, one activation scale per token, taken as it runs
    w8a16, w4a16, w2a16  weights alone; the product is of floats (an engine may round them within the product)
    fp8, nvfp4           eight- and four-bit floats on both sides (E4M3; E2M1 with an E4M3 scale per 16)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from edgekit.errors import BadRequest

Kind = Literal["float", "int", "fp8", "fp4"]
Activation = Literal["float", "static", "row"]


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How a weight matrix (n outputs, k weights each) is stored.

    Attributes:
        kind: floats, integer codes, E4M3 or E2M1.
        bits: of one stored weight.
        block: weights along k that share a scale; 0 is a whole row.
        scale_bits: of one scale: those of blocks are float16. fp8 has none but the whole matrix's; fp4 has both.
        zero: whether each scale has a zero point beside it, of `bits` bits.
    """

    kind: Kind
    bits: int
    block: int = 0
    scale_bits: int = 32
    zero: bool = False

    def blocks(self, k: int) -> int:
        """Scales in a row of `k` weights."""
        if self.kind in ("float", "fp8"):
            return 0
        return -(-k // self.block) if self.block else 1

    def bytes(self, n: int, k: int) -> int:
        """Bytes of a stored (n, k) matrix, scales and the last block's padding included."""
        blocks = self.blocks(k)
        codes = math.ceil(n * (blocks * self.block or k) * self.bits / 8)
        zeros = n * math.ceil(blocks * self.bits / 8) if self.zero else 0
        whole = 4 if self.kind in ("fp8", "fp4") else 0
        return codes + n * blocks * self.scale_bits // 8 + zeros + whole


@dataclass(frozen=True, slots=True)
class Choice:
    """One option of one unit; see the module's table."""

    name: str
    weight: WeightFormat
    activation: Activation = "float"

    @property
    def is_float(self) -> bool:
        """Whether weights stay floats, of whatever width."""
        return self.weight.kind == "float"


CHOICES: dict[str, Choice] = {
    choice.name: choice
    for choice in (
        Choice("fp32", WeightFormat("float", 32)),
        Choice("fp16", WeightFormat("float", 16)),
        Choice("bf16", WeightFormat("float", 16)),
        Choice("w8a16", WeightFormat("int", 8, 128, 16)),
        Choice("w8a8", WeightFormat("int", 8), "static"),
        Choice("w8a8-row", WeightFormat("int", 8), "row"),
        Choice("fp8", WeightFormat("fp8", 8), "static"),
        Choice("w4a16-32", WeightFormat("int", 4, 32, 16)),
        Choice("w4a16-64", WeightFormat("int", 4, 64, 16)),
        Choice("w4a16-128", WeightFormat("int", 4, 128, 16)),
        Choice("nvfp4", WeightFormat("fp4", 4, 16, 8), "static"),
        Choice("w2a16-32", WeightFormat("int", 2, 32, 16)),
    )
}


def get_choice(name: str) -> Choice:
    """The row of CHOICES called `name`.

    Raises:
        BadRequest: no such choice.
    """
    if name not in CHOICES:
        raise BadRequest(f"no choice {name!r} for a unit; known: {', '.join(CHOICES)}")
    return CHOICES[name]
