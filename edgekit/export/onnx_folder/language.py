"""A transformers decoder as a ready-made ONNX graph (optimum's `text-generation-with-past`), adopted as `concat`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from edgekit.bundle.graphfile import GraphTensor
from edgekit.bundle.manifest import (
    FORMAT,
    AxisRange,
    Decoding,
    Dim,
    Gate,
    KVCacheLayout,
    Manifest,
    Part,
    PrecisionRecord,
    TensorSpec,
)
from edgekit.errors import BadSource, ParityFailed, UnsupportedModel
from edgekit.export.language import assets
from edgekit.export.language.config import Config
from edgekit.export.onnx_folder import surgery
from edgekit.export.onnx_folder.diffusion import BASE_BYTES, SHARE, tools
from edgekit.export.onnx_folder.graphs import AGAIN, FoundGraph, find_graph, graph_names
from edgekit.export.onnx_folder.probe import LIMITS, apart
from edgekit.export.plan import ExportPlan, PartPlan
from edgekit.export.sources import Source, provenance
from edgekit.runtime.backends import Session, open_session
from edgekit.runtime.llm.probe import filler
from edgekit.runtime.llm.tree import TokenTree
from edgekit.runtime.llm.verifier import LocalVerifier

Progress = Callable[[str, float], None]

PART, GRAPH = "decoder", "graphs/decoder.onnx"
PAST = "past_key_values."  # as exported; the house says `past.`
IDS, POSITIONS, MASK = "input_ids", "position_ids", "attention_mask"
WITH_PAST = f"{AGAIN} --task text-generation-with-past"
TEXT = 24  # tokens of the text that is run whole, in pieces and token by token
# Where a family's config says what others call num_hidden_layers and so on (GPT-2 and its kin).
NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "width": ("hidden_size", "n_embd"),
    "context": ("max_position_embeddings", "n_positions", "max_seq_len"),
}
TRACED_ONCE = ("dynamic", "longrope")  # scalings that choose by the length of the text, which a trace does once


@dataclass(frozen=True)
class _Prepared:
    config: Config
    found: FoundGraph
    decoding: Decoding
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    notes: dict[str, str]


def plan_decoder(source: Source, dialect: Literal["ort", "std"]) -> ExportPlan:
    """What `adopt_decoder` would make and cost, from the config and the graph's signature.

    Raises:
        UsageError: whatever `adopt_decoder` would refuse before it loads a weight.
    """
    ready = _prepare(source, dialect)
    part = PartPlan(PART, ready.inputs, ready.outputs, ready.found.bytes)
    return ExportPlan(
        family=_family(ready.config),
        task="text-generation",
        precision="fp32",
        parts=(part,),
        disk_bytes=part.bytes + sum(file.stat().st_size for file in source.root.glob("token*.json")),
        peak_bytes=BASE_BYTES + int(SHARE * part.bytes),
        notes=("a ready-made ONNX graph is adopted: it drafts in chains, not in trees", *ready.notes.values()),
    )


def adopt_decoder(source: Source, staging: Path, *, dialect: Literal["ort", "std"], progress: Progress) -> Manifest:
    """Write the adopted graph and its tokenizer under `staging`.

    Args:
        source: a folder with config.json, a tokenizer and model.onnx (or onnx/model.onnx).
        staging: an empty folder, the bundle to be.
        dialect: of the target device: `ort` or `std`.
        progress: told what is done, and the fraction that is behind.

    Returns:
        The manifest, without its file rows.

    Raises:
        BadSource, UnsupportedModel: the folder is incomplete, or its graph is no decoder that grows its cache.
        ParityFailed: the graph answers otherwise in pieces than at once, or with what is no number.
        SessionFailed: ONNX Runtime refuses the graph.
    """
    ready = _prepare(source, dialect)
    (staging / GRAPH).parent.mkdir(parents=True, exist_ok=True)
    part = _adopt(ready, staging / GRAPH, lambda what, share: progress(f"{PART}: {what}", 0.6 * share))
    progress(f"{PART}: proving", 0.6)
    session = open_session(staging / GRAPH, "cpu")
    gates = (_prove_pieces(ready.decoding, session), _prove_batch(ready, session))
    tokenizer = assets.export_tokenizer(source.root, staging)
    progress("tokenizer", 1.0)
    return Manifest(
        format=FORMAT,
        task="text-generation",
        family=_family(ready.config),
        parts={PART: part},
        files=(),
        provenance=provenance(source, tools()),
        precision=PrecisionRecord(requested="fp32", gates=gates),
        axes=_axes(ready.decoding.context_length),
        tokenizers={"default": tokenizer},
        decoding=ready.decoding,
        notes=ready.notes,
    )


def _prepare(source: Source, dialect: str) -> _Prepared:
    """Everything that config and signature say, held against each other."""
    config = Config.load(source.root)
    folder = source.root if graph_names(source.root) else source.root / "onnx"
    found = find_graph(folder, dialect)
    layers, heads, dim = _sizes(config)
    _check_inputs(found, layers)
    kv = found.input(f"{PAST}0.key")
    logits = found.output("logits")
    assert kv is not None
    if logits is None:
        raise UnsupportedModel(f"{found.path} gives {', '.join(t.name for t in found.file.outputs)} and no logits")
    if kv.dtype not in ("float32", "float16") or logits.dtype not in ("float32", "float16"):
        raise UnsupportedModel(f"{found.path} is in {kv.dtype}; float32 and float16 are adopted")
    vocabulary = config.integer("vocab_size")
    context, notes = _context(config)
    ends, begin = assets.token_ids(source.root, config)
    decoding = Decoding(
        part=PART,
        dialect="concat",
        context_length=context,
        vocab_size=vocabulary,
        kv=KVCacheLayout(layers, heads, dim, kv.dtype),  # type: ignore[arg-type]
        eos=ends,
        bos=begin,
        defaults=assets.sampling_defaults(source.root),
    )
    inputs, outputs = _signature(found, decoding)
    _check_shapes(found, inputs, outputs)
    return _Prepared(config, found, decoding, inputs, outputs, notes)


def _sizes(config: Config) -> tuple[int, int, int]:
    """Layers, KV heads and head width, as the config says them."""
    told = {what: next((key for key in keys if config.get(key) is not None), keys[0]) for what, keys in NAMES.items()}
    layers, heads, width = (config.integer(told[what]) for what in ("layers", "heads", "width"))
    return layers, config.integer("num_key_value_heads", heads), config.integer("head_dim", width // heads)


def _context(config: Config) -> tuple[int, dict[str, str]]:
    """The text's longest length for which the graph is known to be right, and why it is shorter than the config's."""
    key = next((key for key in NAMES["context"] if config.get(key) is not None), NAMES["context"][0])
    context, notes = config.integer(key), {}
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if type(window) is int and 0 < window < context:
        context = window
        notes["context"] = (
            f"config.json has a sliding window of {window} tokens. Whether a ready-made graph keeps to it cannot be "
            f"seen from outside, and up to there it does not matter: so {window} tokens is the context"
        )
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    scaling = scaling if isinstance(scaling, dict) else {}
    _check_rope(config, scaling)
    kind, original = scaling.get("rope_type", scaling.get("type")), "original_max_position_embeddings"
    short = config.get(original, scaling.get(original, context))
    if kind in TRACED_ONCE and type(short) is int:
        context = min(context, short)
        notes["rope"] = (
            f"rope scaling {kind!r} chooses by length, and a traced graph has chosen: {context} tokens at most"
        )
    return context, notes


def _check_rope(config: Config, scaling: dict[str, Any]) -> None:
    """An exporter older than the config reads no `rope_parameters`, takes 10000 and writes that beside them."""
    said, used = scaling.get("rope_theta"), config.get("rope_theta")
    if said is not None and used is not None and said != used:
        raise BadSource(
            f"{config.where} has rope_theta {said} in rope_parameters and {used} beside them: the exporter was older "
            f"than the model's config and used {used}. Write rope_theta: {said} into the original config.json, and "
            f"export again"
        )


def _check_inputs(found: FoundGraph, layers: int) -> None:
    """The inputs are those of a decoder with a cache that grows, one pair per layer of the config."""
    names = [tensor.name for tensor in found.file.inputs]
    past = [name for name in names if name.startswith(PAST)]
    if not past:
        raise UnsupportedModel(
            f"{found.path} takes {', '.join(names)} and no {PAST}N.key: without a cache every token would cost the "
            f"whole text. {WITH_PAST}"
        )
    wanted = [f"{PAST}{layer}.{side}" for layer in range(layers) for side in ("key", "value")]
    if sorted(past) != sorted(wanted):
        raise BadSource(
            f"{found.path} has {len(past)} cache inputs ({past[0]} to {past[-1]}); by config.json there are {layers} "
            f"layers, so {len(wanted)}. Do graph and config belong together?"
        )
    unfed = [name for name in names if name not in (IDS, POSITIONS, MASK, *wanted)]
    if unfed or IDS not in names:
        raise UnsupportedModel(
            f"{found.path} takes {', '.join(unfed) or 'no input_ids'}; a text pipeline feeds {IDS}, {MASK}, "
            f"{POSITIONS} and the cache. {WITH_PAST}"
        )


def _signature(found: FoundGraph, decoding: Decoding) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The adopted graph's inputs and outputs, in order."""
    kv = decoding.kv

    def cache(when: str, axis: str) -> list[TensorSpec]:
        shape: tuple[Dim, ...] = ("batch", kv.heads, axis, kv.head_dim)
        return [
            TensorSpec(f"{when}.{i}.{half}", kv.dtype, shape) for i in range(kv.layers) for half in ("key", "value")
        ]

    specs = {
        IDS: TensorSpec(IDS, "int64", ("batch", "seq")),
        MASK: TensorSpec(MASK, "int64", ("batch", "total")),
        POSITIONS: TensorSpec(POSITIONS, "int64", ("batch", "seq")),
        "rows": TensorSpec("rows", "int64", ("rows",)),
    }
    pasts = {spec.name: spec for spec in cache("past", "past")}
    order = [tensor.name.replace(PAST, "past.") for tensor in found.file.inputs]
    order += ["rows", *(name for name in (POSITIONS, MASK) if name not in order)]
    logits = TensorSpec("logits", "float32", ("batch", "rows", decoding.vocab_size))
    presents = {spec.name: spec for spec in cache("present", "total")}
    missing = [name for name in presents if found.output(name) is None]
    if missing:
        raise UnsupportedModel(f"{found.path} does not give {missing[0]}: its cache would not grow. {WITH_PAST}")
    outputs = [name for name in (tensor.name for tensor in found.file.outputs) if name == "logits" or name in presents]
    return tuple((specs | pasts)[name] for name in order), tuple(({"logits": logits} | presents)[n] for n in outputs)


def _check_shapes(found: FoundGraph, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    """Fixed sizes agree with the config's, and what has to grow may grow."""
    pairs: list[tuple[TensorSpec, GraphTensor | None]] = []
    pairs += [(spec, found.input(spec.name.replace("past.", PAST))) for spec in inputs]
    pairs += [(spec, found.output(spec.name)) for spec in outputs]
    for spec, tensor in pairs:
        if tensor is None or tensor.shape is None:
            continue
        if tensor.dtype != spec.dtype and spec.name != "logits":
            raise UnsupportedModel(
                f"{found.path}: {tensor.name} is {tensor.dtype}; it is fed {spec.dtype}. {WITH_PAST}"
            )
        if len(tensor.shape) != len(spec.shape):
            raise UnsupportedModel(f"{found.path}: {tensor.name} is {tensor.shape}; {spec.shape} is fed and read")
        for said, there in zip(spec.shape, tensor.shape, strict=True):
            if isinstance(there, int) and there != said:
                raise BadSource(
                    f"{found.path}: {tensor.name} is {tensor.shape} where config.json makes it {spec.shape}. Do they "
                    f"belong together, and was it exported with dynamic axes?"
                )


def _adopt(ready: _Prepared, graph: Path, progress: Progress) -> Part:
    """Rewrite the graph to the `concat` contract and write it."""
    model = surgery.load(ready.found.path)
    for value in model.graph.inputs:
        surgery.rename(model, value, str(value.name).replace(PAST, "past."))
    surgery.select_rows(model)
    surgery.output_as_float(model, "logits")
    there = {value.name for value in model.graph.inputs}
    for spec in ready.inputs:
        if spec.name not in there:  # counted inside, from the cache's own length
            surgery.add_unused_input(model, spec)
    surgery.keep_outputs(model, [spec.name for spec in ready.outputs])
    parameters = surgery.parameters(model)
    shapes = {spec.name: spec.shape for spec in (*ready.inputs, *ready.outputs)}
    surgery.write(model, shapes, graph, progress)
    return Part(
        graph=GRAPH,
        inputs=ready.inputs,
        outputs=ready.outputs,
        data=(f"{GRAPH}.data",),
        precision="fp16" if ready.decoding.kv.dtype == "float16" else "fp32",
        parameters=parameters,
    )


def _prove_pieces(decoding: Decoding, session: Session) -> Gate:
    """One text at once, in two pieces, and token by token after a rollback: the runtime's own way of running it."""
    text = filler(min(TEXT, decoding.context_length), decoding.vocab_size)
    whole = _rows(LocalVerifier(session, decoding), text)
    if not np.isfinite(whole).all() or not np.ptp(whole):
        raise ParityFailed(
            f"{PART}: the logits of a plain text are not finite, or all the same; are the weights whole?"
        )
    worst, verifier = 0.0, LocalVerifier(session, decoding)
    middle = max(1, len(text) // 2)
    verifier.score(text[:1], TokenTree.chain(text[0], text[1 : middle + 2]))
    verifier.keep(range(middle))
    pieces = verifier.score(text[: middle + 1], TokenTree.chain(text[middle], text[middle + 1 :])).logits
    worst = max(worst, apart(pieces, whole[middle:]))
    verifier.rollback(middle // 2)
    for at in range(middle // 2, len(text)):
        row = verifier.score(text[: at + 1], TokenTree.chain(text[at])).logits
        verifier.keep((0,))
        worst = max(worst, apart(row, whole[at : at + 1]))
    limit = LIMITS[decoding.kv.dtype]
    if not worst <= limit:
        raise ParityFailed(
            f"{PART}: a text of {len(text)} tokens computed in pieces differs from the same at once by {worst:.2g} of "
            f"max|x|, over the limit of {limit:g}: the graph does not continue its cache. {WITH_PAST}"
        )
    return Gate(f"{PART}: {len(text)} tokens in pieces and one by one against at once, of max|x|", worst, limit)


def _rows(verifier: LocalVerifier, text: tuple[int, ...]) -> Any:
    """Logits after every token, (tokens, vocabulary)."""
    return verifier.score(text[:1], TokenTree.chain(text[0], text[1:])).logits.copy()


def _prove_batch(ready: _Prepared, session: Session) -> Gate:
    """Two texts in one run against each alone. Raises ParityFailed."""
    decoding, length = ready.decoding, min(8, ready.decoding.context_length)
    texts = np.array([filler(length, decoding.vocab_size, salt) for salt in (1, 2)], np.int64)
    kv = decoding.kv

    def run(rows: Any) -> Any:
        empty = np.zeros((len(rows), kv.heads, 0, kv.head_dim), kv.dtype)
        positions = np.tile(np.arange(length, dtype=np.int64), (len(rows), 1))
        given = {IDS: rows, POSITIONS: positions, MASK: np.ones_like(rows), "rows": np.arange(length, dtype=np.int64)}
        past = {spec.name: empty for spec in ready.inputs if spec.name.startswith("past.")}
        return session.run({**given, **past})["logits"]

    both = run(texts)
    worst = max(apart(both[row : row + 1], run(texts[row : row + 1])) for row in (0, 1))
    limit = LIMITS[kv.dtype]
    if not worst <= limit:
        raise ParityFailed(
            f"{PART}: a text beside another differs by {worst:.2g} of max|x| from itself alone. {WITH_PAST}"
        )
    return Gate(f"{PART}: two texts in one run against each alone, of max|x|", worst, limit)


def _axes(context: int) -> dict[str, AxisRange]:
    tokens = AxisRange(1, context)
    return {"batch": AxisRange(), "past": AxisRange(0, context)} | dict.fromkeys(("seq", "rows", "total"), tokens)


def _family(config: Config) -> str:
    kind = config.values.get("model_type")
    if not isinstance(kind, str):
        raise BadSource(f"{config.where} has no model_type. Is it the configuration of a language model?")
    return kind
