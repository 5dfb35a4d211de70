"""Each way to spoil a bundle is refused with its own error, exit code 5, and nothing loaded.

The table is the format's threat model: a new attack is a new row.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from edgekit.bundle.manifest import MANIFEST_FILE
from edgekit.bundle.store import read_bundle
from edgekit.errors import (
    BadGraph,
    BadManifest,
    ExtraFile,
    MissingFile,
    TableMismatch,
    UnfedInput,
    UnknownFormat,
    UnsafePath,
    WrongHash,
    WrongSize,
)
from tests.hostile.spoil import (
    GRAPH,
    Case,
    at,
    attribute,
    both,
    changed,
    default_attribute,
    extra,
    field,
    flipped,
    function,
    graph,
    graph_bytes,
    initializer,
    linked,
    linked_folder,
    manifest_bytes,
    manifest_text,
    nested_graphs,
    refused,
    replaced,
    sparse,
    split_attribute,
    subgraph,
    told,
    training,
    two_graphs,
    unix_socket,
    varint,
)

DATA = "graphs/unet.onnx.data"
STAGE = "recipe/stages/0"
NET_FEEDS = f"{STAGE}/denoise/feeds"

MANIFEST_BYTES = [
    Case("empty manifest", manifest_bytes(b""), BadManifest, "edgekit.json"),
    Case("not JSON", manifest_bytes(b"PK\x03\x04 not json"), BadManifest, "malformed"),
    Case("not UTF-8", manifest_bytes(b'{"format": 1, "task": "\xff\xfe"}'), BadManifest, "edgekit.json"),
    Case("a list", manifest_bytes(b"[1, 2]"), BadManifest, "array"),
    Case("cut in the middle", changed(MANIFEST_FILE, lambda raw: raw[: len(raw) // 2]), BadManifest, "truncated"),
    Case("deep lists", manifest_bytes(b"[" * 1_000_000), BadManifest, "deep"),
    Case("deep objects", manifest_bytes(b'{"format":' * 200_000), BadManifest, "deep"),
    Case("brackets in a string", manifest_bytes(b'{"format": "' + b"[" * 99 + b'\\""}'), UnknownFormat, "[["),
    Case("more than 64 MiB", manifest_bytes(b" " * (64 * 2**20 + 1)), WrongSize, "limit"),
    Case("a key twice", manifest_text('"family":', '"family": "other", "family":'), BadManifest, "twice"),
    Case("NaN in a table", manifest_text("999.0", "NaN"), BadManifest, "malformed"),
    Case("infinity in a table", manifest_text("999.0", "1e999"), BadManifest, "range"),
    Case("a lone surrogate", manifest_text("tiny-diffusion", "\\ud800"), BadManifest, "edgekit.json"),
]

MANIFEST_TYPES = [
    Case("next version", at("format", 2), UnknownFormat, "reads 1"),
    Case("no version", told(lambda m: m.pop("format")), UnknownFormat, "None"),
    Case("version as text", at("format", "1"), UnknownFormat, "'1'"),
    Case("version as a truth", at("format", True), BadManifest, "format"),
    Case("unknown field", at("run_after_load", "script.py"), BadManifest, "run_after_load"),
    Case("unknown field of a part", at("parts/unet/loader", "pickle"), BadManifest, "loader"),
    Case("unknown task", at("task", "mining"), BadManifest, "mining"),
    Case("a missing field", told(lambda m: m.pop("provenance")), BadManifest, "provenance"),
    Case("a number for a list", at("files", 3), BadManifest, "files"),
    Case("text for a number", at("files/0/bytes", "12"), BadManifest, "bytes"),
    Case("negative size", at("files/0/bytes", -1), BadManifest, "bytes"),
    Case("size of 2**60", at("files/0/bytes", 2**60), BadManifest, "bytes"),
    Case("size of 2**47", at("files/0/bytes", 2**47), WrongSize, "140,737,488,355,328"),
    Case("size beyond 64 bits", at("files/0/bytes", 2**70), BadManifest, "bytes"),
    Case("a short hash", at("files/0/sha256", "abc"), BadManifest, "sha256"),
    Case("an unknown dtype", at("parts/unet/inputs/0/dtype", "object"), BadManifest, "dtype"),
    Case("a dimension of 2**41", at("parts/unet/inputs/0/shape", [2**41]), BadManifest, "shape"),
    Case("a huge shape", at("parts/unet/inputs/0/shape", [2**30, 2**30]), WrongSize, "nobody"),
    Case("a huge sample", at(f"{STAGE}/init", {"channels": 4096, "width": 65536, "height": 65536}), WrongSize, "init"),
    Case("an upside-down axis", at("axes", {"batch": {"min": 4, "max": 2}}), BadManifest, "axes.batch"),
    Case("a million steps", at(f"{STAGE}/sampler/steps", 10**6), BadManifest, "steps"),
]

PATHS = [
    Case(f"path {path!r}", both(at("files/0/path", path)), UnsafePath, "plain path")
    for path in (
        "../secret",
        "/etc/passwd",
        "graphs/../../x",
        "C:/x",
        "a\\b",
        "./x",
        "x/",
        ".",
        "a//b",
        "a\nb",
        "a\u202eb",
    )
] + [
    Case("a graph outside", at("parts/unet/graph", "../unet.onnx"), UnsafePath, "unet.onnx"),
    Case("data outside", at("parts/unet/data", ["../weights"]), UnsafePath, "weights"),
    Case("data in another folder", at("parts/unet/data", ["tokenizer/tokenizer.json"]), UnsafePath, "beside"),
    Case("a tokenizer outside", at("tokenizers/default/file", "/etc/hostname"), UnsafePath, "hostname"),
    Case("a template outside", at("tokenizers/default/chat_template", "../t.jinja"), UnsafePath, "t.jinja"),
    Case("a name of 300 bytes", at("files/0/path", "x" * 300), UnsafePath, "xxx"),
    Case("a path of 600 bytes", at("files/0/path", "xx/" * 200 + "x"), BadManifest, "path"),
    Case("an empty path", at("files/0/path", ""), BadManifest, "path"),
    Case("the manifest lists itself", at("files/0/path", MANIFEST_FILE), BadManifest, "own hash"),
    Case("a file twice", told(lambda m: m["files"].append(m["files"][0])), BadManifest, "twice"),
    Case(
        "twice but for case",
        told(lambda m: m["files"].append({**m["files"][0], "path": GRAPH.upper()})),
        BadManifest,
        "case",
    ),
    Case(
        "a file and folder",
        told(lambda m: m["files"].append({**m["files"][0], "path": f"{GRAPH}/x"})),
        BadManifest,
        "folder",
    ),
    Case("an unlisted graph", at("parts/unet/graph", "graphs/other.onnx"), MissingFile, "does not list"),
    Case("an unlisted template", at("tokenizers/default/chat_template", "t.jinja"), MissingFile, "t.jinja"),
]

FILES = [
    Case("no manifest", lambda folder: (folder / MANIFEST_FILE).unlink(), MissingFile, "not a bundle"),
    Case("no folder", shutil.rmtree, MissingFile, "no bundle"),
    Case("a missing graph", lambda folder: (folder / GRAPH).unlink(), MissingFile, "unet.onnx"),
    Case("missing data", lambda folder: (folder / DATA).unlink(), MissingFile, "unet.onnx.data"),
    Case("an extra file", extra("payload.py"), ExtraFile, "payload.py"),
    Case("an extra file below", extra("graphs/payload.py"), ExtraFile, "graphs/payload.py"),
    Case("a hidden file", extra(".env"), ExtraFile, ".env"),
    Case("an extra folder", lambda folder: (folder / "hooks").mkdir(), ExtraFile, "hooks"),
    Case("an extra deep folder", extra("a/b/c/d"), ExtraFile, "/a"),
    Case("a truncated file", changed(DATA, lambda raw: raw[:-1]), WrongSize, "manifest says"),
    Case("a longer file", changed(DATA, lambda raw: raw + b"x"), WrongSize, "manifest says"),
    Case("an emptied file", changed(GRAPH, lambda raw: b""), WrongSize, "has 0 bytes"),
    Case("one bit of weights", changed(DATA, flipped), WrongHash, "unet.onnx.data"),
    Case("one bit of a graph", changed(GRAPH, flipped), WrongHash, "unet.onnx"),
    Case("one bit of a tokenizer", changed("tokenizer/tokenizer.json", flipped), WrongHash, "tokenizer.json"),
    Case("another hash", at("files/0/sha256", "0" * 64), WrongHash, "000000000000"),
    Case("a linked manifest", linked(MANIFEST_FILE), UnsafePath, "regular"),
    Case("a linked graph", linked(GRAPH), UnsafePath, "link"),
    Case("linked data", linked(DATA), UnsafePath, "link"),
    Case("a dangling link", linked(DATA, "/nowhere"), UnsafePath, "link"),
    Case("a link to itself", linked(DATA, "unet.onnx.data"), UnsafePath, "link"),
    Case("a link that stays inside", linked(DATA, "text_encoder.onnx.data"), UnsafePath, "link"),
    Case("a linked folder", linked_folder, UnsafePath, "graphs is a link"),
    Case("an unlisted link", lambda folder: (folder / "x").symlink_to("/etc"), UnsafePath, "link"),
    Case("a folder for a file", replaced(DATA, Path.mkdir), MissingFile, "is a folder"),
    Case("a folder for the manifest", replaced(MANIFEST_FILE, Path.mkdir), UnsafePath, "regular"),
    Case("a FIFO for a file", replaced(DATA, os.mkfifo), UnsafePath, "neither"),
    Case("a FIFO for the manifest", replaced(MANIFEST_FILE, os.mkfifo), UnsafePath, "regular"),
    Case("a socket for a file", replaced(DATA, unix_socket), UnsafePath, "neither"),
    Case(
        "a folder full of nothing", lambda folder: (shutil.rmtree(folder), folder.mkdir()), MissingFile, "edgekit.json"
    ),
]

ESCAPES = [
    "../../secret",
    "/etc/passwd",
    "..",
    ".",
    "",
    "sub/x",
    "a\\b",
    "C:x",
    "*/_ORT_MEM_ADDR_/*",
    "other.data",
    "x\0y",
]
EXTERNAL = (
    [Case(f"location {place!r}", initializer(place), UnsafePath, "does not list") for place in ESCAPES]
    + [
        Case(f"external {how.__name__}", how("../../secret"), UnsafePath, "does not list")
        for how in (sparse, attribute, subgraph, function, default_attribute, training)
    ]
    + [
        Case("data of another part", attribute("text_encoder.onnx.data"), UnsafePath, "parts.unet.data"),
        Case("the graph as its own data", attribute("unet.onnx"), UnsafePath, "parts.unet.data"),
        Case("past the end", initializer("unet.onnx.data", offset="8", length="4000"), WrongSize, "4,008"),
        Case("a huge offset", initializer("unet.onnx.data", offset="9" * 18), WrongSize, "ends at byte"),
        Case("an endless offset", initializer("unet.onnx.data", offset="9" * 5000), BadGraph, "offset or length"),
        Case("a negative offset", initializer("unet.onnx.data", offset="-4"), BadGraph, "'-4'"),
        Case("a foreign digit", initializer("unet.onnx.data", offset="٣"), BadGraph, "offset or length"),
        Case("a base path", initializer("unet.onnx.data", basepath="/etc"), BadGraph, "basepath"),
        Case(
            "no location", graph(lambda m: m.graph.initializer[0].ClearField("external_data")), BadGraph, "no location"
        ),
        Case(
            "two locations",
            graph(lambda m: m.graph.initializer[0].external_data.add(key="location", value="x")),
            BadGraph,
            "twice",
        ),
        Case("a merged attribute", graph_bytes(split_attribute), BadGraph, "stands twice"),
        Case("a merged graph", graph_bytes(two_graphs), BadGraph, "stands twice"),
        Case(
            "an operator that opens files",
            graph(lambda m: m.graph.node.add(op_type="EPContext", domain="com.microsoft", output=["e"])),
            BadGraph,
            "EPContext",
        ),
    ]
)

PROTOBUF = [
    Case("an empty graph file", graph_bytes(lambda raw: b""), BadGraph, "empty"),
    Case("a model without a graph", graph_bytes(lambda raw: field(2, b"nobody")), BadGraph, "no graph"),
    Case("text for a graph", graph_bytes(lambda raw: b"#!/bin/sh\nexit\n"), BadGraph, "unet.onnx"),
    Case("a cut graph", graph_bytes(lambda raw: raw[:-9]), BadGraph, "truncated"),
    Case("a cut number", graph_bytes(lambda raw: raw + b"\x08\xff"), BadGraph, "truncated"),
    Case("a giant length", graph_bytes(lambda raw: raw + field(7, b"x", claimed=2**62)), BadGraph, "truncated"),
    Case("an endless number", graph_bytes(lambda raw: raw + b"\x08" + b"\xff" * 11), BadGraph, "64 bits"),
    Case("a number over 64 bits", graph_bytes(lambda raw: raw + b"\x08" + b"\xff" * 9 + b"\x7f"), BadGraph, "64 bits"),
    Case("field zero", graph_bytes(lambda raw: raw + b"\x02\x00"), BadGraph, "field number 0"),
    Case("a group", graph_bytes(lambda raw: raw + varint(3 << 3 | 3)), BadGraph, "wire type 3"),
    Case("deep subgraphs", graph_bytes(lambda raw: nested_graphs(200)), BadGraph, "deep"),
    Case("very deep subgraphs", graph_bytes(lambda raw: nested_graphs(3_000)), BadGraph, "deep"),
    Case(
        "a number for a message", graph_bytes(lambda raw: field(7, varint(1 << 3) + b"\x05")), BadGraph, "number stands"
    ),
    Case(
        "bytes for a number",
        graph_bytes(lambda raw: raw.replace(b"\x08\x01\x12", b"\x0a\x01\x12", 1)),
        BadGraph,
        "bytes stand",
    ),
    Case(
        "a name that is not text",
        graph_bytes(lambda raw: raw + field(25, field(7, field(4, b"\xff")))),
        BadGraph,
        "UTF-8",
    ),
    Case(
        "a sequence for an input", graph(lambda m: m.graph.input[0].type.sequence_type.SetInParent()), BadGraph, "dense"
    ),
    Case(
        "complex numbers",
        graph(lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 14)),
        BadGraph,
        "type 14",
    ),
    Case("an input twice", graph(lambda m: m.graph.input.append(m.graph.input[0])), BadGraph, "share a name"),
]

CONTRACT = [
    Case(
        "an unfed input",
        told(lambda m: m["recipe"]["stages"][0]["denoise"]["feeds"].pop("timestep")),
        UnfedInput,
        "timestep",
    ),
    Case("an unknown input", at(f"{NET_FEEDS}/extra", "@x"), BadManifest, "'extra'"),
    Case("an unknown part", at(f"{STAGE}/denoise/part", "transformer"), BadManifest, "transformer"),
    Case("an unknown output", at(f"{STAGE}/denoise/output", "noise_pred"), BadManifest, "noise_pred"),
    Case("a source nobody gives", at(f"{NET_FEEDS}/sample", "controlnet.residual"), UnfedInput, "controlnet.residual"),
    Case("a latent too early", at(f"{NET_FEEDS}/sample", "@latent"), UnfedInput, "@latent"),
    Case("a picture before the first", at(f"{NET_FEEDS}/sample", "@previous"), UnfedInput, "first stage"),
    Case("an embedding of no guidance", at(f"{NET_FEEDS}/timestep", "@w_embedding"), UnfedInput, "guidance"),
    Case("an unknown built-in", at(f"{NET_FEEDS}/timestep", "@environment"), UnfedInput, "@environment"),
    Case("an unknown tokenizer", at("recipe/conditions/0/feeds/input_ids", "@tokens.second"), BadManifest, "default"),
    Case(
        "a condition on itself",
        at("recipe/conditions/0/feeds/input_ids", "text_encoder.last_hidden_state"),
        UnfedInput,
        "earlier",
    ),
    Case("a part nothing runs", told(lambda m: m["recipe"].pop("conditions")), UnfedInput, "text_encoder"),
    Case("a guidance of no width", at(f"{STAGE}/guidance", {"kind": "w_embedding"}), BadManifest, "dim"),
    Case("no recipe", told(lambda m: m.pop("recipe")), BadManifest, "recipe"),
    Case("no stages", at("recipe/stages", []), BadManifest, "empty"),
    Case("a stage twice", told(lambda m: m["recipe"]["stages"].append(m["recipe"]["stages"][0])), BadManifest, "twice"),
    Case("default steps not legal", at(f"{STAGE}/sampler/steps", 3), BadManifest, "1, 2, 4"),
    Case("no legal steps", at(f"{STAGE}/sampler/legal_steps", []), BadManifest, "none"),
    Case("a table of no stage", at("tables/0/stage", "refiner"), TableMismatch, "refiner"),
    Case("a table of illegal steps", at("tables/0/steps", 3), TableMismatch, "1, 2, 4"),
    Case("a table twice", at("tables/0/steps", 2), TableMismatch, "twice"),
    Case("a table without rows", at("tables/0/rows", []), TableMismatch, "no rows"),
    Case("a row of nine", at("tables/0/rows/0", [0.0] * 9), TableMismatch, "row 0"),
    Case("a row of text", at("tables/0/rows/0", ["x"] * 10), BadManifest, "rows"),
    Case(
        "an input that is not there",
        told(lambda m: m["parts"]["unet"]["inputs"].pop()),
        BadManifest,
        "encoder_hidden_states",
    ),
    Case("another dtype", at("parts/unet/inputs/1/dtype", "int64"), BadManifest, "timestep"),
    Case("another shape", at("parts/unet/inputs/0/shape", ["batch", 9, "height", "width"]), BadManifest, "sample"),
    Case("another rank", at("parts/unet/inputs/0/shape", ["batch"]), BadManifest, "sample"),
    Case(
        "a fixed size called dynamic", at("parts/unet/inputs/0/shape", ["batch", "c", "h", "w"]), BadManifest, "sample"
    ),
    Case(
        "an input the graph hides",
        graph(lambda m: m.graph.input.add(name="late").type.CopyFrom(m.graph.input[1].type)),
        BadManifest,
        "late",
    ),
    Case("a part without outputs", at("parts/unet/outputs", []), BadManifest, "no outputs"),
    Case(
        "a tensor named twice",
        told(lambda m: m["parts"]["unet"]["inputs"].append(m["parts"]["unet"]["inputs"][0])),
        BadManifest,
        "twice",
    ),
]

IMAGE_CASES = MANIFEST_BYTES + MANIFEST_TYPES + PATHS + FILES + EXTERNAL + PROTOBUF + CONTRACT


@pytest.mark.parametrize("case", IMAGE_CASES, ids=lambda case: case.name)
def test_a_spoilt_bundle_is_refused(image_bundle: Path, tmp_path: Path, case: Case) -> None:
    """Every row of the table ends in its own error; the same folder before spoiling is read."""
    folder = tmp_path / "spoilt.bundle"
    shutil.copytree(image_bundle, folder)
    assert read_bundle(folder).manifest.task == "text-to-image"
    case.spoil(folder)
    refused(folder, case)
