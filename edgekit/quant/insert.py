"""Putting nodes into a graph: what rewrites are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.quant.graph import Array, lazy_initializer


@dataclass(frozen=True)
class Inserter:
    """Puts nodes before one node; numbers among their inputs become initializers."""

    graph: ir.Graph
    before: ir.Node

    def __call__(
        self, op: str, name: str, inputs: Sequence[ir.Value | Array], like: Any, shape: Any, **attributes: Any
    ) -> ir.Value:
        """One node of type `like`, called as its output is."""
        values = []
        for index, each in enumerate(inputs):
            if not isinstance(each, ir.Value):
                dtype = ir.DataType.from_numpy(each.dtype)
                each = lazy_initializer(self.graph, f"{name}.{index}", partial(np.asarray, each), dtype, each.shape)
            values.append(each)
        node = ir.node(op, values, attributes=attributes, name=name)
        output = node.outputs[0]
        output.name, output.type, output.shape = name, ir.TensorType(like), ir.Shape(shape)
        self.graph.insert_before(self.before, node)
        return output
