"""From a request to a finished bundle: recognise the source, export its parts, seal the bundle."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from edgekit import __version__
from edgekit.bundle.manifest import Manifest
from edgekit.bundle.store import new_bundle, read_bundle, sha256_tree
from edgekit.errors import BadRequest, BundleError, UnknownDevice
from edgekit.export.plan import ExportPlan
from edgekit.export.sources import Source, read_source

Report = Callable[[str, float], None]

DIALECTS = {"cpu": "ort", "cuda": "ort", "openvino": "ort", "trt": "std", "trt-rtx": "std"}  # device -> graph dialect


@dataclass(frozen=True)
class LoraFile:
    """A LoRA to fold into the weights before export."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class ExportRequest:
    """Everything `edgekit export` was asked; two equal requests on equal sources give equal bundles."""

    source: Path
    target: Path
    device: str = "cpu"
    precision: str = "fp32"
    family: str | None = None
    task: str | None = None
    loras: tuple[LoraFile, ...] = field(default=())
    steps: int | None = None
    max_memory: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.device not in DIALECTS:
            raise UnknownDevice(f"cannot export for {self.device!r}; known devices: {', '.join(DIALECTS)}")
        for lora in self.loras:
            if not lora.path.is_file():
                raise BadRequest(f"--lora {lora.path}: no such file")

    def fingerprint(self) -> str:
        """Hash of all that decides the bundle's content: source and LoRA bytes, options, edgekit's version."""
        told = (self.device, self.precision, self.family, self.steps, [lora.scale for lora in self.loras])
        parts = [__version__, repr(told), sha256_tree(self.source)]
        parts += [hashlib.sha256(lora.path.read_bytes()).hexdigest() for lora in self.loras]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def plan(request: ExportRequest) -> ExportPlan:
    """What an export would make and cost, read from configs and file headers only."""
    source = read_source(request.source)
    if source.kind == "language":
        from edgekit.export.language.export import plan_language

        _refuse_for_language(request)
        return plan_language(request.source, request.precision, DIALECTS[request.device])
    from edgekit.export.families.export import plan_diffusion

    return plan_diffusion(source, _diffusion_options(request))


def export(request: ExportRequest, report: Report) -> Manifest:
    """Export a model folder into a bundle, atomically: the target appears complete or not at all.

    A target that this very request already made is left alone.

    Raises:
        UsageError: the source or an option cannot be meant; BadRequest if the target exists and is something else.
        ParityFailed: an exported part does not answer like its source.
        MemoryLimit: `max_memory` would be exceeded.
    """
    made = current(request)
    if made is not None:
        return made
    fingerprint = request.fingerprint()
    with new_bundle(request.target, overwrite=request.overwrite) as draft:
        manifest = _export_parts(request, draft.root, report)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        provenance = msgspec.structs.replace(manifest.provenance, request=fingerprint, created=stamp)
        return draft.seal(msgspec.structs.replace(manifest, provenance=provenance))


def current(request: ExportRequest) -> Manifest | None:
    """The manifest of the target if this very request made it and it is intact, else None."""
    if not request.target.exists():
        return None
    try:
        manifest = read_bundle(request.target).manifest
    except BundleError:
        return None
    return manifest if manifest.provenance.request == request.fingerprint() else None


def _export_parts(request: ExportRequest, staging: Path, report: Report) -> Manifest:
    """Write graphs and tokenizers under `staging`; the manifest comes back without its file rows."""
    source = read_source(request.source)
    if source.kind == "language":
        from edgekit.export.language.export import export_language

        _refuse_for_language(request)
        return export_language(
            request.source, staging, precision=request.precision, dialect=DIALECTS[request.device], progress=report
        )
    from edgekit.export.families.export import export_diffusion

    return export_diffusion(source, staging, options=_diffusion_options(request), progress=report)


def _refuse_for_language(request: ExportRequest) -> None:
    """Options a language model's export does not have are refused, never dropped."""
    if request.loras:
        raise BadRequest("--lora folds into image models; merge a language model's adapter with peft before export")
    if request.steps is not None:
        raise BadRequest("--steps is a few-step generator's option; a language model has none")
