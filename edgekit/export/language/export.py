"""Compile a language-model folder to one ONNX part without torch: read headers, build the graph, stream the weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from edgekit.bundle.manifest import (
    FORMAT,
    AxisRange,
    Decoding,
    DType,
    KVCacheLayout,
    Manifest,
    Part,
    PrecisionRecord,
    Provenance,
    TensorSpec,
)
from edgekit.errors import BadRequest, BadSource
from edgekit.export.language import assets
from edgekit.export.language.config import Config
from edgekit.export.language.dialect_ort import OrtDialect
from edgekit.export.language.dialect_std import StdDialect
from edgekit.export.language.families import read_spec
from edgekit.export.language.graph import Decoder, DialectOps
from edgekit.export.language.spec import Spec
from edgekit.export.language.store import Progress, stored_bytes, write_model
from edgekit.export.language.weights import Checkpoint
from edgekit.export.plan import ExportPlan, PartPlan
from edgekit.export.sources import stated_licence
from edgekit.quant.precision import Precision, get_precision

Dialect = Literal["ort", "std"]
DIALECTS: dict[str, Callable[[], DialectOps]] = {"ort": OrtDialect, "std": StdDialect}
GRAPH = "graphs/decoder.onnx"
DATA = GRAPH + ".data"

_DTYPES: dict[ir.DataType, DType] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
}
_BASE_MEMORY = 160 << 20  # the interpreter, its libraries, and what quantization holds of a matrix at a time
_GRAPH_BYTES_PER_NODE = 100


def silent(stage: str, fraction: float) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class Compiled:
    """A model folder understood: the graph is built, no weight has been read."""

    config: Config
    spec: Spec
    checkpoint: Checkpoint
    precision: Precision
    decoder: Decoder
    model: ir.Model


def compile_language(source: Path, precision: Precision, dialect: str, hidden: Sequence[int] = ()) -> Compiled:
    """Read `config.json` and the checkpoint's headers, and build the decoder.

    Raises:
        UnknownFamily, UnsupportedModel, BadSource: the folder cannot be exported, and why.
        BadRequest: no such dialect, or no such layer.
    """
    if dialect not in DIALECTS:
        raise BadRequest(f"no dialect {dialect!r}; known: {', '.join(DIALECTS)}")
    if not source.is_dir():
        raise BadSource(f"{source} is not a folder")
    config = Config.load(source)
    spec = read_spec(config)
    checkpoint = Checkpoint(source)
    decoder = Decoder(spec, checkpoint, precision, DIALECTS[dialect](), hidden)
    model = decoder.build()
    decoder.check_nothing_left_over()
    return Compiled(config, spec, checkpoint, precision, decoder, model)


def plan_language(
    source: Path, precision: str = "fp32", dialect: Dialect = "ort", hidden: Sequence[int] = ()
) -> ExportPlan:
    """What `export_language` would need and make, from headers alone.

    Raises:
        what `compile_language` raises; BadRequest for an unknown precision.
    """
    compiled = compile_language(source, get_precision(precision), dialect, hidden)
    made, weights = _part(compiled), stored_bytes(compiled.model, compiled.decoder.views)
    part = PartPlan("decoder", made.inputs, made.outputs, weights, made.parameters)
    beside = sum(file.stat().st_size for file in source.glob("token*.json"))
    return ExportPlan(
        family=compiled.spec.family,
        task="text-generation",
        precision=precision,
        parts=(part,),
        disk_bytes=weights + beside + _GRAPH_BYTES_PER_NODE * len(compiled.decoder.nodes),
        peak_bytes=_BASE_MEMORY + compiled.decoder.largest,
        notes=compiled.spec.notes,
    )


def export_language(
    source: Path,
    staging: Path,
    *,
    precision: str = "fp32",
    dialect: Dialect = "ort",
    hidden: Sequence[int] = (),
    progress: Progress = silent,
) -> Manifest:
    """Write `graphs/decoder.onnx`, its data and `tokenizer/` under `staging`.

    Peak memory is the interpreter plus about twice the largest weight matrix, whatever the model's size.

    Args:
        source: a folder with config.json, safetensors and a tokenizer.
        staging: an existing or new folder.
        precision: a name in PRECISIONS.
        dialect: `ort` for ONNX Runtime, `std` for engines that read the ONNX standard.
        hidden: layer counts k; each adds an output `hidden.k`, the residual stream after k layers.
        progress: called with a stage's name and the share of it that is done, in [0, 1].

    Returns:
        The manifest with `files` left empty, for the caller to seal.

    Raises:
        UnknownFamily, UnsupportedModel, BadSource, BadRequest: what cannot be exported, and why.
    """
    compiled = compile_language(source, get_precision(precision), dialect, hidden)
    tokenizer = assets.export_tokenizer(source, staging)
    ends, begin = assets.token_ids(source, compiled.config)
    manifest = Manifest(
        format=FORMAT,
        task="text-generation",
        family=compiled.spec.family,
        parts={"decoder": _part(compiled)},
        files=(),
        provenance=Provenance(
            source=source.resolve().name,
            source_sha256=_fingerprint(compiled.checkpoint, progress),
            licence=stated_licence(source, compiled.config.values),
            tools={name: version(name) for name in ("onnx-ir", "numpy")},
        ),
        precision=PrecisionRecord(requested=precision),
        axes=_axes(compiled.spec, dialect),
        tokenizers={"default": tokenizer},
        decoding=_decoding(compiled, dialect, ends, begin, source),
        notes={"export": "; ".join(compiled.spec.notes)} if compiled.spec.notes else {},
    )
    (staging / GRAPH).parent.mkdir(parents=True, exist_ok=True)
    write_model(compiled.model, compiled.decoder.views, staging / GRAPH, progress)
    return manifest


def _part(compiled: Compiled) -> Part:
    graph, checkpoint = compiled.model.graph, compiled.checkpoint
    read = (checkpoint.entries[name] for name in compiled.decoder.used if name in checkpoint)
    return Part(
        graph=GRAPH,
        data=(DATA,),
        inputs=tuple(_signature(value) for value in graph.inputs),
        outputs=tuple(_signature(value) for value in graph.outputs),
        precision=compiled.precision.name,
        parameters=sum(math.prod(entry.shape) for entry in read),
    )


def _signature(value: ir.Value) -> TensorSpec:
    if value.name is None or value.dtype is None or value.shape is None:
        raise ValueError("graph inputs and outputs are typed when they are made")
    dims = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return TensorSpec(name=value.name, dtype=_DTYPES[value.dtype], shape=dims)


def _axes(spec: Spec, dialect: Dialect) -> dict[str, AxisRange]:
    tokens = AxisRange(1, spec.context)
    if dialect == "ort":
        # GroupQueryAttention takes several new tokens for one sequence only.
        return {"batch": AxisRange(1, 1)} | dict.fromkeys(("seq", "rows", "total", "capacity"), tokens)
    return {"batch": AxisRange()} | dict.fromkeys(("seq", "rows", "capacity"), tokens)


def _decoding(compiled: Compiled, dialect: Dialect, ends: tuple[int, ...], begin: int | None, source: Path) -> Decoding:
    spec = compiled.spec
    return Decoding(
        part="decoder",
        dialect=dialect,
        context_length=spec.context,
        vocab_size=spec.vocab,
        kv=KVCacheLayout(spec.layers, spec.kv_heads, spec.head_dim, compiled.precision.activations),
        eos=ends,
        bos=begin,
        sliding_window=spec.window,
        defaults=assets.sampling_defaults(source),
    )


def _fingerprint(checkpoint: Checkpoint, progress: Progress) -> str:
    """sha256 over config.json and the weight files: names, sizes and contents, in order of name."""
    digest = hashlib.sha256()
    files = (checkpoint.folder / "config.json", *checkpoint.files)
    total, done = sum(file.stat().st_size for file in files), 0
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
                done += len(chunk)
                progress("reading", done / total)
    return digest.hexdigest()
