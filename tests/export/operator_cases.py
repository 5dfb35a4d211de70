"""One node at a time: every operator that torch runs graphs by, in the forms that exporters write."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from tests.export.toy_graphs import single

RANDOM = np.random.default_rng(7)


def f(*shape: int) -> np.ndarray:
    """Normal numbers."""
    return RANDOM.standard_normal(shape).astype(np.float32)


def p(*shape: int) -> np.ndarray:
    """Positive numbers, away from 0."""
    return (np.abs(f(*shape)) + 0.1).astype(np.float32)


def n(*values: int) -> np.ndarray:
    """Sizes or axes."""
    return np.array(values, np.int64)


def flags(*shape: int) -> np.ndarray:
    """Booleans."""
    return RANDOM.random(shape) < 0.5


HOLES = np.array([1.0, math.nan, -2.0], np.float32)
SOME = [((), [f(2, 3)]), ((), [f(4)])]
PAIR = [((), [f(2, 3), f(3)]), ((), [f(2, 1, 4), f(3, 1)])]
TESTS = [((), [n(1, 5, 3), n(2, 5, 1)]), ((), [f(2, 3), f(3)])]
REDUCED = [
    ({"keepdims": 1}, [f(2, 3, 4), n(-1)]),
    ({"keepdims": 0}, [f(2, 3, 4), n(0, 2)]),
    ({}, [f(2, 3)]),
    ({"noop_with_empty_axes": 1}, [f(2, 3)]),
]
CONV = [
    ({"pads": [1, 1, 1, 1]}, [f(2, 4, 6, 5), f(8, 4, 3, 3), f(8)]),
    ({"strides": [2, 2], "pads": [0, 0, 1, 1]}, [f(1, 4, 6, 6), f(8, 4, 3, 3)]),
    ({"group": 4, "dilations": [2, 1]}, [f(1, 4, 7, 7), f(4, 1, 3, 3), f(4)]),
    ({"pads": [2, 2], "strides": [3]}, [f(2, 3, 11), f(5, 3, 4), f(5)]),
    ({"auto_pad": "VALID"}, [f(1, 2, 4, 4, 4), f(3, 2, 2, 2, 2)]),
]
SCALES, X34 = np.array([1, 1, 2.0, 1.5], np.float32), f(1, 2, 3, 4)
RESIZE = [
    ({"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}, [X34, None, SCALES]),
    ({"mode": "nearest"}, [f(1, 2, 5, 5), None, None, n(1, 2, 3, 8)]),
    ({"mode": "nearest", "nearest_mode": "ceil"}, [f(1, 2, 5, 5), None, None, n(1, 2, 4, 9)]),
    ({"mode": "nearest", "nearest_mode": "round_prefer_ceil"}, [f(1, 2, 4, 6), None, None, n(1, 2, 8, 3)]),
    ({"mode": "linear"}, [f(1, 2, 4, 5), None, SCALES]),
    ({"mode": "linear", "coordinate_transformation_mode": "align_corners"}, [f(1, 2, 4, 5), None, None, n(1, 2, 7, 9)]),
    ({"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"}, [X34, None, None, n(1, 2, 1, 3)]),
    ({"mode": "cubic"}, [f(1, 2, 4, 5), None, SCALES]),
    ({"mode": "cubic", "cubic_coeff_a": -0.5}, [f(1, 2, 8, 8), None, None, n(1, 2, 5, 16)]),
]
HEADS = {"num_heads": 2, "scale": 0.3}
QKV = [f(2, 5, 8), f(2, 7, 8), f(2, 7, 8)]
SELF = [f(2, 5, 8), f(2, 5, 8), f(2, 5, 8)]
SEEN = np.tril(np.ones((5, 7), bool), 1)

# By operator: attributes and inputs of nodes; `opset` and the number of `outputs` are the test's own.
CASES: dict[str, list[tuple[Any, list[np.ndarray | None]]]] = {
    "Abs": SOME,
    "Add": PAIR,
    "And": [((), [flags(2, 3), flags(3)])],
    "ArgMax": [({"axis": -1, "keepdims": 0}, [np.array([[1, 7, 7, 2], [9, 0, 9, 9]])]), ({}, [f(3, 4)])],
    "Attention": [
        ({"q_num_heads": 2, "kv_num_heads": 2, "opset": 23}, QKV),
        ({"q_num_heads": 2, "kv_num_heads": 2, "opset": 23, "scale": 0.2}, [*QKV, np.where(SEEN, 0, -9).astype("f")]),
        ({"q_num_heads": 2, "kv_num_heads": 2, "opset": 23}, [*QKV, SEEN]),
        ({"q_num_heads": 2, "kv_num_heads": 2, "opset": 23, "is_causal": 1}, SELF),
        ({"q_num_heads": 2, "kv_num_heads": 2, "opset": 23, "is_causal": 1}, [*SELF, f(5, 5)]),
        ({"q_num_heads": 4, "kv_num_heads": 2, "opset": 23}, [f(1, 3, 16), f(1, 3, 8), f(1, 3, 8)]),
        ({"opset": 23}, [f(1, 2, 3, 4), f(1, 2, 6, 4), f(1, 2, 6, 4)]),
    ],
    "Cast": [({"to": 7}, [np.array([1.7, -1.7], np.float32)]), ({"to": 1}, [flags(3)]), ({"to": 9}, [n(0, 2)])],
    "Ceil": SOME,
    "Clip": [
        ((), [f(9), np.float32(-0.5), np.float32(0.5)]),
        ((), [f(9), None, np.float32(0.2)]),
        ((), [f(9), np.float32(0)]),
        ((), [f(3)]),
    ],
    "Concat": [({"axis": 1}, [f(2, 3), f(2, 1), f(2, 2)]), ({"axis": -2}, [f(1, 3), f(2, 3)])],
    "Constant": [
        ({"value": ir.tensor(f(2, 2))}, []),
        ({"value_float": 0.5}, []),
        ({"value_ints": [3, 4]}, []),
        ({"value_floats": [3.0]}, []),
        ({"value_int": 4}, []),
    ],
    "ConstantOfShape": [({"value": ir.tensor(np.array([3], np.int64))}, [n(2, 3)]), ({}, [n(2)])],
    "Conv": CONV,
    "ConvTranspose": [
        ({"strides": [2, 2]}, [f(1, 3, 4, 5), f(3, 6, 2, 2)]),
        ({"strides": [4], "pads": [2, 2]}, [f(2, 3, 6), f(3, 4, 8), f(4)]),
        ({"strides": [2], "output_padding": [1], "group": 3, "dilations": [2]}, [f(2, 3, 6), f(3, 4, 3), f(12)]),
    ],
    "Cos": SOME,
    "CumSum": [((), [f(2, 4), np.array(1)]), ((), [n(1, 2, 3), np.array(-1, np.int32)])],
    "DepthToSpace": [
        ({"blocksize": 2, "mode": "CRD"}, [f(2, 12, 3, 4)]),
        ({"blocksize": 2}, [f(2, 12, 3, 4)]),
    ],
    "Div": [*PAIR, ((), [n(7, -7, 9), n(2, 2, -4)])],
    "Einsum": [
        ({"equation": "bct,bcs->bts"}, [f(2, 3, 4), f(2, 3, 5)]),
        ({"equation": "nhwpqc->nchpwq"}, [f(1, 2, 3, 2, 2, 4)]),
    ],
    "Equal": TESTS,
    "Erf": SOME,
    "Exp": SOME,
    "Expand": [((), [f(2, 1), n(3, 1, 4)]), ((), [f(2, 3), n(1)])],
    "Flatten": [({"axis": axis}, [f(2, 3, 4, 5)]) for axis in (0, 2, -1)] + [({}, [f(2, 3, 4)])],
    "Floor": SOME,
    "Gather": [
        ((), [f(5, 3), np.array([[0, -1], [4, 2]])]),
        ({"axis": 1}, [f(2, 5, 3), np.array(-2)]),
        ({"axis": -1}, [n(4, 5, 6), n(1)]),
    ],
    "GatherElements": [({"axis": 1}, [f(2, 4), np.array([[0, -1, 2], [3, 3, -4]])])],
    "GatherND": [((), [f(3, 4, 2), np.array([[0, -1], [2, 1]])]), ((), [f(3, 4), np.array([[[2]], [[0]]])])],
    "Gelu": [((), [f(9)]), ({"approximate": "tanh"}, [f(9)])],
    "Gemm": [
        ({"transB": 1}, [f(2, 3), f(4, 3), f(4)]),
        ({"transA": 1, "alpha": 0.5, "beta": 2.0}, [f(3, 2), f(3, 4), f(1, 4)]),
        ({}, [f(2, 3), f(3, 4)]),
    ],
    "Greater": TESTS,
    "GreaterOrEqual": TESTS,
    "GroupNormalization": [
        ({"num_groups": 2, "epsilon": 1e-3, "opset": 21}, [f(2, 6, 4, 3), f(6), f(6)]),
        ({"num_groups": 3, "opset": 18}, [f(2, 6, 5), f(3), f(3)]),
    ],
    "Identity": SOME,
    "InstanceNormalization": [({"epsilon": 1e-3}, [f(2, 4, 9), f(4), f(4)]), ({}, [f(2, 3, 4, 5), f(3), f(3)])],
    "IsNaN": [((), [HOLES])],
    "LayerNormalization": [
        ({}, [f(2, 3, 8), f(8), f(8)]),
        ({"axis": 1, "epsilon": 1e-2}, [f(2, 3, 4), f(3, 4)]),
    ],
    "LeakyRelu": [({"alpha": 0.2}, [f(9)]), ({}, [f(9)])],
    "Less": TESTS,
    "LessOrEqual": TESTS,
    "Log": [((), [p(5)])],
    "MatMul": [((), [f(2, 3, 4), f(4, 5)]), ((), [f(2, 1, 3, 4), f(5, 4, 2)]), ((), [f(3), f(3, 2)])],
    "Max": [((), [f(2, 3), f(3), f(2, 1)]), ((), [f(4)])],
    "Min": PAIR,
    "Mul": PAIR,
    "Neg": SOME,
    "Not": [((), [flags(4)])],
    "Or": [((), [flags(4), flags(1)])],
    "Pad": [
        ((), [f(2, 3), n(1, 0, 0, 2)]),
        ({"mode": "constant"}, [f(2, 3, 4), n(0, -1, 1, 0, 2, 0), np.float32(1.5)]),
        ({"mode": "reflect"}, [f(1, 4, 5), n(0, 3, 1, 0, 2, 4)]),
        ({"mode": "edge"}, [f(1, 4, 5), n(0, 1, 2, 0, 3, 1)]),
        ({"opset": 20}, [f(2, 3, 4), n(1, 2), np.float32(0), n(-1)]),
    ],
    "Pow": [((), [p(2, 3), np.float32(2)]), ((), [f(3), n(2)]), ((), [n(3, 4), np.float32(2)])],
    "RMSNormalization": [({"opset": 23}, [f(2, 3, 8), f(8)]), ({"opset": 23, "epsilon": 1e-2}, [f(2, 4), f(4)])],
    "Range": [((), [np.array(2), np.array(11), np.array(3)]), ((), [np.float32(1), np.float32(0), np.float32(-0.25)])],
    "Reciprocal": [((), [p(4)])],
    "ReduceL2": REDUCED,
    "ReduceMax": REDUCED,
    "ReduceMean": [*REDUCED, ({"axes": [1], "opset": 17}, [f(2, 3, 4)])],
    "ReduceMin": REDUCED,
    "ReduceSum": REDUCED,
    "Relu": SOME,
    "Reshape": [((), [f(2, 3, 4), n(0, -1)]), ({"allowzero": 1}, [f(2, 0), n(0, 4)]), ((), [f(1), n()])],
    "Resize": RESIZE,
    "Round": [((), [np.array([0.5, 1.5, -2.5, 1.2], np.float32)])],
    "Shape": [({}, [f(2, 3, 4)]), ({"start": 1, "end": -1}, [f(2, 3, 4)]), ({"start": -1}, [f(2, 3)])],
    "Sigmoid": SOME,
    "Sin": SOME,
    "Slice": [
        ((), [f(5, 6), n(1, -4), n(4, 99)]),
        ((), [f(5, 6), n(0), n(-1), n(-1)]),
        ((), [f(5, 6), n(0, -1), n(5, -(2**62)), n(1, 0), n(2, -2)]),
        ((), [f(5, 6), n(4), n(2), n(0)]),
    ],
    "Softmax": [({}, [f(2, 3, 4)]), ({"axis": 1}, [f(2, 3, 4)])],
    "Softplus": SOME,
    "Split": [
        ({"axis": 1, "num_outputs": 3, "outputs": 3}, [f(2, 7)]),
        ({"axis": -1, "outputs": 2}, [f(2, 7), n(3, 4)]),
        ({"num_outputs": 2, "outputs": 2}, [f(4, 3)]),
    ],
    "Sqrt": [((), [p(5)])],
    "Squeeze": [((), [f(2, 1, 3, 1), n(1, -1)]), ((), [f(2, 1, 1)])],
    "Sub": PAIR,
    "Tanh": SOME,
    "Tile": [((), [f(2, 3), n(2, 1)])],
    "Transpose": [({"perm": [2, 0, 1]}, [f(2, 3, 4)]), ({}, [f(2, 3, 4)])],
    "Unsqueeze": [((), [f(2, 3), n(0, -1)]), ((), [f(2, 3), n(2, 1)])],
    "Where": [((), [flags(2, 3), f(3), f(2, 1)])],
    "com.microsoft.MultiHeadAttention": [
        ({"num_heads": 2}, QKV),
        (HEADS, QKV),
        ({**HEADS, "unidirectional": 1}, SELF),
        (HEADS, [*QKV, None, None, f(1, 1, 5, 7)]),
        (HEADS, [*QKV, None, None, f(2, 2, 5, 7)]),
        ({"num_heads": 2}, [f(2, 5, 8), f(2, 7, 8), f(2, 7, 12)]),
    ],
}
EVERY = [(name, number) for name in CASES for number in range(len(CASES[name]))]


def node_of(name: str, number: int) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """A case as a graph and what it is fed."""
    attributes, inputs = CASES[name][number]
    attributes = dict(attributes)
    opset, outputs = attributes.pop("opset", 20), attributes.pop("outputs", 1)
    domain, _, op = name.rpartition(".")
    model = single(op, inputs, attributes, opset=opset, domain=domain, outputs=outputs)
    return model, {f"x{i}": np.asarray(each) for i, each in enumerate(inputs) if each is not None}


def tensors(feeds: dict[str, np.ndarray]) -> dict[str, Any]:
    """Arrays as torch has them."""
    return {name: torch.from_numpy(np.array(value)) for name, value in feeds.items()}
