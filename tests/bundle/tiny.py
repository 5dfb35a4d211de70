"""Good bundles of a few kilobytes, one of each contract, and the tools to spoil them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekit.bundle.graphfile import read_graph
from edgekit.bundle.manifest import (
    FORMAT,
    MANIFEST_FILE,
    Decoding,
    KVCacheLayout,
    Manifest,
    Part,
    Provenance,
    TensorSpec,
    Tokenizer,
)
from edgekit.bundle.recipe import Call, Decode, Denoise, Init, NoiseSchedule, Recipe, Sampler, Stage, Table
from edgekit.bundle.store import new_bundle, sha256_file

HIDDEN, LENGTH, VOCABULARY, LAYERS, HEADS, HEAD_DIM = 4, 8, 16, 2, 2, 4
ELEMENT = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "int32": TensorProto.INT32}
Info = tuple[str, str, tuple[Any, ...]]  # name, dtype, shape

ROW = (999.0, 1.0, 1.2, -0.9, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)
KV_SHAPE = ("batch", HEADS, "capacity", HEAD_DIM)
KV: list[Info] = [(f"{i}.{half}", "float32", KV_SHAPE) for i in range(LAYERS) for half in ("key", "value")]
LANGUAGE: dict[str, list[Info]] = {
    "ort": [
        ("input_ids", "int64", ("batch", "seq")),
        ("position_ids", "int64", ("batch", "seq")),
        ("seqlens_k", "int32", ("batch",)),
        ("total_sequence_length", "int32", ()),
        ("rows", "int64", ("rows",)),
        ("attention_bias", "float32", (1, 1, "seq", "total")),
        *((f"past.{name}", dtype, shape) for name, dtype, shape in KV),
    ],
    "std": [
        ("input_ids", "int64", ("batch", "seq")),
        ("position_ids", "int64", ("batch", "seq")),
        ("write_indices", "int64", ("batch",)),
        ("rows", "int64", ("rows",)),
        ("attention_bias", "float32", ("batch", 1, "seq", "capacity")),
        *((f"past.{name}", dtype, shape) for name, dtype, shape in KV),
    ],
}


def infos(rows: list[Info]) -> list[onnx.ValueInfoProto]:
    """Graph inputs or outputs."""
    return [helper.make_tensor_value_info(name, ELEMENT[dtype], shape) for name, dtype, shape in rows]


def model(
    nodes: list[onnx.NodeProto], inputs: list[Info], outputs: list[Info], weights: dict[str, Any], opset: int = 21
) -> onnx.ModelProto:
    """A model of one graph."""
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", infos(inputs), infos(outputs), tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def text_encoder() -> onnx.ModelProto:
    """Token ids to embeddings."""
    table = np.linspace(-1, 1, VOCABULARY * HIDDEN, dtype=np.float32).reshape(VOCABULARY, HIDDEN)
    node = helper.make_node("Gather", ["embedding", "input_ids"], ["last_hidden_state"])
    hidden = ("last_hidden_state", "float32", ("batch", LENGTH, HIDDEN))
    return model([node], [("input_ids", "int64", ("batch", LENGTH))], [hidden], {"embedding": table})


def unet() -> onnx.ModelProto:
    """Sample, timestep and text to a prediction: a gain, plus their means."""
    nodes = [
        helper.make_node("ReduceMean", ["encoder_hidden_states"], ["text"], keepdims=0),
        helper.make_node("ReduceMean", ["timestep"], ["time"], keepdims=0),
        helper.make_node("Mul", ["sample", "gain"], ["scaled"]),
        helper.make_node("Add", ["scaled", "text"], ["told"]),
        helper.make_node("Add", ["told", "time"], ["out_sample"]),
    ]
    latent = ("batch", 4, "height", "width")
    inputs: list[Info] = [
        ("sample", "float32", latent),
        ("timestep", "float32", ("batch",)),
        ("encoder_hidden_states", "float32", ("batch", LENGTH, HIDDEN)),
    ]
    gain = np.full((1, 4, 1, 1), 0.5, np.float32)
    return model(nodes, inputs, [("out_sample", "float32", latent)], {"gain": gain})


def vae_decoder() -> onnx.ModelProto:
    """Four latent channels to three colours."""
    node = helper.make_node("Conv", ["latent_sample", "kernel"], ["sample"])
    kernel = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4, 1, 1)
    inputs: list[Info] = [("latent_sample", "float32", ("batch", 4, "height", "width"))]
    return model([node], inputs, [("sample", "float32", ("batch", 3, "height", "width"))], {"kernel": kernel})


def decoder(dialect: str = "ort") -> onnx.ModelProto:
    """The signature of a language graph around an embedding: caches pass through unchanged."""
    logits = np.linspace(-1, 1, VOCABULARY**2, dtype=np.float32).reshape(VOCABULARY, VOCABULARY)
    nodes = [
        helper.make_node("Gather", ["input_ids", "rows"], ["asked"], axis=1),
        helper.make_node("Gather", ["table", "asked"], ["logits"]),
        *(helper.make_node("Identity", [f"past.{name}"], [f"present.{name}"]) for name, _, _ in KV),
    ]
    outputs: list[Info] = [("logits", "float32", ("batch", "rows", VOCABULARY))]
    outputs += [(f"present.{name}", dtype, shape) for name, dtype, shape in KV]
    return model(nodes, LANGUAGE[dialect], outputs, {"table": logits})


def save(proto: onnx.ModelProto, path: Path) -> None:
    """Write a graph with every weight in `<name>.data` beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(
        proto, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0, convert_attribute=True
    )


def part(root: Path, name: str) -> Part:
    """The row of a graph that was saved under `graphs/`."""
    graph = read_graph(root / f"graphs/{name}.onnx")
    specs = [[TensorSpec(t.name, t.dtype, t.shape) for t in side] for side in (graph.inputs, graph.outputs)]
    return Part(f"graphs/{name}.onnx", tuple(specs[0]), tuple(specs[1]), (f"graphs/{name}.onnx.data",))


def tokenizer(root: Path, length: int | None = None) -> Tokenizer:
    """A word-level tokenizer of a few words."""
    file = root / "tokenizer/tokenizer.json"
    file.parent.mkdir(exist_ok=True)
    words = {word: i for i, word in enumerate(("<pad>", "a", "red", "green", "apple", "pear"))}
    file.write_text(
        json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": words, "unk_token": "<pad>"}})
    )
    return Tokenizer("tokenizer/tokenizer.json", sha256_file(file), length, 0)


def image_recipe() -> Recipe:
    """Text encoder, then LCM in one, two or four steps, then a decoder."""
    sampler = Sampler("lcm", 2, (1, 2, 4), noise_schedule=NoiseSchedule())
    hidden = "text_encoder.last_hidden_state"
    denoise = Denoise("unet", {"sample": "@x", "timestep": "@t", "encoder_hidden_states": hidden}, "out_sample")
    decode = Decode("vae_decoder", {"latent_sample": "@latent"}, "sample", scale=0.18215)
    stage = Stage("base", Init(channels=4, width=64, height=64), sampler, denoise, decode=decode)
    return Recipe((stage,), (Call("text_encoder", {"input_ids": "@tokens"}),))


def image_draft(root: Path) -> Manifest:
    """Write the files of a text-to-image bundle; the manifest lacks its files."""
    for name, make in (("text_encoder", text_encoder), ("unet", unet), ("vae_decoder", vae_decoder)):
        save(make(), root / f"graphs/{name}.onnx")
    return Manifest(
        FORMAT,
        "text-to-image",
        "tiny-diffusion",
        {name: part(root, name) for name in ("text_encoder", "unet", "vae_decoder")},
        (),
        Provenance("tests", "0" * 64),
        tokenizers={"default": tokenizer(root, LENGTH)},
        recipe=image_recipe(),
        tables=tuple(Table("base", steps, 1.0, (ROW,) * steps) for steps in (1, 2, 4)),
    )


def text_draft(root: Path, dialect: str = "ort") -> Manifest:
    """Write the files of a text-generation bundle; the manifest lacks its files."""
    save(decoder(dialect), root / "graphs/decoder.onnx")
    layout = KVCacheLayout(LAYERS, HEADS, HEAD_DIM)
    return Manifest(
        FORMAT,
        "text-generation",
        "tiny-language",
        {"decoder": part(root, "decoder")},
        (),
        Provenance("tests", "0" * 64),
        tokenizers={"default": tokenizer(root)},
        decoding=Decoding("decoder", dialect, 128, VOCABULARY, layout, eos=(0,)),  # type: ignore[arg-type]
    )


def write(target: Path, draft: Callable[..., Manifest], *args: Any, overwrite: bool = False) -> Manifest:
    """A finished bundle at `target`."""
    with new_bundle(target, overwrite=overwrite) as made:
        return made.seal(draft(made.root, *args))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change `edgekit.json` as a person with an editor would: no check stands in the way."""
    file = folder / MANIFEST_FILE
    told = json.loads(file.read_text())
    change(told)
    file.write_text(json.dumps(told))


def relist(folder: Path) -> None:
    """Make the declared sizes and hashes those of the files that are there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    rows = [
        {"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in files
    ]
    edit(folder, lambda told: told.update(files=rows))
