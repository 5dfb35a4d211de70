"""From a few-step pipeline's folder to the parts of a bundle: plan, trace, compare, describe."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from edgekit.bundle.files import sha256_file, sha256_tree
from edgekit.bundle.manifest import AxisRange, Gate, Manifest, Part, PrecisionRecord, Provenance, Tokenizer
from edgekit.bundle.recipe import Recipe, Stage, Table
from edgekit.errors import BadRequest, IllegalSteps, MemoryLimit
from edgekit.export import lora as loras
from edgekit.export.families import Family, PartJob, family_of
from edgekit.export.families import weights as stored
from edgekit.export.families.distilled import distilled
from edgekit.export.families.ip_adapter import with_image_prompt
from edgekit.export.families.tiny import tiny_folder, with_tiny_decoder
from edgekit.export.families.tokenizers import write_tokenizer
from edgekit.export.plan import ExportPlan, PartPlan
from edgekit.export.sources import Source, provenance
from edgekit.export.worker import Event, Lora, Task, run_task

Progress = Callable[[str, float], None]

FLOAT_BYTES = 4
GROUP_BYTES = 512 * 2**20  # parts up to this much together share a child; starting torch costs seconds
TOOLS = ("torch", "diffusers", "transformers", "onnxscript", "onnx-ir", "onnxruntime")
BASE_BYTES = 768 * 2**20  # a child's peak over its weights: 0.70 GiB measured (benchmarks/export_diffusion.py)
STAGES = {"load": 0.0, "reference": 0.1, "trace": 0.15, "write": 0.75, "compare": 0.85}  # share of a part's time before


@dataclass(frozen=True)
class DiffusionOptions:
    """What an export may be asked; `attention` is `ort` (ONNX Runtime) or `std` (TensorRT), `steps` the new default.

    `tiny_vae` is the folder of a small decoder (AutoencoderTiny) for previews, in place of one in the model folder;
    `ip_adapter` a safetensors file that lets the UNet see a reference picture.
    """

    attention: Literal["ort", "std"] = "ort"
    precision: str = "fp32"
    family: str | None = None
    loras: tuple[Lora, ...] = ()
    steps: int | None = None
    max_memory: int | None = None
    tiny_vae: str | None = None
    ip_adapter: str | None = None

    def __post_init__(self) -> None:
        if self.precision != "fp32":
            raise BadRequest(
                f"--precision {self.precision} for an image model: the graphs are traced and compared in fp32. Export "
                f"fp32; fp16 on a CPU is slower than fp32, and a TensorRT engine converts as it is built"
            )


def plan_diffusion(source: Source, options: DiffusionOptions) -> ExportPlan:
    """What an export would make and cost, from configs and safetensors headers; torch is not imported.

    Raises:
        UsageError: whatever `export_diffusion` would refuse before it loads a weight.
    """
    family, _, jobs = _prepare(source, options)
    counts = {job.part: _parameters(source, job) for job in jobs}
    parts = tuple(
        PartPlan(job.part, job.inputs, job.outputs, FLOAT_BYTES * counts[job.part], counts[job.part]) for job in jobs
    )
    peak = max(_peak(source, group) for group in _groups(source, jobs))
    notes = [f"{name} is not part of the contract and is left out" for name in _left_out(source, jobs)]
    if options.max_memory is not None and peak > options.max_memory:
        notes.append(f"--max-memory is {options.max_memory:,} bytes, below the estimated peak of {peak:,}")
    return ExportPlan(
        family=family.name,
        task=family.task,
        precision=options.precision,
        parts=parts,
        disk_bytes=sum(part.bytes for part in parts),
        peak_bytes=peak,
        notes=tuple(notes),
    )


def export_diffusion(source: Source, staging: Path, *, options: DiffusionOptions, progress: Progress) -> Manifest:
    """Write graphs and tokenizers of a few-step pipeline under `staging`.

    Args:
        source: the model folder.
        staging: an empty folder, the bundle to be.
        options: what was asked.
        progress: told what is done, and the fraction that is behind.

    Returns:
        The manifest, without its file rows: whoever seals the bundle hashes the folder.

    Raises:
        UsageError: the folder or an option cannot be meant.
        ParityFailed: a graph does not answer like its torch module.
        MemoryLimit: `max_memory` was, or would surely be, exceeded.
    """
    family, recipe, jobs = _prepare(source, options)
    graphs = staging / "graphs"
    graphs.mkdir(parents=True, exist_ok=True)
    gates = _make_graphs(source, graphs, jobs, options, progress)
    progress("tokenizers", 1.0)
    return Manifest(
        format=1,
        task=family.task,
        family=family.name,
        parts={job.part: _part(graphs, job, source) for job in jobs},
        files=(),
        provenance=_provenance(source, options),
        precision=PrecisionRecord(requested=options.precision, gates=gates),
        tokenizers=_tokenizers(source, family, staging),
        recipe=recipe,
        tables=_tables(recipe),
        axes={axis: AxisRange(max=most) for job in jobs for axis, most in job.most.items()},
        notes=_notes(source, jobs, options),
    )


def _prepare(source: Source, options: DiffusionOptions) -> tuple[Family, Recipe, tuple[PartJob, ...]]:
    """All that can be refused without loading a weight."""
    if options.loras:
        source = distilled(source, options.family)
    family = family_of(source, options.family)
    recipe, jobs = family.recipe(source), family.jobs(source)
    if options.ip_adapter is not None:
        recipe, jobs = with_image_prompt(source, recipe, jobs, Path(options.ip_adapter))
    tiny = Path(options.tiny_vae) if options.tiny_vae is not None else tiny_folder(source)
    if tiny is not None:
        recipe, jobs = with_tiny_decoder(recipe, jobs, tiny)
    if options.steps is not None:
        recipe = _with_steps(recipe, options.steps)
    names = {job.lora: stored.shapes(source.root / job.folder) for job in jobs if job.lora is not None}
    for each in options.loras:
        loras.check(Path(each.path), names)
    return family, recipe, jobs


def _with_steps(recipe: Recipe, steps: int) -> Recipe:
    base = recipe.stages[0]
    if steps not in base.sampler.legal_steps:
        legal = ", ".join(map(str, base.sampler.legal_steps))
        raise IllegalSteps(f"--steps {steps}: this model was distilled for {legal} steps; choose one of these")
    changed: Stage = msgspec.structs.replace(base, sampler=msgspec.structs.replace(base.sampler, steps=steps))
    return msgspec.structs.replace(recipe, stages=(changed, *recipe.stages[1:]))


def _parameters(source: Source, job: PartJob) -> int:
    own = stored.parameters(source.root / job.folder, job.weights) if job.folder else 0
    return own + sum(stored.parameters(source.root / each, ()) for each in job.beside) + _adapter_parameters(job)


def _loaded_bytes(source: Source, job: PartJob) -> int:
    """Bytes torch loads for a part: its whole component, those beside it, and an adapter."""
    folders = (*([job.folder] if job.folder else []), *job.beside)
    return FLOAT_BYTES * (sum(stored.parameters(source.root / each, ()) for each in folders) + _adapter_parameters(job))


def _adapter_parameters(job: PartJob) -> int:
    return stored.parameters_of_file(Path(job.adapter)) if job.adapter is not None else 0


def _groups(source: Source, jobs: tuple[PartJob, ...]) -> Iterator[tuple[PartJob, ...]]:
    """Parts that share a child, in order: small ones together, a large one alone."""
    group: list[PartJob] = []
    held = 0
    for job in jobs:
        size = _loaded_bytes(source, job)
        if group and held + size > GROUP_BYTES:
            yield tuple(group)
            group, held = [], 0
        group.append(job)
        held += size
    yield tuple(group)


def _peak(source: Source, group: tuple[PartJob, ...]) -> int:
    """Estimated peak of one child: parts of a group follow each other, so the largest counts."""
    return BASE_BYTES + max(_loaded_bytes(source, job) for job in group)


def _make_graphs(
    source: Source, graphs: Path, jobs: tuple[PartJob, ...], options: DiffusionOptions, progress: Progress
) -> tuple[Gate, ...]:
    shares = _shares(source, jobs)
    gates: list[Gate] = []
    done = 0.0

    def listen(event: Event) -> None:
        nonlocal done
        if event.stage:
            start, share = shares[event.part]
            done = max(done, start + share * STAGES[event.stage])  # a group is traced first, then compared
            progress(f"{event.part}: {event.stage}", done)
        if event.comparison is not None:
            gates.append(event.comparison.gate())

    for group in _groups(source, jobs):
        _check_memory(source, group, options)
        with tempfile.TemporaryDirectory(dir=graphs.parent, prefix=".references-") as references:
            task = Task(
                kind="trace",
                jobs=group,
                source=str(source.root),
                graphs=str(graphs),
                references=references,
                attention=options.attention,
                loras=options.loras,
                max_memory=options.max_memory,
            )
            run_task(task, listen)
            run_task(msgspec.structs.replace(task, kind="compare"), listen)
    return tuple(gates)


def _shares(source: Source, jobs: tuple[PartJob, ...]) -> dict[str, tuple[float, float]]:
    """Start and length of each part on the progress bar: a constant for starting, then by weights."""
    work = {job.part: 50e6 + _loaded_bytes(source, job) for job in jobs}
    total, done, shares = sum(work.values()), 0.0, {}
    for part, amount in work.items():
        shares[part] = (done / total, amount / total)
        done += amount
    return shares


def _check_memory(source: Source, group: tuple[PartJob, ...], options: DiffusionOptions) -> None:
    """The weights alone are a lower bound: refuse before loading what cannot fit."""
    least = max(_loaded_bytes(source, job) for job in group)
    if options.max_memory is not None and least > options.max_memory:
        raise MemoryLimit(
            f"{', '.join(job.part for job in group)}: the weights alone take {least:,} bytes in float32, over "
            f"--max-memory {options.max_memory:,}; give it at least {_peak(source, group):,}"
        )


def _part(graphs: Path, job: PartJob, source: Source) -> Part:
    graph, data = graphs / f"{job.part}.onnx", graphs / f"{job.part}.onnx.data"
    return Part(
        graph=f"{graphs.name}/{graph.name}",
        inputs=job.inputs,
        outputs=job.outputs,
        data=(f"{graphs.name}/{data.name}",) if data.exists() else (),
        parameters=_parameters(source, job),
    )


def _tokenizers(source: Source, family: Family, staging: Path) -> dict[str, Tokenizer]:
    return {
        name: write_tokenizer(source, asked, staging / asked.folder / "tokenizer.json", staging)
        for name, asked in family.tokenizers(source).items()
    }


def _tables(recipe: Recipe) -> tuple[Table, ...]:
    from edgekit.runtime.diffusion.tables import compile_tables

    return compile_tables(recipe)


def _left_out(source: Source, jobs: tuple[PartJob, ...]) -> tuple[str, ...]:
    """Components of the pipeline that no graph is made of (the safety checker, an image encoder)."""
    sees = any(job.part == "image_encoder" for job in jobs)  # its graph does what the feature extractor says
    extras = ("safety_checker", *(() if sees else ("image_encoder", "feature_extractor")))
    return tuple(name for name in extras if source.class_of(name))


def _notes(source: Source, jobs: tuple[PartJob, ...], options: DiffusionOptions) -> dict[str, str]:
    """What the folder has and the bundle has not, and the other way round."""
    left_out = _left_out(source, jobs)
    notes = {"left_out": ", ".join(left_out)} if left_out else {}
    if options.tiny_vae is not None:
        folder = Path(options.tiny_vae)
        notes["tiny_vae"] = f"{folder.resolve().name} sha256:{sha256_tree(folder)}"
    if options.ip_adapter is not None:
        file = Path(options.ip_adapter)
        notes["ip_adapter"] = f"{file.name} sha256:{sha256_file(file)}"
        (encoder,) = (Path(job.folder) for job in jobs if job.part == "image_encoder")
        if encoder.is_absolute():
            notes["image_encoder"] = f"beside the adapter, sha256:{sha256_tree(encoder)}"
    return notes


def _provenance(source: Source, options: DiffusionOptions) -> Provenance:
    told = (f"{Path(each.path).name} sha256:{sha256_file(Path(each.path))} x{each.scale:g}" for each in options.loras)
    return provenance(source, TOOLS, tuple(told))
