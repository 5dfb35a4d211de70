"""Small graphs for trials and scans: one product, and a denoiser of convolutions, attention and a feed-forward."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper, parser, shape_inference

from edgekit.quant.choices import get_choice
from edgekit.quant.graph import Unit, find_units, from_matrix, lazy_initializer, normalised, weight_matrix
from edgekit.quant.lower.common import Store, rtn_store
from edgekit.quant.targets import Target
from edgekit.quant.weights import restore
from edgekit.runtime.backends import Session, open_session

Arrays = Mapping[str, np.ndarray]

TINY = """
<ir_version: 10, opset_import: ["" : 20]>
tiny (float[N,3,16,16] sample, float[N,5,24] text) => (float[N,3,16,16] out) {
    entry = Conv<pads=[1,1,1,1]>(sample, entry_w, entry_b)
    inner = Conv<pads=[1,1,1,1]>(entry, inner_w, inner_b)
    gate = Sigmoid(inner)
    active = Mul(inner, gate)
    beside = Conv(entry, beside_w)
    mixed = Add(active, beside)
    flat = Reshape(mixed, shape_flat)
    tokens = Transpose<perm=[0,2,1]>(flat)
    query = MatMul(tokens, query_w)
    key = MatMul(text, key_w)
    value = MatMul(text, value_w)
    key_t = Transpose<perm=[0,2,1]>(key)
    weights = MatMul(query, key_t)
    shares = Softmax<axis=-1>(weights)
    heard = MatMul(shares, value)
    told = MatMul(heard, told_w)
    sum = Add(tokens, told)
    wide = MatMul(sum, wide_w)
    kept = Relu(wide)
    narrow = MatMul(kept, narrow_w)
    done = Add(sum, narrow)
    back = Transpose<perm=[0,2,1]>(done)
    picture = Reshape(back, shape_back)
    out = Conv<pads=[1,1,1,1]>(picture, exit_w)
}
"""
SHAPES = {
    "entry_w": (16, 3, 3, 3),
    "entry_b": (16,),
    "inner_w": (20, 16, 3, 3),
    "inner_b": (20,),
    "beside_w": (20, 16, 1, 1),
    "query_w": (20, 24),
    "key_w": (24, 24),
    "value_w": (24, 24),
    "told_w": (24, 20),
    "wide_w": (20, 40),
    "narrow_w": (40, 20),
    "exit_w": (3, 20, 3, 3),
}


def tiny() -> ir.Model:
    """The denoiser, normalised. Weights of the size that keeps signals alive; the same every time."""
    rng = np.random.default_rng(7)
    weights: dict[str, Any] = {
        name: (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:] if len(shape) == 4 else shape[:1]))).astype("f")
        for name, shape in SHAPES.items()
    }
    weights["shape_flat"] = np.array([0, 20, -1])
    weights["shape_back"] = np.array([0, 20, 16, 16])
    return built(TINY, weights)


def linear(weight: np.ndarray, opset: int = 20) -> ir.Model:
    """y = x @ weight."""
    k, n = weight.shape
    text = f"""<ir_version: 10, opset_import: ["" : {opset}]>
    linear (float[N,{k}] x) => (float[N,{n}] y) {{ y = MatMul(x, w) }}"""
    return built(text, {"w": weight.astype(np.float32)})


def built(text: str, weights: Arrays) -> ir.Model:
    """A graph in ONNX' text format with initializers, its nodes named after what they make."""
    proto = parser.parse_model(text)
    for node in proto.graph.node:
        node.name = node.output[0]
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    onnx.checker.check_model(proto)
    return normalised(ir.from_proto(shape_inference.infer_shapes(proto)))


def feeds(count: int = 2, seed: int = 0) -> list[Arrays]:
    """Inputs of the denoiser."""
    rng = np.random.default_rng(seed)
    return [
        {
            "sample": rng.standard_normal((2, 3, 16, 16), dtype=np.float32),
            "text": rng.standard_normal((2, 5, 24), dtype=np.float32),
        }
        for _ in range(count)
    ]


def opened(model: ir.Model, folder: Path | None = None) -> Session:
    """A session of a model, by way of a file."""
    with tempfile.TemporaryDirectory() as made:
        path = (folder or Path(made)) / "opened.onnx"
        ir.save(model, path, external_data=f"{path.name}.data")
        return open_session(path, threads=1)


def rebuilt(
    model: ir.Model, units: Sequence[Unit], choices: Mapping[str, str], target: Target, store: Store = rtn_store
) -> Session:
    """The slow obvious twin of weight trials: a copy with the rounded weights in it."""
    copy = model.clone()
    for unit in units:
        if unit.id in choices:
            choice = get_choice(choices[unit.id])
            matrix = restore(store(weight_matrix(model, unit), choice, target.code_bits, unit))
            shape = tuple(copy.graph.initializers[unit.weight].const_value.shape)
            weight = from_matrix(matrix, unit, shape)
            made = lazy_initializer(copy.graph, f"{unit.id}.tried", lambda w=weight: w, ir.DataType.FLOAT, shape)
            node = next(node for node in copy.graph if node.name == unit.id)
            node.replace_input_with(0 if unit.op == "Gather" else 1, made)
    return opened(copy)


def watched(model: ir.Model, values: Sequence[str], feeds: Sequence[Arrays]) -> list[dict[str, np.ndarray]]:
    """What some values are on given inputs."""
    copy = model.clone()
    found = {value.name: value for node in copy.graph for value in node.outputs} | {
        v.name: v for v in copy.graph.inputs
    }
    have = {value.name for value in [*copy.graph.outputs, *copy.graph.inputs]}
    copy.graph.outputs.extend(found[name] for name in dict.fromkeys(values) if name not in have)
    session = opened(copy)
    return [{**each, **session.run(each)} for each in feeds]


def ranges_on(model: ir.Model, units: Sequence[Unit], given: Sequence[Arrays]) -> dict[str, tuple[float, float]]:
    """The whole range of what units read and make."""
    names = [name for unit in units if unit.op != "Gather" for name in (unit.data, unit.output)]
    seen = watched(model, names, given)
    return {
        name: (min(float(each[name].min()) for each in seen), max(float(each[name].max()) for each in seen))
        for name in names
    }


def units_of(model: ir.Model) -> tuple[Unit, ...]:
    """The model's units."""
    return find_units(model)
