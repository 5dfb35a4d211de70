"""`edgekit export`: a model folder becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgekit.cli import terminal

if TYPE_CHECKING:
    from edgekit.bundle.manifest import Manifest
    from edgekit.export.build import ExportRequest, LoraFile
    from edgekit.export.plan import ExportPlan


def command(
    source: Annotated[Path, typer.Argument(help="Folder that transformers or diffusers saved.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The bundle to write.")],
    task: Annotated[str | None, typer.Option(help="Refuse a source of another task.")] = None,
    family: Annotated[str | None, typer.Option(help="Exporter to use; read from the source by default.")] = None,
    device: Annotated[str, typer.Option(help="Target: cpu, cuda, openvino, trt or trt-rtx.")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32, fp16, int8 or int4.")] = "fp32",
    lora: Annotated[list[str] | None, typer.Option(help="LoRA to fold in first, FILE[:SCALE]. Repeatable.")] = None,
    steps: Annotated[int | None, typer.Option(help="Default step count written into the bundle.")] = None,
    max_memory: Annotated[str | None, typer.Option(help="Hard cap of the export's memory, e.g. 8GB.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would make and cost; write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a different bundle of this name.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    json: Annotated[bool, terminal.JSON] = False,
) -> None:
    """Compile a model folder into a bundle, checked against its source and written atomically."""

    def verb() -> None:
        from edgekit.export import build

        request = build.ExportRequest(
            source=source,
            target=output,
            device=device,
            precision=precision,
            family=family,
            task=task,
            loras=tuple(parse_lora(text) for text in lora or ()),
            steps=steps,
            max_memory=None if max_memory is None else terminal.parse_bytes(max_memory),
            overwrite=force,
        )
        if dry_run:
            _show_plan(build.plan(request), as_json=json)
        else:
            _export(request, quiet=quiet, as_json=json)

    terminal.run_verb(verb, as_json=json)


def parse_lora(text: str) -> LoraFile:
    """`file.safetensors` or `file.safetensors:0.8`; a path may itself hold colons."""
    from edgekit.errors import BadRequest
    from edgekit.export.build import LoraFile

    path, colon, scale = text.rpartition(":")
    if not colon or Path(text).is_file():
        return LoraFile(Path(text))
    try:
        return LoraFile(Path(path), float(scale))
    except ValueError as why:
        raise BadRequest(f"--lora {text!r}: {scale!r} is not a scale; write FILE or FILE:0.8") from why


def _export(request: ExportRequest, *, quiet: bool, as_json: bool) -> None:
    from edgekit.export import build

    made = build.current(request)
    if made is None:
        with terminal.progress(quiet=quiet or as_json) as report:
            manifest = build.export(request, report)
    else:
        manifest = made
    state = "up to date" if made is not None else "written"
    if as_json:
        terminal.show_json({"bundle": str(request.target), "state": state, **_facts(manifest)})
    elif not quiet:
        facts = _facts(manifest)
        terminal.note(
            f"{request.target} {state}: {facts['task']}, family {facts['family']}, {terminal.size(facts['bytes'])}"
        )


def _facts(manifest: Manifest) -> dict[str, Any]:
    return {
        "task": manifest.task,
        "family": manifest.family,
        "parts": list(manifest.parts),
        "precision": manifest.precision.requested,
        "bytes": sum(file.bytes for file in manifest.files),
    }


def _show_plan(plan: ExportPlan, *, as_json: bool) -> None:
    import msgspec

    if as_json:
        terminal.show_json({"plan": msgspec.to_builtins(plan)})
        return
    rows = [
        (
            part.name,
            terminal.size(part.bytes),
            ", ".join(f"{spec.name} {spec.dtype} ({', '.join(map(str, spec.shape))})" for spec in part.inputs),
        )
        for part in plan.parts
    ]
    terminal.table(
        f"{plan.family} ({plan.task}) at {plan.precision}: nothing was written", ("part", "weights", "inputs"), rows
    )
    seconds = "" if plan.seconds is None else f", about {plan.seconds:.0f} s"
    typer.echo(f"bundle {terminal.size(plan.disk_bytes)}, peak memory {terminal.size(plan.peak_bytes)}{seconds}")
    for line in plan.notes:
        typer.echo(f"note: {line}")
