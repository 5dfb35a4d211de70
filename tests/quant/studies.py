"""Studies that no model was measured for: tables with the laws of real ones, small enough to check by hand."""

from __future__ import annotations

import numpy as np

from edgekit.quant.choices import CHOICES
from edgekit.quant.study import Row, Study

NAMES = ("fp32", "fp16", "w8a16", "w8a8", "w4a16-32", "w2a16-32")
OF_CONV = ("fp32", "fp16", "w8a8")
PARTS = ("text_encoder", "unet")


def made_up(units: int = 12, seed: int = 0, *, rest: int = 5000, shared: bool = False) -> Study:
    """Errors fall by four with every bit; every third unit is a convolution, which takes no weight-only choice.

    Args:
        units: how many, a quarter of them in the text encoder.
        seed: of all random numbers.
        rest: bytes of what is no unit.
        shared: whether the second row stands for two units that share their weights.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(units):
        n, k = (int(2**power) for power in rng.integers(5, 8, 2))
        names = (
            (f"block.{number}.proj", f"block.{number}.tied") if shared and number == 1 else (f"block.{number}.proj",)
        )
        rows.append(Row(PARTS[number >= units // 4], names, "conv" if number % 3 == 0 else "attn_q", n * k, (n, k)))
    allowed = np.array([[row.role != "conv" or name in OF_CONV for name in NAMES] for row in rows])
    size = np.array([[CHOICES[name].weight.bytes(*row.shape) for name in NAMES] for row in rows], float)
    bits = np.array([CHOICES[name].weight.bits for name in NAMES])
    harm = np.exp(rng.normal(-6, 2, (units, 1))) * np.exp2(-2.0 * (bits - 3)) * rng.uniform(0.7, 1.4, allowed.shape)
    harm[:, 0] = 0
    speed = np.exp(rng.normal(-3, 0.5, (units, 1))) * np.where(bits == 8, 0.6, np.where(bits < 8, 0.8, 1.0))
    return Study(
        target="cpu:any",
        rows=tuple(rows),
        choices=NAMES,
        errors={
            name: np.where(allowed, harm * factor, np.nan) for name, factor in (("content", 1.0), ("quality", 9.0))
        },
        bytes=np.where(allowed, size, np.nan),
        milliseconds=np.where(allowed, speed, np.nan),
        fixed_bytes=rest,
        fixed_ms=0.25,
        edges=((1, 2), (2, 3)),
        boundary_ms=(0.001, 0.002),
        facts={
            "method": {"text_encoder": "scan", "unet": "probe+scan"},
            "trials": {"text_encoder": 12, "unet": 34},
            "agreement": {"text_encoder": {}, "unet": {"content": 0.93, "quality": 0.97}},
            "spread": {"unet/conv_in_output": 3.21},
        },
    )
