"""From a request to a finished bundle: recognise the source, export its parts, seal the bundle."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from edgekit import __version__
from edgekit.bundle.files import sha256_file
from edgekit.bundle.manifest import MANIFEST_FILE, Manifest, PrecisionRecord
from edgekit.bundle.store import new_bundle, read_bundle, sha256_tree
from edgekit.errors import BadRequest, BundleError, MemoryLimit, MissingPackage, UnknownDevice
from edgekit.export.memory import memory_cap
from edgekit.export.plan import ExportPlan
from edgekit.export.sources import Source, read_source
from edgekit.quant.budget import parse_budget
from edgekit.quant.precision import AUTO, PRECISIONS

if TYPE_CHECKING:
    from edgekit.export.families.export import DiffusionOptions

Report = Callable[[str, float], None]

Dialect = Literal["ort", "std"]
DIALECTS: dict[str, Dialect] = {"cpu": "ort", "cuda": "ort", "openvino": "ort", "trt": "std", "trt-rtx": "std"}
NEEDS = {  # kind of source -> the extra, and the modules it brings
    "language": ("export", ("onnx", "onnx_ir", "ml_dtypes")),
    "diffusion": ("torch", ("torch", "diffusers", "transformers", "onnxscript", "onnx_ir")),
    "ready-made": ("cpu,export", ("onnx", "onnx_ir", "ml_dtypes", "onnxruntime")),
}
STAGES = {"reading": (0.0, 0.3), "writing": (0.3, 1.0)}  # of a language export: where each stands on the whole scale
STAGES_OF_AUTO = {"measuring": (0.0, 0.6), "reading": (0.6, 0.7), "writing": (0.7, 1.0)}
MIXED = "mixed"  # what a user types for a choice per layer, by measurement
MIXED_NOTE = "sizes are those of the float export that mixed precision is measured on; the budget is on the result"
PRECISION_NOTE = "precision"  # the note of a manifest that says why `auto` took what it took


@dataclass(frozen=True)
class LoraFile:
    """A LoRA to fold into the weights before export."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class ExportRequest:
    """Everything `edgekit export` was asked; two equal requests on equal sources give equal bundles.

    Precision `auto` alone depends on the machine as well: what it chose, and why, is in the manifest.
    """

    source: Path
    target: Path
    device: str = "cpu"
    precision: str = "fp32"
    family: str | None = None
    task: str | None = None
    loras: tuple[LoraFile, ...] = field(default=())
    tiny_vae: Path | None = None
    ip_adapter: Path | None = None
    steps: int | None = None
    max_memory: int | None = None
    overwrite: bool = False
    budgets: tuple[str, ...] = ()
    caps: tuple[str, ...] = ()
    protect: tuple[str, ...] = ()
    plan: Path | None = None
    calibration: Path | None = None

    def __post_init__(self) -> None:
        if self.device not in DIALECTS:
            raise UnknownDevice(f"cannot export for {self.device!r}; known devices: {', '.join(DIALECTS)}")
        if self.tiny_vae is not None and not (self.tiny_vae / "config.json").is_file():
            raise BadRequest(f"--tiny-vae {self.tiny_vae}: no config.json there; name an AutoencoderTiny's folder")
        if self.ip_adapter is not None and not self.ip_adapter.is_file():
            raise BadRequest(f"--ip-adapter {self.ip_adapter}: no such file; name the adapter's *.safetensors file")
        self._check_mixed()
        for lora in self.loras:
            if not lora.path.is_file():
                raise BadRequest(f"--lora {lora.path}: no such file")
            if not math.isfinite(lora.scale):
                raise BadRequest(f"--lora {lora.path}: {lora.scale} is no scale")

    def _check_mixed(self) -> None:
        """Raise BadRequest for an option of mixed precision without it, or one that cannot be read."""
        given = {
            "--budget": self.budgets,
            "--metric-cap": self.caps,
            "--protect": self.protect,
            "--plan": self.plan,
            "--calibration": self.calibration,
        }
        if self.precision == MIXED:
            parse_budget(self.budgets, self.caps)
        elif unused := [name for name, value in given.items() if value]:
            raise BadRequest(f"{', '.join(unused)} is an option of --precision {MIXED}; add that, or leave it out")
        for name, path in (("--plan", self.plan), ("--calibration", self.calibration)):
            if path is not None and not path.exists():
                raise BadRequest(f"{name} {path}: no such file")

    def in_floats(self, target: Path) -> ExportRequest:
        """The request that mixed precision starts from: the same source in fp32, to another place."""
        return replace(
            self, target=target, precision="fp32", budgets=(), caps=(), protect=(), plan=None, calibration=None
        )

    def fingerprint(self) -> str:
        """Hash of all that decides the bundle's content: source and LoRA bytes, options, edgekit's version."""
        told: tuple[object, ...] = self.device, self.precision, self.family, self.steps
        told += ([lora.scale for lora in self.loras],)
        told += (self.budgets, self.caps, self.protect) if self.precision == MIXED else ()
        parts = [__version__, repr(told), sha256_tree(self.source)]
        parts += [] if self.tiny_vae is None else [sha256_tree(self.tiny_vae)]
        parts += [] if self.ip_adapter is None else [f"ip {_sha256_of_adapter(self.ip_adapter)}"]
        parts += [f"{sha256_tree(each)}" for each in (self.plan, self.calibration) if each is not None]
        parts += [hashlib.sha256(lora.path.read_bytes()).hexdigest() for lora in self.loras]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _sha256_of_adapter(path: Path) -> str:
    """Of an IP-Adapter's file and, where there is one, the image encoder beside it."""
    encoder = path.resolve().parent / "image_encoder"
    return sha256_file(path) + (sha256_tree(encoder) if encoder.is_dir() else "")


def plan(request: ExportRequest) -> ExportPlan:
    """What an export would make and cost, read from configs and file headers only.

    Raises:
        UsageError: whatever `export` would refuse before it loads a weight.
    """
    if request.precision == MIXED:
        planned = plan(request.in_floats(request.target))
        return msgspec.structs.replace(planned, precision=MIXED, notes=(*planned.notes, MIXED_NOTE))
    source = read_source(request.source)
    _require(source)
    if source.weights == "onnx":
        from edgekit.export.onnx_folder.adopt import plan_folder

        planned = plan_folder(source, request, DIALECTS[request.device])
    elif source.kind == "language":
        _refuse_for_language(request)
        planned = _plan_language(request)
    else:
        from edgekit.export.families.export import plan_diffusion

        planned = plan_diffusion(source, _diffusion_options(request))
    if request.task not in (None, planned.task):
        raise BadRequest(f"--task {request.task}: {request.source} is a {planned.task} model")
    return planned


def _plan_language(request: ExportRequest) -> ExportPlan:
    if request.precision == AUTO:
        from edgekit.export.language.choose import plan_auto

        return plan_auto(request.source)
    from edgekit.export.language.export import plan_language

    return plan_language(request.source, request.precision, DIALECTS[request.device])


def export(request: ExportRequest, report: Report) -> Manifest:
    """Export a model folder into a bundle, atomically: the target appears complete or not at all.

    A target that this very request already made is left alone.

    Raises:
        UsageError: the source or an option cannot be meant; BadRequest if the target exists and is something else,
            or lies inside the source.
        ParityFailed: an exported part does not answer like its source.
        MemoryLimit: `max_memory` is below the need, or was exceeded.
    """
    made = current(request)
    if made is not None:
        return made
    planned = plan(request)
    _check_target(request)
    if request.precision == MIXED:
        from edgekit.export.mixed import export_mixed

        return export_mixed(request, export, report)
    if request.max_memory is not None and planned.peak_bytes > request.max_memory:
        need, cap = (f"{count / 1e6:,.1f} MB" for count in (planned.peak_bytes, request.max_memory))
        raise MemoryLimit(f"--max-memory is {cap}; this export needs about {need}. `--dry-run` shows what takes it")
    fingerprint = request.fingerprint()
    with new_bundle(request.target, overwrite=request.overwrite) as draft:
        manifest = _export_parts(request, draft.root, report)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        provenance = msgspec.structs.replace(manifest.provenance, request=fingerprint, created=stamp)
        sealed = draft.seal(msgspec.structs.replace(manifest, provenance=provenance))
    report("done", 1.0)
    return sealed


def current(request: ExportRequest) -> Manifest | None:
    """The manifest of the target if this very request made it and it is intact, else None."""
    if not request.target.exists():
        return None
    try:
        manifest = read_bundle(request.target).manifest
    except BundleError:
        return None
    return manifest if manifest.provenance.request == request.fingerprint() else None


def _check_target(request: ExportRequest) -> None:
    """Refuse before the work what `new_bundle` would refuse after it, and a bundle that would change its own source."""
    source, target = request.source.resolve(), request.target.resolve()
    if source in target.parents:
        raise BadRequest(f"--output {target} lies inside its source {source}; write the bundle somewhere else")
    if target.exists() and not (target / MANIFEST_FILE).is_file():
        raise BadRequest(f"--output {target} exists and is not a bundle, so it is never replaced; choose another name")
    if target.exists() and not request.overwrite:
        raise BadRequest(f"--output {target} is another bundle; choose another name, or replace it with --force")


def _in_all(report: Report, spans: Mapping[str, tuple[float, float]]) -> Report:
    """Stages on one scale, each from one share of it to another, so that a bar fed with it never jumps back."""

    def in_all(what: str, share: float) -> None:
        start, end = spans[what]
        report(what, start + (end - start) * share)

    return in_all


def _export_parts(request: ExportRequest, staging: Path, report: Report) -> Manifest:
    """Write graphs and tokenizers under `staging`; the manifest comes back without its file rows."""
    source = read_source(request.source)
    if source.weights == "onnx":
        from edgekit.export.onnx_folder.adopt import adopt_folder

        return adopt_folder(source, staging, request, DIALECTS[request.device], report)
    if source.kind == "language":
        with memory_cap(request.max_memory):
            return _export_language(request, staging, report)
    from edgekit.export.families.export import export_diffusion

    return export_diffusion(source, staging, options=_diffusion_options(request), progress=report)


def _export_language(request: ExportRequest, staging: Path, report: Report) -> Manifest:
    """With `auto`, the manifest says what was asked, its part what was chosen, and its note why."""
    from edgekit.export.language.export import export_language

    precision, notes, spans = request.precision, {}, STAGES
    if precision == AUTO:
        from edgekit.export.language.choose import choose_precision

        spans = STAGES_OF_AUTO
        choice = choose_precision(request.source, staging, _in_all(report, spans))
        precision, notes = choice.precision, {PRECISION_NOTE: choice.reason}
    manifest = export_language(
        request.source,
        staging,
        precision=precision,
        dialect=DIALECTS[request.device],
        progress=_in_all(report, spans),
    )
    asked = PrecisionRecord(requested=request.precision)
    return msgspec.structs.replace(manifest, precision=asked, notes=manifest.notes | notes)


def _diffusion_options(request: ExportRequest) -> DiffusionOptions:
    from edgekit.export.families.export import DiffusionOptions
    from edgekit.export.worker import Lora

    return DiffusionOptions(
        attention=DIALECTS[request.device],
        precision=request.precision,
        family=request.family,
        loras=tuple(Lora(str(lora.path), lora.scale) for lora in request.loras),
        steps=request.steps,
        tiny_vae=None if request.tiny_vae is None else str(request.tiny_vae),
        ip_adapter=None if request.ip_adapter is None else str(request.ip_adapter),
        max_memory=request.max_memory,
    )


def _require(source: Source) -> None:
    """The packages an export needs are there. Raises MissingPackage with the extra that brings them."""
    kind = "ready-made" if source.weights == "onnx" else source.kind
    extra, names = NEEDS[kind]
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise MissingPackage(
            f"exporting a {kind} model needs {', '.join(missing)}; install edgekit[{extra}] on the machine that "
            f"exports (the device that runs the bundle needs none of it)"
        )


def _refuse_for_language(request: ExportRequest) -> None:
    """Options a language model's export does not have are refused, never dropped."""
    if request.precision == AUTO and request.device != "cpu":
        raise BadRequest(
            f"--precision {AUTO} measures on this machine's CPU, which says nothing of --device {request.device}; name "
            f"one of {', '.join(PRECISIONS)}"
        )
    if request.tiny_vae is not None:
        raise BadRequest("--tiny-vae is a few-step generator's option; a language model decodes no latents")
    if request.ip_adapter is not None:
        raise BadRequest("--ip-adapter goes into an image model's UNet; a language model sees no picture")
    if request.loras:
        raise BadRequest("--lora folds into image models; merge a language model's adapter with peft before export")
    if request.steps is not None:
        raise BadRequest("--steps is a few-step generator's option; a language model has none")
    if request.family is not None:
        raise BadRequest("--family chooses an image family; a language model's is the model_type of its config.json")
