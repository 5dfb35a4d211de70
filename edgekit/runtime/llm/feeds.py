"""What a decoder graph is fed besides ids and rows: where its cache ends, and who may see whom. One row per dialect.

`ort` and `std` take additive biases, 0 where a slot is visible and the lowest finite number where it is hidden. A
sliding window lives in its own bias, by position and not by slot, so that branches and rollbacks are exact. `concat`
takes a mask with one entry per slot, the same for every new token, so nothing can be hidden from one branch alone.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgekit.runtime.backends import Array
from edgekit.runtime.llm.tree import TokenTree


class Feeds(Protocol):
    """The cache bookkeeping inputs of one dialect."""

    arrays: dict[str, Array]  # inputs, changed in place by `place`
    empty_means_causal: bool  # on an empty cache the graph takes its tokens for one chain, whatever the positions say
    chains_only: bool  # no bias says who sees whom: every token sees all before it

    def place(self, total: int, count: int) -> None:
        """The run writes `count` tokens, after which `total` slots are in use."""

    def width(self, total: int, capacity: int) -> int:
        """Last dimension of the biases."""


class OrtFeeds:
    """com.microsoft GroupQueryAttention: the bias is as wide as the slots in use."""

    empty_means_causal = True
    chains_only = False

    def __init__(self) -> None:
        self._last = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)
        self.arrays: dict[str, Array] = {"seqlens_k": self._last, "total_sequence_length": self._total}

    def place(self, total: int, count: int) -> None:  # noqa: ARG002
        """`seqlens_k` is the last slot in use."""
        self._last[0] = total - 1
        self._total[()] = total

    def width(self, total: int, capacity: int) -> int:  # noqa: ARG002
        """The slots in use."""
        return total


class StdFeeds:
    """Opset 24 TensorScatter and Attention: the bias is as wide as the buffer."""

    empty_means_causal = False
    chains_only = False

    def __init__(self) -> None:
        self._start = np.zeros(1, np.int64)
        self.arrays: dict[str, Array] = {"write_indices": self._start}

    def place(self, total: int, count: int) -> None:
        """`write_indices` is the first slot written."""
        self._start[0] = total - count

    def width(self, total: int, capacity: int) -> int:  # noqa: ARG002
        """The whole buffer."""
        return capacity


class ConcatFeeds:
    """Graphs as exporters of transformers write them: the mask says how many slots there are, and nothing else does."""

    empty_means_causal = True
    chains_only = True

    def __init__(self) -> None:
        self.arrays: dict[str, Array] = {}

    def place(self, total: int, count: int) -> None:
        """Nothing to say: the arrays' own sizes do."""

    def width(self, total: int, capacity: int) -> int:  # noqa: ARG002
        """The slots in use."""
        return total


DIALECTS: dict[str, type[OrtFeeds] | type[StdFeeds] | type[ConcatFeeds]] = {
    "ort": OrtFeeds,
    "std": StdFeeds,
    "concat": ConcatFeeds,
}


class Mask:
    """`attention_mask`: int64 ones, (1, width); every slot is a token of the text. Made once, then cut to size."""

    name = "attention_mask"

    def __init__(self) -> None:
        self._ones: Array = np.ones((1, 0), np.int64)

    def fill(self, base: int, tree: TokenTree, skip: int, width: int) -> Array:  # noqa: ARG002
        """Ones; the arguments are those of `Bias.fill`."""
        if self._ones.shape[1] < width:
            self._ones = np.ones((1, 2 * width), np.int64)
        return self._ones[:, :width]


class Bias:
    """One additive attention bias (1, 1, rows, width); memory is kept between runs and grows on demand."""

    def __init__(self, name: str, window: int | None, dtype: npt.DTypeLike) -> None:
        self.name = name
        self._window = window
        self._flat = np.zeros(0, dtype)
        self._open = np.zeros((1, 1, 1, 0), dtype)  # a lone node with no window sees everything: never written to
        self._hidden = np.finfo(np.dtype(dtype)).min

    def fill(self, base: int, tree: TokenTree, skip: int, width: int) -> Array:
        """The bias of the nodes from `skip` on, over `width` slots.

        Args:
            base: committed slots; slot s of these holds position s, and every node sees them all.
            tree: the nodes in the slots from `base` on.
            skip: leading nodes that are no rows of this run.
            width: slots; those after the nodes are hidden.
        """
        rows, end = len(tree) - skip, base + len(tree)
        if rows == 1 and len(tree) == 1 and width == end and self._window is None:
            if self._open.shape[-1] < width:
                self._open = np.zeros((1, 1, 1, 2 * width), self._flat.dtype)
            return self._open[..., :width]
        sees = tree.sees()
        if self._flat.size < rows * width:
            self._flat = np.zeros(2 * rows * width, self._flat.dtype)
        bias = self._flat[: rows * width].reshape(rows, width)
        bias[:, :end] = 0
        if width > end:
            bias[:, end:] = self._hidden
        if self._window is not None:
            depths = np.array(tree.depths)
            sees = sees & (depths[:, None] - depths < self._window)
            for row, depth in zip(bias, tree.depths[skip:], strict=True):
                row[: max(0, min(base, base + depth - self._window + 1))] = self._hidden
        if len(tree) > 1:
            bias[:, base:end][~sees[skip:]] = self._hidden
        return bias[None, None]
