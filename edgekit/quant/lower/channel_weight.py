"""A convolution's weights as ONNX Runtime on a CPU takes them: codes per output, and a bias that is integers too."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.quant.graph import F32
from edgekit.quant.lower.common import StoredWeight

BIAS_REACH = 2**30  # of an int32 bias; the other half is the product's


class ChannelWeight:
    """A convolution's int8 codes with their scales, and its bias in units of those times the activation's step.

    The bias must fit int32. Where a channel's weights are so small that it would not, they get a larger scale: they
    are then nothing beside the bias.
    """

    def __init__(self, weight: StoredWeight, bias: Any, step: float) -> None:
        self._weight = weight
        self._bias = bias
        self._step = np.float32(step)

    def codes(self) -> npt.NDArray[np.int8]:
        """(n, k)."""
        stored = self._weight.stored()
        before, after = self._weight.scales()[:, 0], self.scales()
        codes = stored.codes.astype(np.int8)
        for row in np.flatnonzero(before != after):
            codes[row] = np.rint(codes[row] * (before[row] / after[row]))
        return codes

    def scales(self) -> F32:
        """(n,)."""
        scales: F32 = self._weight.scales()[:, 0]
        least = np.abs(self._offsets()) / (self._step * np.float32(BIAS_REACH))
        enough: F32 = np.where(np.abs(scales) < least, least, scales)
        return enough

    def bias(self) -> npt.NDArray[np.int32]:
        """(n,)."""
        units, offsets = self.bias_scales(), self._offsets()
        codes = np.divide(offsets, units, out=np.zeros_like(offsets), where=units != 0)
        return np.rint(codes).astype(np.int32)

    def bias_scales(self) -> F32:
        """(n,)."""
        steps: F32 = self.scales() * self._step
        return steps

    def _offsets(self) -> F32:
        n = self._weight.unit.n
        offsets: F32 = np.zeros(n, np.float32) if self._bias is None else self._bias.numpy().astype(np.float32)
        return offsets
