"""A diffusers pipeline as ready-made ONNX graphs, adopted under the few-step contract of its family."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgekit.bundle.manifest import FORMAT, Gate, Manifest, Part, PrecisionRecord
from edgekit.bundle.recipe import Recipe
from edgekit.errors import BadSource, IllegalSteps, UnsupportedModel
from edgekit.export.families import Family, PartJob, family_of
from edgekit.export.families.tokenizers import write_tokenizer
from edgekit.export.onnx_folder import surgery
from edgekit.export.onnx_folder.graphs import find_graph, graph_names
from edgekit.export.onnx_folder.match import STATES, TIME, Adoption, match
from edgekit.export.onnx_folder.probe import Probe, finest_multiple, prove
from edgekit.export.plan import ExportPlan, PartPlan
from edgekit.export.sources import Source, provenance
from edgekit.runtime.backends.devices import engine

Progress = Callable[[str, float], None]

BASE_BYTES = 200 * 2**20  # the interpreter, onnx, onnx_ir and ONNX Runtime
WRITING = 0.6  # of the time for a part; the rest proves it
SHARE = 2.5  # peak over the weights of a part: the graph as read, as written, and the engine's own copy
DENOISER = "UNet2DConditionModel"
LATENT = ("height", "width")
EXTRAS = ("safety_checker", "image_encoder", "feature_extractor")
SIZES_FIXED = "the exporter fixed how the network meets others"
SHARED_TIME = "all rows of a run have the time of the first (the graph takes one number); this runtime feeds one time"


@dataclass(frozen=True)
class FolderOptions:
    """What an adoption may be asked; `dialect` is `ort` (ONNX Runtime) or `std` (TensorRT), `steps` the new default."""

    dialect: Literal["ort", "std"] = "ort"
    family: str | None = None
    steps: int | None = None


@dataclass(frozen=True)
class _Prepared:
    family: Family
    recipe: Recipe
    adoptions: tuple[Adoption, ...]


def plan_pipeline(source: Source, options: FolderOptions) -> ExportPlan:
    """What `adopt_pipeline` would make and cost, from configs and the graphs' signatures.

    Raises:
        UsageError: whatever `adopt_pipeline` would refuse before it loads a weight.
    """
    ready = _prepare(source, options)
    parts = tuple(PartPlan(a.job.part, a.inputs, a.outputs, a.found.bytes) for a in ready.adoptions)
    return ExportPlan(
        family=ready.family.name,
        task=ready.family.task,
        precision="fp32",
        parts=parts,
        disk_bytes=sum(part.bytes for part in parts),
        peak_bytes=BASE_BYTES + int(SHARE * max(part.bytes for part in parts)),
        notes=("ready-made ONNX graphs are adopted; there is nothing to compare them with but themselves",),
    )


def adopt_pipeline(source: Source, staging: Path, *, options: FolderOptions, progress: Progress) -> Manifest:
    """Write the adopted graphs and tokenizers of a few-step pipeline under `staging`.

    Args:
        source: the folder, in diffusers' layout, with an ONNX graph per component.
        staging: an empty folder, the bundle to be.
        options: what was asked.
        progress: told what is done, and the fraction that is behind.

    Returns:
        The manifest, without its file rows: whoever seals the bundle hashes the folder.

    Raises:
        UsageError: a part is missing, no family claims the folder, or a graph is not what the recipe feeds and takes.
        ParityFailed: a graph answers with other shapes, with what is no number, or mixes the rows of a batch.
        SessionFailed: ONNX Runtime refuses a graph.
    """
    ready = _prepare(source, options)
    (staging / "graphs").mkdir(parents=True, exist_ok=True)
    total, done = sum(adoption.found.bytes for adoption in ready.adoptions), 0.0
    parts: dict[str, Part] = {}
    gates: list[Gate] = []
    notes: dict[str, str] = {}
    for adoption in ready.adoptions:
        name, share = adoption.job.part, adoption.found.bytes / total
        graph = staging / "graphs" / f"{name}.onnx"
        parts[name], times = _adopt(adoption, graph, _within(progress, name, done, done + WRITING * share))
        progress(f"{name}: proving", done + WRITING * share)
        probe = _probe(source, adoption, times)
        gates.append(prove(probe, graph))
        multiple = _multiple(source, adoption, probe, graph)
        if multiple > 1:
            ready = replace(ready, recipe=_with_multiple(ready.recipe, adoption, multiple))
            notes["sizes"] = f"the {name}'s latent has sides that are multiples of {multiple}: {SIZES_FIXED}"
        notes |= {TIME: SHARED_TIME} if times == "one" else {}
        done += share
    progress("tokenizers", 1.0)
    return _manifest(source, ready, staging, parts, tuple(gates), notes)


def _within(progress: Progress, name: str, start: float, end: float) -> Progress:
    """Progress from one share of the whole to another."""

    def tell(what: str, share: float) -> None:
        progress(f"{name}: {what}", start + (end - start) * share)

    return tell


def tools() -> tuple[str, ...]:
    """The packages that make a bundle of a ready-made folder."""
    return ("onnx", "onnx-ir", engine().wheel)


def _prepare(source: Source, options: FolderOptions) -> _Prepared:
    """All that can be refused from configs and signatures."""
    family = family_of(source, options.family)
    _check_classes(source)
    recipe, jobs = family.recipe(source), family.jobs(source)
    adoptions = tuple(match(job, find_graph(_folder(source, job), options.dialect)) for job in jobs)
    for adoption in adoptions:
        _check_layers(source, adoption)
    if options.steps is not None:
        recipe = _with_steps(recipe, options.steps)
    return _Prepared(family, _with_fixed_size(recipe, adoptions), adoptions)


def _check_classes(source: Source) -> None:
    """Old pages call every component OnnxRuntimeModel and ship no configs: there is nothing to make a recipe of."""
    nameless = [name for name in source.index if source.class_of(name) == "OnnxRuntimeModel"]
    if nameless:
        raise UnsupportedModel(
            f"{source.root}/model_index.json calls {', '.join(nameless)} OnnxRuntimeModel, so neither the latents' "
            f"scale nor the UNet's inputs are known. Export the original again with `optimum-cli export onnx`"
        )
    if source.class_of("unet") != DENOISER:
        there = source.class_of("transformer") or source.class_of("unet")
        raise UnsupportedModel(
            f"{source.root} denoises by {there}; of ready-made graphs those of a {DENOISER} are adopted. Export the "
            f"folder they were made from (safetensors)"
        )


def _folder(source: Source, job: PartJob) -> Path:
    """Where a part's graph lies. Raises BadSource: nowhere."""
    for name in dict.fromkeys((job.part, job.folder)):
        if graph_names(source.root / name):
            return source.root / name
    there = sorted(path.name for path in source.root.iterdir() if graph_names(path))
    raise BadSource(
        f"{source.root} has no graph for {job.part}: {job.part}/model.onnx is missing (there are {', '.join(there)}). "
        f"Is the download complete? `optimum-cli export onnx` writes every part"
    )


def _check_layers(source: Source, adoption: Adoption) -> None:
    """The penultimate hidden state is that of the model, and not of what happened to be exported. Raises BadSource."""
    taken = [name for name in adoption.sources.values() if name.startswith("hidden_states.")]
    layers = source.config(adoption.job.folder).get("num_hidden_layers")
    if taken and taken != [f"hidden_states.{layers - 1 if isinstance(layers, int) else None}"]:
        raise BadSource(
            f"{adoption.found.path} has hidden states up to the one after {taken[0]}; by the config beside it the "
            f"model has {layers} layers. Do graph and config belong together?"
        )


def _with_steps(recipe: Recipe, steps: int) -> Recipe:
    base = recipe.stages[0]
    if steps not in base.sampler.legal_steps:
        legal = ", ".join(map(str, base.sampler.legal_steps))
        raise IllegalSteps(f"--steps {steps}: this model was distilled for {legal} steps; choose one of these")
    return _with_base(recipe, sampler=msgspec.structs.replace(base.sampler, steps=steps))


def _with_fixed_size(recipe: Recipe, adoptions: tuple[Adoption, ...]) -> Recipe:
    """A recipe for the one size that the graphs were exported for, where they were. Raises BadSource."""
    unet = next(adoption for adoption in adoptions if adoption.job.part == recipe.stages[0].denoise.part)
    texts = {a.outputs[0].shape[1] for a in adoptions if a.job.part.startswith("text_encoder")}
    length = unet.fixed.get("length")
    if length is not None and texts != {length}:
        raise BadSource(f"{unet.found.path} takes {length} text states, the text encoders give {texts}")
    if not set(LATENT) & unet.fixed.keys():
        return recipe
    init = recipe.stages[0].init
    wanted = (init.height // init.downscale, init.width // init.downscale)
    there = (unet.fixed.get("height", wanted[0]), unet.fixed.get("width", wanted[1]))
    if there != wanted:
        raise BadSource(
            f"{unet.found.path} is exported for a latent of {there[0]} x {there[1]}, its config says {wanted[0]} x "
            f"{wanted[1]}: set sample_size in {unet.found.path.with_name('config.json')} to the graph's"
        )
    return _with_base(recipe, init=msgspec.structs.replace(init, fixed_size=True))


def _with_multiple(recipe: Recipe, adoption: Adoption, multiple: int) -> Recipe:
    """A recipe that draws sizes the graph can take, and by default such a one. Raises BadSource."""
    init = recipe.stages[0].init
    odd = [side for side in (init.height, init.width) if side % (init.downscale * multiple)]
    if odd:
        raise BadSource(
            f"{adoption.found.path} takes latents with sides that are multiples of {multiple}; by the config beside it "
            f"pictures of {init.height} x {init.width} are drawn, {init.downscale} pixels a side of the latent. Set "
            f"sample_size there to such a multiple"
        )
    return _with_base(recipe, init=msgspec.structs.replace(init, multiple=math.lcm(init.multiple, multiple)))


def _with_base(recipe: Recipe, **changes: Any) -> Recipe:
    base = msgspec.structs.replace(recipe.stages[0], **changes)
    return msgspec.structs.replace(recipe, stages=(base, *recipe.stages[1:]))


def _adopt(adoption: Adoption, graph: Path, progress: Progress) -> tuple[Part, surgery.Times]:
    """Rewrite one graph and write it; its part, and whether the rows of a batch may have times of their own."""
    model = surgery.load(adoption.found.path)
    times: surgery.Times = "each"
    if any(spec.name == TIME for spec in adoption.inputs):
        times = surgery.vector_timestep(model, TIME)
    if adoption.joined:
        surgery.join_inputs(model, STATES, adoption.joined, axis=2)
    for spec in adoption.outputs:
        value = surgery.value_named(model.graph.outputs, adoption.sources[spec.name])
        surgery.rename(model, value, spec.name)
        if spec.name == adoption.halved:
            surgery.first_channels(model, spec.name, int(spec.shape[1]))
    surgery.keep_outputs(model, [spec.name for spec in adoption.outputs])
    shapes = {spec.name: spec.shape for spec in adoption.inputs} | {spec.name: spec.shape for spec in adoption.outputs}
    parameters = surgery.parameters(model)
    surgery.write(model, shapes, graph, progress)
    part = Part(
        graph=f"graphs/{graph.name}",
        inputs=adoption.inputs,
        outputs=adoption.outputs,
        data=(f"graphs/{graph.name}.data",),
        precision="fp16" if any(spec.dtype == "float16" for spec in adoption.outputs) else "fp32",
        parameters=parameters,
    )
    return part, times


def _probe(source: Source, adoption: Adoption, times: surgery.Times) -> Probe:
    job, coarsest = adoption.job, _coarsest(source, adoption)
    sizes: list[dict[str, int]] = []
    for number, latent in enumerate(((2, 3), (3, 1))):
        each = {axis: values[min(number + 1, len(values) - 1)] for axis, values in job.sizes.items() if axis != "batch"}
        if coarsest:
            each |= dict(zip(LATENT, (coarsest * side for side in latent), strict=True))
        sizes.append(each)
    distinct = sizes if any(isinstance(dim, str) for spec in adoption.inputs for dim in spec.shape[1:]) else sizes[:1]
    return Probe(
        job.part, adoption.inputs, adoption.outputs, job.fill, tuple(distinct), (TIME,) if times == "one" else ()
    )


def _coarsest(source: Source, adoption: Adoption) -> int:
    """What a denoiser divides its latent by on the way down; 0 for other parts."""
    axes = adoption.job.sizes
    if not set(LATENT) <= axes.keys() or "image_height" in axes:
        return 0
    levels = source.config(adoption.job.folder).get("block_out_channels") or (1,)
    return int(2 ** (len(levels) - 1))


def _multiple(source: Source, adoption: Adoption, probe: Probe, graph: Path) -> int:
    """What the sides of a denoiser's latent must be multiples of; 1 for other parts, and where the size is fixed."""
    coarsest = _coarsest(source, adoption)
    if coarsest < 2 or set(LATENT) & adoption.fixed.keys():
        return 1
    return finest_multiple(probe, graph, LATENT, coarsest)


def _manifest(
    source: Source,
    ready: _Prepared,
    staging: Path,
    parts: dict[str, Part],
    gates: tuple[Gate, ...],
    notes: dict[str, str],
) -> Manifest:
    from edgekit.runtime.diffusion.tables import compile_tables

    left_out = tuple(name for name in EXTRAS if source.class_of(name))
    return Manifest(
        format=FORMAT,
        task=ready.family.task,
        family=ready.family.name,
        parts=parts,
        files=(),
        provenance=provenance(source, tools()),
        precision=PrecisionRecord(requested="fp32", gates=gates),
        tokenizers={
            name: write_tokenizer(source, asked, staging / asked.folder / "tokenizer.json", staging)
            for name, asked in ready.family.tokenizers(source).items()
        },
        recipe=ready.recipe,
        tables=compile_tables(ready.recipe),
        notes={**notes, **({"left_out": ", ".join(left_out)} if left_out else {})},
    )
