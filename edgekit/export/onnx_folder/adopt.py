"""The door of this package: a request for a ready-made folder, refused where it asks for what only weights allow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgekit.bundle.manifest import Manifest
from edgekit.errors import BadRequest
from edgekit.export.memory import memory_cap
from edgekit.export.plan import ExportPlan
from edgekit.export.sources import Source

if TYPE_CHECKING:
    from edgekit.export.build import ExportRequest
    from edgekit.export.onnx_folder.diffusion import FolderOptions

Progress = Callable[[str, float], None]
Dialect = Literal["ort", "std"]


def plan_folder(source: Source, request: ExportRequest, dialect: Dialect) -> ExportPlan:
    """What adopting a folder would make and cost, from configs and signatures.

    Raises:
        UsageError: whatever `adopt_folder` would refuse before it loads a weight.
    """
    _refuse(source, request)
    if source.kind == "language":
        from edgekit.export.onnx_folder.language import plan_decoder

        return plan_decoder(source, dialect)
    from edgekit.export.onnx_folder.diffusion import plan_pipeline

    return plan_pipeline(source, _options(request, dialect))


def adopt_folder(
    source: Source, staging: Path, request: ExportRequest, dialect: Dialect, progress: Progress
) -> Manifest:
    """Write graphs and tokenizers under `staging`; the manifest comes back without its file rows.

    Raises:
        UsageError: the folder or an option cannot be meant.
        ParityFailed: a graph contradicts itself or its configs when it is run.
        SessionFailed: ONNX Runtime refuses a graph.
        MemoryLimit: `max_memory` was exceeded.
    """
    _refuse(source, request)
    with memory_cap(request.max_memory):
        if source.kind == "language":
            from edgekit.export.onnx_folder.language import adopt_decoder

            return adopt_decoder(source, staging, dialect=dialect, progress=progress)
        from edgekit.export.onnx_folder.diffusion import adopt_pipeline

        return adopt_pipeline(source, staging, options=_options(request, dialect), progress=progress)


def _options(request: ExportRequest, dialect: Dialect) -> FolderOptions:
    from edgekit.export.onnx_folder.diffusion import FolderOptions

    return FolderOptions(dialect=dialect, family=request.family, steps=request.steps)


def _refuse(source: Source, request: ExportRequest) -> None:
    """A graph is taken as it is: what changes weights needs the folder it was exported from."""
    original = f"{source.root} holds ready-made ONNX graphs; export the folder they were made from (safetensors)"
    if request.precision != "fp32":
        raise BadRequest(f"--precision {request.precision}: graphs are adopted as they are. {original}")
    if request.tiny_vae is not None:
        raise BadRequest("--tiny-vae is traced from its weights; a folder of ready-made graphs takes none")
    if request.ip_adapter is not None:
        raise BadRequest(f"--ip-adapter adds layers to a UNet, which a graph is no longer open to. {original}")
    if request.loras:
        raise BadRequest(f"--lora folds into weights by their names, which a graph no longer has. {original}")
    if source.kind == "language" and request.steps is not None:
        raise BadRequest("--steps is a few-step generator's option; a language model has none")
    if source.kind == "language" and request.family is not None:
        raise BadRequest("--family chooses an image family; a language model's is the model_type of its config.json")
