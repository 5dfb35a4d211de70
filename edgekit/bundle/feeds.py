"""Every input of every part has a source: the contract between a recipe or decoding block and the graphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from edgekit.bundle.manifest import Decoding, Manifest, Part
from edgekit.bundle.recipe import Rank, Retrieve, Stage
from edgekit.errors import BadManifest, UnfedInput

# Where in a recipe a built-in source has a value; those in NAMED may have a name after a dot, those in BY_NAME must.
ALWAYS = {
    "@tokens",
    "@mask",
    "@time_ids",
    "@size",
    "@aspect",
    "@seconds",
    "@const",
    "@input",
    "@image",
    "@original",
    "@control",
    "@control_scale",
    "@reference_scale",
    "@inpaint_mask",
    "@masked_image",
}
GIVEN = {
    "conditions": ALWAYS | {"@random", "@reference"},
    "select": ALWAYS,
    "encode": ALWAYS | {"@previous"},
    "denoise": ALWAYS
    | {
        "@x",
        "@t",
        "@r",
        "@row",
        "@codebook",
        "@decided",
        "@random",
        "@w_embedding",
        "@guidance",
        "@start",
        "@previous",
    },
    "decode": ALWAYS | {"@latent", "@start", "@previous"},
    "finished": ALWAYS | {"@previous"},
}
NAMED = ("@tokens", "@mask", "@const", "@input", "@random")
BY_NAME = ("@const", "@input", "@random")
SCALED = {"@w_embedding": "w_embedding", "@guidance": "embedded"}  # sources of one kind of guidance only

# What the language runtime feeds besides the attention biases and the KV buffers, by dialect: name -> dtype.
LANGUAGE_INPUTS = {
    "ort": {
        "input_ids": "int64",
        "position_ids": "int64",
        "seqlens_k": "int32",
        "total_sequence_length": "int32",
        "rows": "int64",
    },
    "std": {"input_ids": "int64", "position_ids": "int64", "write_indices": "int64", "rows": "int64"},
    "concat": {"input_ids": "int64", "position_ids": "int64", "attention_mask": "int64", "rows": "int64"},
}


@dataclass(frozen=True)
class _Run:
    """One run of one part: where the recipe asks for it, what feeds it, and which of its outputs is taken.

    `carry` are inputs that an output of the run before feeds; `loose` allows feeds the part has no input for (a
    stage's variants share one list of feeds); `gives` says that later runs may be fed its outputs.
    """

    where: str
    place: str
    part: str
    feeds: Mapping[str, str]
    output: str | None = None
    stage: Stage | None = None
    carry: tuple[str, ...] = ()
    loose: bool = False
    gives: bool = False


def check_feeds(manifest: Manifest) -> None:
    """Refuse a bundle with a graph input that nothing feeds, or a feed that leads nowhere.

    Raises:
        UnfedInput: an input without a source, a source that nothing gives, a part that nothing runs.
        BadManifest: a feed for an input, part, output or tokenizer that does not exist.
    """
    used: set[str] = set()
    given: set[str] = set()
    for run in _runs(manifest):
        part = _check_run(manifest, run, given)
        used.add(run.part)
        if run.gives:
            given |= {f"{run.part}.{name}" for name in part.answers}
    if manifest.decoding is not None:
        check_decoding(manifest, manifest.decoding)
        used.add(manifest.decoding.part)
    for name, part in manifest.parts.items():
        if name not in used:
            inputs = ", ".join(spec.name for spec in part.inputs)
            raise UnfedInput(f"parts.{name}: nothing runs it, so nothing feeds {inputs or 'it'}; leave the part out")


def check_decoding(manifest: Manifest, decoding: Decoding) -> None:
    """Hold the language graph against its dialect's inputs and outputs (docs/bundle.md lists them).

    Raises:
        UnfedInput: an input the dialect does not feed.
        BadManifest: an input or output of the dialect is missing, or has another dtype or KV shape.
    """
    part = manifest.parts.get(decoding.part)
    if part is None:
        raise BadManifest(f"decoding.part is {decoding.part!r}; the parts are {', '.join(manifest.parts) or 'none'}")
    kv = decoding.kv.dtype
    caches = [f"{i}.{half}" for i in range(decoding.kv.layers) for half in ("key", "value")]
    required = LANGUAGE_INPUTS[decoding.dialect] | {f"past.{cache}": kv for cache in caches}
    biases = {} if decoding.dialect == "concat" else {"attention_bias": kv}
    if decoding.sliding_window is not None and biases:
        biases["attention_bias_sliding"] = kv
    inputs = {spec.name: spec.dtype for spec in part.inputs}
    outputs = {spec.name: spec.dtype for spec in part.outputs}
    for name in inputs:
        if name not in required and name not in biases:
            raise UnfedInput(f"parts.{decoding.part}: the {decoding.dialect} dialect does not feed {name!r}")
    _require(f"parts.{decoding.part}.inputs", required, inputs)
    _require(f"parts.{decoding.part}.inputs", {name: kv for name in biases if name in inputs}, inputs)
    if guards := [name for name in outputs if name not in part.answers]:
        raise BadManifest(f"parts.{decoding.part}.outputs: nothing reads {', '.join(guards)} of a language model")
    _require(f"parts.{decoding.part}.outputs", {"logits": "float32"}, outputs)
    _require(f"parts.{decoding.part}.outputs", {f"present.{cache}": kv for cache in caches}, outputs)
    _check_kv_shapes(decoding, part)
    _check_hidden(decoding, part)


def _require(where: str, wanted: Mapping[str, str], there: Mapping[str, str]) -> None:
    for name, dtype in wanted.items():
        if there.get(name) != dtype:
            found = f"it is {there[name]}" if name in there else "it is missing"
            raise BadManifest(f"{where}: the decoding block needs {name!r} as {dtype}; {found}")


def _check_kv_shapes(decoding: Decoding, part: Part) -> None:
    for spec in (*part.inputs, *part.outputs):
        if not spec.name.startswith(("past.", "present.")):
            continue
        if len(spec.shape) != 4 or (spec.shape[1], spec.shape[3]) != (decoding.kv.heads, decoding.kv.head_dim):
            raise BadManifest(
                f"parts.{decoding.part}: {spec.name} has shape {spec.shape}; decoding.kv says "
                f"(batch, {decoding.kv.heads}, capacity, {decoding.kv.head_dim})"
            )


def _check_hidden(decoding: Decoding, part: Part) -> None:
    """Outputs `hidden.k`, which need not be there: float32 (batch, rows, width), k from 1 to the layer count."""
    legal = {f"hidden.{k}" for k in range(1, decoding.kv.layers + 1)}
    for spec in part.outputs:
        if spec.name.startswith("hidden.") and (
            spec.name not in legal or spec.dtype != "float32" or len(spec.shape) != 3
        ):
            raise BadManifest(
                f"parts.{decoding.part}: {spec.name} is {spec.dtype} {spec.shape}; hidden states are float32 "
                f"(batch, rows, width), after layer 1 to {decoding.kv.layers}"
            )


def _runs(manifest: Manifest) -> Iterator[_Run]:
    """Every run the recipe asks for, in the order the runtime makes them."""
    recipe = manifest.recipe
    if recipe is None:
        return
    for number, call in enumerate(recipe.conditions):
        yield _Run(f"recipe.conditions[{number}]", "conditions", call.part, call.feeds, gives=True)
    if recipe.select is not None:
        yield _Run("recipe.select", "select", recipe.select.part, recipe.select.feeds, recipe.select.output)
    for stage in recipe.stages:
        yield from _runs_of(stage)
    for number, hook in enumerate(recipe.hooks):
        if isinstance(hook, Retrieve):
            yield _Run(f"recipe.hooks[{number}]", "conditions", hook.part, {}, "keys")
        elif isinstance(hook, Rank):
            yield _Run(f"recipe.hooks[{number}]", "finished", hook.part, hook.feeds, hook.output)


def _runs_of(stage: Stage) -> Iterator[_Run]:
    where, net = f"recipe.stages.{stage.name}", stage.denoise
    if stage.init.encode is not None:
        encode = stage.init.encode
        yield _Run(f"{where}.init.encode", "encode", encode.part, encode.feeds, stage=stage)
    for number, call in enumerate(net.before):
        yield _Run(f"{where}.denoise.before[{number}]", "denoise", call.part, call.feeds, stage=stage, gives=True)
    parts = tuple(dict.fromkeys(stage.sampler.nets)) or (net.part,)
    for part in parts:
        loose = len(parts) > 1
        yield _Run(f"{where}.denoise", "denoise", part, net.feeds, net.output, stage, net.carry, loose)
    if stage.sampler.tokens is not None and stage.sampler.tokens.confidence is not None:
        yield _Run(f"{where}.sampler", "denoise", stage.sampler.tokens.confidence, net.feeds, stage=stage, loose=True)
    for decode in (stage.decode, stage.decode.preview if stage.decode is not None else None):
        if decode is not None:
            yield _Run(f"{where}.decode", "decode", decode.part, decode.feeds, decode.output, stage)
    if stage.accept is not None:
        accept = stage.accept
        yield _Run(f"{where}.accept", "finished", accept.part, accept.feeds, accept.output, stage)


def _check_run(manifest: Manifest, run: _Run, given: set[str]) -> Part:
    part = manifest.parts.get(run.part)
    if part is None:
        raise BadManifest(f"{run.where} runs {run.part!r}; the parts are {', '.join(manifest.parts) or 'none'}")
    inputs = [spec.name for spec in part.inputs]
    for name in inputs:
        if name not in run.feeds and name not in run.carry:
            raise UnfedInput(f"{run.where} does not feed {name!r} of {run.part}; every graph input needs a source")
    for name, source in run.feeds.items():
        if name not in inputs and run.loose:
            continue
        if name not in inputs:
            raise BadManifest(f"{run.where} feeds {name!r}, but {run.part} takes {', '.join(inputs) or 'nothing'}")
        _check_source(manifest, run, name, source, given)
    if run.output is not None and run.output not in part.answers:
        raise BadManifest(f"{run.where} takes {run.output!r}, which is not an output of {run.part}")
    return part


def _check_source(manifest: Manifest, run: _Run, name: str, source: str, given: set[str]) -> None:
    where = f"{run.where} feeds {name!r} from {source}"
    if not source.startswith("@"):
        if source not in given:
            raise UnfedInput(f"{where}, but no earlier condition gives that; these are given: {_listed(given)}")
        return
    kind, _, argument = source.partition(".")
    if kind not in GIVEN[run.place] or (argument and kind not in NAMED) or (not argument and kind in BY_NAME):
        raise UnfedInput(f"{where}, which has no value there; built-in sources there: {_listed(GIVEN[run.place])}")
    if kind == "@const" and (manifest.recipe is None or argument not in manifest.recipe.constants):
        raise BadManifest(
            f"{where}, but the recipe's constants are {_listed(manifest.recipe.constants if manifest.recipe else ())}"
        )
    if kind in ("@tokens", "@mask") and (argument or "default") not in manifest.tokenizers:
        raise BadManifest(f"{where}, but the tokenizers are {_listed(manifest.tokenizers)}")
    if kind == "@reference":
        (shape,) = (spec.shape for spec in manifest.parts[run.part].inputs if spec.name == name)
        if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or not isinstance(shape[3], int):
            raise BadManifest(f"{where}, whose shape is {shape}; a reference picture is (batch, 3, side, side)")
    stage, recipe = run.stage, manifest.recipe
    if stage is None or recipe is None:
        return
    if kind == "@previous" and run.place != "finished" and stage is recipe.stages[0]:
        raise UnfedInput(f"{where}, but {stage.name} is the first stage: no picture comes before it")
    if kind in SCALED and stage.guidance.kind != SCALED[kind]:
        raise UnfedInput(f"{where}, but the stage's guidance is {stage.guidance.kind!r}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
