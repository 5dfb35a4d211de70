"""Graphs of a few kilobytes in the shapes that rewrites look for, with random weights, and running them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper, shape_inference

from edgekit.quant.graph import normalised
from edgekit.runtime.backends import open_session

WIDTH, CHANNELS, TOKENS = 24, 16, 6
ELEMENT = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.float16): TensorProto.FLOAT16}
Shape = tuple[int | str, ...]


class Graph:
    """Nodes one after another; each call gives the name of its output."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def __call__(self, op: str, *inputs: Any, name: str | None = None, **attributes: Any) -> str:
        name = name or f"{op.lower()}{len(self.nodes)}"
        names = [each if isinstance(each, str) else self.constant(f"{name}.{i}", each) for i, each in enumerate(inputs)]
        self.nodes.append(helper.make_node(op, names, [name], name=f"node.{name}", **attributes))
        return name

    def constant(self, name: str, value: Any) -> str:
        """An initializer."""
        self.weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def normal(self, *shape: int) -> np.ndarray:
        """Random weights of gain about one."""
        fan = shape[0] if len(shape) == 2 else int(np.prod(shape[1:]))
        return (self.random.standard_normal(shape) / np.sqrt(fan)).astype(np.float32)

    def done(
        self,
        inputs: Mapping[str, Shape],
        outputs: Mapping[str, Shape],
        *,
        opset: int = 20,
        infer: bool = True,
        dtype: Any = np.float32,
    ) -> onnx.ModelProto:
        """The model; shapes of inner values are told unless `infer` is off."""
        infos = [
            [helper.make_tensor_value_info(name, ELEMENT[np.dtype(dtype)], shape) for name, shape in side.items()]
            for side in (inputs, outputs)
        ]
        graph = helper.make_graph(self.nodes, "g", *infos, self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        onnx.checker.check_model(model)
        return shape_inference.infer_shapes(model) if infer else model


def normal_form(proto: onnx.ModelProto) -> ir.Model:
    """What passes work on."""
    return normalised(ir.serde.deserialize_model(proto))


def run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All outputs by the engine, from a file with its weights beside it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        ir.save(model, path, external_data="graph.onnx.data", size_threshold_bytes=64)
        onnx.checker.check_model(str(path), full_check=True)
        return open_session(path, threads=1).run(feeds)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference relative to the largest element."""
    return float(np.abs(a.astype(np.float64) - b).max() / np.abs(b).max())


def keys_and_values(chain: Sequence[tuple[str, tuple[Any, ...], dict[str, Any]]] = (), **options: Any) -> ir.Model:
    """Queries (batch, 4, 16) attend to a text through two projections, behind a chain of (op, inputs, attributes)."""
    make = Graph(options.pop("seed", 0))
    text: Shape = options.pop("text", ("batch", TOKENS, WIDTH))
    dtype = options.get("dtype", np.float32)
    data = "text"
    for op, more, attributes in chain:
        data = make(op, data, *more, **attributes)
    k, v = (make("MatMul", data, make.normal(WIDTH, CHANNELS).astype(dtype), name=name) for name in ("key", "value"))
    scores = make("MatMul", "query", make("Transpose", k, perm=[0, 2, 1]))
    make("MatMul", make("Softmax", make("Mul", scores, np.asarray(0.2, dtype)), axis=-1), v, name="out")
    frames = "frames" if chain and len(chain) > 1 else "batch"
    queries: Shape = (frames, 4, CHANNELS)
    return normal_form(make.done({"query": queries, "text": text}, {"out": queries}, **options))


def two_texts(seed: int = 0, chain: Sequence[tuple[str, dict[str, Any]]] = (), dtype: Any = np.float32) -> ir.Model:
    """As `keys_and_values`, of two texts side by side along their width (16 and 24), as SDXL has them."""
    make, data = Graph(seed), "joined"
    make("Concat", "text", "text_2", axis=-1, name="joined")
    for op, attributes in chain:
        data = make(op, data, **attributes)
    k, v = (make("MatMul", data, make.normal(40, CHANNELS).astype(dtype), name=name) for name in ("key", "value"))
    scores = make("MatMul", "query", make("Transpose", k, perm=[0, 2, 1]))
    make("MatMul", make("Softmax", make("Mul", scores, np.asarray(0.2, dtype)), axis=-1), v, name="out")
    query: Shape = ("batch", 4, CHANNELS)
    texts: dict[str, Shape] = {"text": ("batch", "length", 16), "text_2": ("batch", "length", 24)}
    return normal_form(make.done({"query": query, **texts}, {"out": query}, dtype=dtype))


def tiny_unet(seed: int = 0, *, text: Shape = ("batch", TOKENS, WIDTH), infer: bool = True) -> onnx.ModelProto:
    """A UNet in Stable Diffusion's form: a block with attention to a text, and a block on a raw concatenation."""
    make, c = Graph(seed), CHANNELS
    pad = {"pads": [1] * 4}
    time = make("Reshape", make("Mul", "timestep", np.float32(1e-3)), np.array([-1, 1, 1, 1]))
    first = make("Conv", "sample", make.normal(c, 4, 3, 3), make.normal(c, 1)[:, 0], name="conv_in", **pad)
    deep = make("Conv", make("Add", first, time), make.normal(c, c, 3, 3), name="down", **pad)
    rows = make("Transpose", make("Reshape", deep, np.array([0, c, -1])), perm=[0, 2, 1])
    normed = make("LayerNormalization", rows, 1 + make.normal(c, 1)[:, 0], make.normal(c, 1)[:, 0], name="norm1")
    q = make("MatMul", normed, make.normal(c, c), name="to_q")
    k, v = (make("MatMul", "encoder_hidden_states", make.normal(WIDTH, c), name=name) for name in ("to_k", "to_v"))
    weights = make("Softmax", make("MatMul", q, make("Transpose", k, perm=[0, 2, 1])), axis=-1)
    mixed = make("Add", make("MatMul", make("MatMul", weights, v), make.normal(c, c), name="to_out"), rows)
    again = make("LayerNormalization", mixed, 1 + make.normal(c, 1)[:, 0], make.normal(c, 1)[:, 0], name="norm2")
    wide = make("Add", make("MatMul", again, make.normal(c, 2 * c), name="ff_in"), make.normal(2 * c, 1)[:, 0])
    fed = make("Add", make("MatMul", make("Gelu", wide), make.normal(2 * c, c), name="ff_out"), mixed)
    back = make("Reshape", make("Transpose", fed, perm=[0, 2, 1]), make("Shape", deep))
    joined = make("Concat", make("Add", back, deep, name="hidden"), first, axis=1, name="skip")
    beside = make("Conv", joined, make.normal(c, 2 * c, 1, 1), make.normal(c, 1)[:, 0], name="shortcut")
    inner = make("Conv", make("Mul", joined, make("Sigmoid", joined)), make.normal(c, 2 * c, 3, 3), name="conv1", **pad)
    make("Conv", make("Tanh", make("Add", inner, beside)), make.normal(4, c, 3, 3), name="out_sample", **pad)
    latent: Shape = ("batch", 4, "height", "width")
    inputs: dict[str, Shape] = {"sample": latent, "timestep": ("batch",), "encoder_hidden_states": text}
    return make.done(inputs, {"out_sample": latent}, infer=infer)


def prompts(count: int, *, larger: float = 30.0, width: int = WIDTH, tokens: int = TOKENS, seed: int = 7) -> np.ndarray:
    """Texts as CLIP encodes them: (count, tokens, width), a first row that is the same for all and `larger`."""
    random = np.random.default_rng(seed)
    text = np.clip(random.standard_normal((count, tokens, width)), -3, 3).astype(np.float32)
    first = np.random.default_rng(99).standard_normal(width)
    text[:, 0] = first / np.abs(first).max() * larger * 3
    return text


def unet_feeds(text: np.ndarray, seed: int = 3) -> dict[str, np.ndarray]:
    """Inputs of `tiny_unet`."""
    random = np.random.default_rng(seed)
    sample = random.standard_normal((len(text), 4, 4, 6)).astype(np.float32)
    return {"sample": sample, "timestep": np.full(len(text), 999.0, np.float32), "encoder_hidden_states": text}
