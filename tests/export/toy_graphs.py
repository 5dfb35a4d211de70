"""Graphs with random weights for tests of gradient probes: a small denoiser, a linear chain, single operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from edgekit.export.graph_torch import run_graph
from edgekit.quant.graph import normalised
from edgekit.quant.pictures import Call

MICROSOFT = "com.microsoft"
WIDTH, SIDE, TEXT, TOKENS = 32, 16, 24, 6
Range = tuple[float, float]


class Builder:
    """Nodes one after another; a call gives the name of the node's output."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def __call__(self, op: str, *inputs: Any, domain: str = "", **attributes: Any) -> str:
        name = f"{op.lower()}{len(self.nodes)}"
        names = [each if isinstance(each, str) else self.constant(each) for each in inputs]
        self.nodes.append(helper.make_node(op, names, [name], name=f"node.{name}", domain=domain, **attributes))
        return name

    def constant(self, value: Any) -> str:
        """An initializer."""
        name = f"weight{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def matrix(self, *shape: int, fan: int) -> np.ndarray:
        """Weights with a heavy tail, and of another size for each layer: so layers differ in what rounding costs."""
        gain = np.exp(self.random.uniform(-2.0, 0.3)) / np.sqrt(1.5 * fan)
        return (gain * self.random.standard_t(6, shape)).astype(np.float32)

    def conv(self, x: str, into: int, out: int, kernel: int = 3) -> str:
        """A convolution that keeps the size."""
        weight = self.matrix(out, into, kernel, kernel, fan=into * kernel**2)
        return self("Conv", x, weight, self.matrix(out, fan=out), pads=[kernel // 2] * 4)

    def linear(self, x: str, into: int, out: int) -> str:
        """A product of the last axis, with a bias."""
        return self("Add", self("MatMul", x, self.matrix(into, out, fan=into)), self.matrix(out, fan=out))

    def norm(self, x: str, channels: int) -> str:
        """A group norm as the exporter writes it, and SiLU."""
        grouped = self("Reshape", x, np.array([0, 4, -1]))
        flat = self("InstanceNormalization", grouped, np.ones(4, np.float32), np.zeros(4, np.float32))
        x = self("Reshape", flat, self("Shape", x))
        x = self("Mul", x, np.full((1, channels, 1, 1), 0.9, np.float32))
        return self("Mul", x, self("Sigmoid", x))

    def block(self, x: str, into: int) -> str:
        """A residual block down to WIDTH, with a 1x1 shortcut where the widths differ."""
        h = self.conv(self.norm(x, into), into, WIDTH)
        h = self.conv(self.norm(h, WIDTH), WIDTH, WIDTH)
        return self("Add", h, x if into == WIDTH else self.conv(x, into, WIDTH, kernel=1))

    def transformer(self, x: str) -> str:
        """Self attention, cross attention to `text`, and a feed-forward layer."""
        flat = self("Reshape", x, np.array([0, WIDTH, -1]))
        tokens = self("Transpose", flat, perm=[0, 2, 1])
        for context, width in ((None, WIDTH), ("text", TEXT)):
            h = self("LayerNormalization", tokens, np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32))
            query = self.linear(h, WIDTH, WIDTH)
            key, value = (self.linear(context or h, width, WIDTH) for _ in range(2))
            h = self("MultiHeadAttention", query, key, value, domain=MICROSOFT, num_heads=2)
            tokens = self("Add", tokens, self.linear(h, WIDTH, WIDTH))
        h = self("Gelu", self.linear(tokens, WIDTH, 4 * WIDTH))
        tokens = self("Add", tokens, self.linear(h, 4 * WIDTH, WIDTH))
        back = self("Transpose", tokens, perm=[0, 2, 1])
        return self("Reshape", back, self("Shape", x))

    def done(
        self, inputs: Mapping[str, Sequence[int | str]], outputs: Mapping[str, Sequence[int | str]], opset: int = 20
    ) -> ir.Model:
        """The normalised graph."""
        sides = [
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in side.items()]
            for side in (inputs, outputs)
        ]
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
        graph = helper.make_graph(self.nodes, "toy", *sides, self.weights)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        return normalised(ir.from_proto(onnx.shape_inference.infer_shapes(model)))


def toy_unet(seed: int = 0) -> ir.Model:
    """A denoiser of (batch, 4, 16, 16) with a text input: 26 units of every role that matters."""
    b = Builder(seed)
    first = b.conv("sample", 4, WIDTH)
    x = b.transformer(b.block(first, WIDTH))
    x = b.transformer(b.block(b("Concat", x, first, axis=1), 2 * WIDTH))
    b.nodes[-1].output[0] = "last"
    b.nodes.append(helper.make_node("Identity", [b.conv(b.norm("last", WIDTH), WIDTH, 4)], ["out"], name="node.out"))
    inputs = {"sample": ["batch", 4, SIDE, SIDE], "text": ["batch", TOKENS, TEXT]}
    return b.done(inputs, {"out": ["batch", 4, SIDE, SIDE]})


def linear_chain(seed: int = 0, *, outputs: int = 1) -> ir.Model:
    """x (batch, 24) through two matrices: out = x A B; a second output is x A C."""
    b = Builder(seed)
    middle = b("MatMul", "x", b.matrix(24, 32, fan=24))
    named = {}
    for number in range(outputs):
        name = b("MatMul", middle, b.matrix(32, 16, fan=32))
        b.nodes[-1].output[0] = name = f"out{number}"
        named[name] = ["batch", 16]
    return b.done({"x": ["batch", 24]}, named)


def single(
    op: str,
    inputs: Sequence[np.ndarray | None],
    attributes: Mapping[str, Any],
    *,
    opset: int = 20,
    domain: str = "",
    outputs: int = 1,
) -> ir.Model:
    """A graph of one node; inputs are x0, x1, ... and outputs y0, y1, ..."""
    values = [
        None
        if each is None
        else ir.Value(name=f"x{i}", type=ir.TensorType(ir.tensor(each).dtype), shape=ir.Shape(each.shape))
        for i, each in enumerate(inputs)
    ]
    node = ir.node(op, values, attributes=dict(attributes), domain=domain, num_outputs=outputs, name=f"the.{op}")
    for i, value in enumerate(node.outputs):
        value.name = f"y{i}"
    graph = ir.Graph(
        [value for value in values if value is not None],
        node.outputs,
        nodes=[node],
        name="single",
        opset_imports={"": opset, MICROSOFT: 1},
    )
    return ir.Model(graph, ir_version=10)


def run_ort(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What ONNX Runtime answers, with nothing fused."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    raw = ir.to_proto(model).SerializeToString()
    answers: list[np.ndarray] = onnxruntime.InferenceSession(raw, options).run(None, dict(feeds))
    return answers


def calls_of(feeds: Sequence[Mapping[str, np.ndarray]], **gain: float) -> tuple[Call, ...]:
    """Recorded runs whose answers nobody asks for."""
    return tuple(Call(each, {}, gain) for each in feeds)


def ranges_of(model: ir.Model, calls: Sequence[Call]) -> dict[str, Range]:
    """Lowest and highest of every float value over some runs."""
    ranges: dict[str, Range] = {}

    def watch(node: ir.Node, inputs: Any, outputs: Any) -> None:
        for value, tensor in zip((*node.inputs, *node.outputs), (*inputs, *outputs), strict=True):
            if tensor is not None and tensor.is_floating_point():
                low, high = ranges.get(value.name, (0.0, 0.0))
                ranges[value.name] = min(low, float(tensor.min())), max(high, float(tensor.max()))

    with torch.no_grad():
        for call in calls:
            run_graph(model, {name: torch.from_numpy(array) for name, array in call.feeds.items()}, watch=watch)
    return ranges


def chain_feeds(runs: int = 2, batch: int = 3) -> tuple[Call, ...]:
    """Inputs of the linear chain."""
    random = np.random.default_rng(2)
    return calls_of([{"x": random.standard_normal((batch, 24)).astype(np.float32)} for _ in range(runs)])
