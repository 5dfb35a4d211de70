"""What an attacker, a bad disk or a careless tool does to a bundle: small functions that spoil a good folder."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from edgekit.bundle.manifest import MANIFEST_FILE
from edgekit.bundle.store import read_bundle
from edgekit.errors import BundleError, WrongHash
from tests.bundle import tiny

Told = dict[str, Any]
Spoil = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """One way to spoil a bundle, the error it must end in, and words its message must hold."""

    name: str
    spoil: Spoil
    error: type[BundleError]
    words: str


def refused(bundle: Path, case: Case) -> None:
    """The error is of exactly this class, ends the command with 5, and names the fault; with or without hashing."""
    with pytest.raises(BundleError) as caught:
        read_bundle(bundle)
    assert type(caught.value) is case.error, repr(caught.value)
    assert caught.value.exit_code == 5
    assert case.words in str(caught.value)
    if case.error is not WrongHash:
        with pytest.raises(case.error):
            read_bundle(bundle, verify=False)


def told(change: Callable[[Told], object]) -> Spoil:
    """Change the manifest alone."""
    return lambda folder: tiny.edit(folder, change)


def manifest_bytes(raw: bytes) -> Spoil:
    """Replace the manifest's bytes."""
    return lambda folder: (folder / MANIFEST_FILE).write_bytes(raw)


def manifest_text(old: str, new: str) -> Spoil:
    """Replace text in the manifest; the text must be there."""

    def spoil(folder: Path) -> None:
        file = folder / MANIFEST_FILE
        tiny.edit(folder, lambda _: None)  # compact spelling: "key": value
        text = file.read_text()
        assert old in text, text
        file.write_text(text.replace(old, new, 1))

    return spoil


def at(path: str, value: Any) -> Spoil:
    """Set one field, `recipe/stages/0/denoise/part`."""

    def change(node: Any) -> None:
        *way, last = path.split("/")
        for key in way:
            node = node[int(key) if isinstance(node, list) else key]
        node[int(last) if isinstance(node, list) else last] = value

    return told(change)


def both(*spoils: Spoil) -> Spoil:
    """One after another."""
    return lambda folder: [spoil(folder) for spoil in spoils]


# ------------------------------------------------------------------------------------------------------- files


def replaced(path: str, put: Callable[[Path], object]) -> Spoil:
    """Put something else where a file was."""

    def spoil(folder: Path) -> None:
        (folder / path).unlink()
        put(folder / path)

    return spoil


def linked(path: str, outside: str = "/etc/hostname") -> Spoil:
    """A link where a file was."""
    return replaced(path, lambda place: place.symlink_to(outside))


def linked_folder(folder: Path) -> None:
    """A folder that is a link to a folder with the very same files."""
    moved = (folder / "graphs").rename(folder.parent / "elsewhere")
    (folder / "graphs").symlink_to(moved)


def unix_socket(place: Path) -> None:
    """A socket; its address is short, because socket addresses must be."""
    here = os.open(place.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{here}/{place.name}")
    os.close(here)


def extra(path: str, content: bytes = b"hello") -> Spoil:
    """A file nobody listed."""

    def spoil(folder: Path) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)

    return spoil


def changed(path: str, change: Callable[[bytes], bytes]) -> Spoil:
    """Other bytes in a file, the manifest left as it was."""
    return lambda folder: (folder / path).write_bytes(change((folder / path).read_bytes()))


def flipped(raw: bytes) -> bytes:
    """The same number of bytes, one bit different."""
    return raw[:-1] + bytes([raw[-1] ^ 1])


# ------------------------------------------------------------------------------------------------------- graphs

GRAPH = "graphs/unet.onnx"


def graph_bytes(change: Callable[[bytes], bytes], path: str = GRAPH) -> Spoil:
    """Other bytes in a graph, with size and hash declared to match: only the graph itself can give it away."""
    return both(changed(path, change), tiny.relist)


def graph(change: Callable[[onnx.ModelProto], object]) -> Spoil:
    """Another graph, declared truthfully."""

    def rewrite(raw: bytes) -> bytes:
        proto = onnx.load_from_string(raw)
        change(proto)
        return proto.SerializeToString()

    return graph_bytes(rewrite)


def outside(location: str, name: str = "stolen", **entries: str) -> onnx.TensorProto:
    """A tensor whose bytes lie at `location`."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def initializer(location: str, **entries: str) -> Spoil:
    """An initializer from elsewhere."""
    return graph(lambda proto: proto.graph.initializer.append(outside(location, **entries)))


def sparse(location: str) -> Spoil:
    """A sparse initializer whose indices come from elsewhere."""

    def change(proto: onnx.ModelProto) -> None:
        values = helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0])
        proto.graph.sparse_initializer.add(values=values, indices=outside(location), dims=[4])

    return graph(change)


def constant(location: str) -> onnx.NodeProto:
    """A Constant node whose value comes from elsewhere."""
    node = helper.make_node("Constant", [], ["stolen"])
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR, t=outside(location))
    return node


def attribute(location: str) -> Spoil:
    """A tensor attribute from elsewhere."""
    return graph(lambda proto: proto.graph.node.append(constant(location)))


def subgraph(location: str) -> Spoil:
    """The same, three subgraphs down."""

    def change(proto: onnx.ModelProto) -> None:
        node = constant(location)
        for depth in range(3):
            inner = helper.make_graph([node], f"inner{depth}", [], [])
            node = helper.make_node("If", ["condition"], [f"out{depth}"], then_branch=inner, else_branch=inner)
        proto.graph.node.append(node)

    return graph(change)


def function(location: str) -> Spoil:
    """The same, in the body of a model-local function."""

    def change(proto: onnx.ModelProto) -> None:
        body = helper.make_function("own", "F", [], ["stolen"], [constant(location)], [helper.make_opsetid("", 21)])
        proto.functions.append(body)

    return graph(change)


def default_attribute(location: str) -> Spoil:
    """The same, as the default value of a function's attribute."""

    def change(proto: onnx.ModelProto) -> None:
        body = helper.make_function("own", "F", [], [], [], [helper.make_opsetid("", 21)])
        body.attribute_proto.add(name="w", type=onnx.AttributeProto.TENSOR, t=outside(location))
        proto.functions.append(body)

    return graph(change)


def training(location: str) -> Spoil:
    """The same, in the training graph that no runtime executes but some load."""
    return graph(lambda proto: proto.training_info.add().initialization.initializer.append(outside(location)))


def split_attribute(raw: bytes) -> bytes:
    """A tensor attribute in two halves, each harmless, that a parser merges into one from elsewhere."""
    tensor = outside("../../secret")
    first, second = onnx.TensorProto(), onnx.TensorProto()
    first.CopyFrom(tensor)
    first.ClearField("external_data")
    first.data_location = TensorProto.DEFAULT
    second.external_data.extend(tensor.external_data)
    value = field(1, b"value") + field(5, first.SerializeToString()) + field(5, second.SerializeToString())
    node = field(4, b"Constant") + field(2, b"stolen") + field(5, value)
    return raw + field(7, field(1, node))


def two_graphs(raw: bytes) -> bytes:
    """A second graph field: a parser adds its inputs to the first one's."""
    late = onnx.GraphProto(input=tiny.infos([("late", "float32", ("batch",))]))
    return raw + field(7, late.SerializeToString())


# ------------------------------------------------------------------------------------------ protobuf, by hand


def varint(value: int) -> bytes:
    """Base 128, least significant group first."""
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, payload: bytes, claimed: int | None = None) -> bytes:
    """A length-delimited field; `claimed` lies about the length."""
    return varint(number << 3 | 2) + varint(len(payload) if claimed is None else claimed) + payload


def nested_graphs(depth: int) -> bytes:
    """Graph in attribute in node in graph, `depth` times."""
    inner = b""
    for _ in range(depth):
        inner = field(1, field(5, field(6, inner)))
    return field(7, inner)
