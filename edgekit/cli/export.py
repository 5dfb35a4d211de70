"""`edgekit export`: a model folder becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli import terminal

if TYPE_CHECKING:
    from edgekit.bundle.manifest import Manifest
    from edgekit.export.build import ExportRequest, LoraFile
    from edgekit.export.plan import ExportPlan


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The bundle to write.")
@click.option("--task", help="Refuse a source of another task.")
@click.option("--family", help="Exporter to use; read from the source by default.")
@click.option("--device", default="cpu", show_default=True, help="Target: cpu, cuda, openvino, trt or trt-rtx.")
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    help="fp32, fp16, int8, int8-128, int8-row, int4, int4-128; auto: measure the last five here, take the fastest; "
    "mixed: every layer its own, by measured error, size and time.",
)
@click.option("--budget", multiple=True, help="Of mixed: 300MB, 4.5bits a weight, 20ms, or 0.6x the time. Repeatable.")
@click.option("--metric-cap", multiple=True, help="Of mixed: most error, NAME=X (content, quality, kl). Repeatable.")
@click.option("--plan", type=click.Path(path_type=Path), help="Of mixed: take the choices of this plan as they are.")
@click.option("--protect", multiple=True, help="Of mixed: layers that keep floats, as a pattern. Repeatable.")
@click.option("--calibration", type=click.Path(path_type=Path), help="Of mixed: prompts, text, or a picture folder.")
@click.option("--tiny-vae", type=click.Path(path_type=Path), help="Small decoder to add, for previews and run --tiny.")
@click.option("--lora", multiple=True, help="LoRA to fold in first, FILE[:SCALE]. Repeatable.")
@click.option("--ip-adapter", type=click.Path(path_type=Path), help="IP-Adapter to add, for run --reference.")
@click.option("--steps", type=int, help="Default step count written into the bundle.")
@click.option("--max-memory", help="Hard cap of the export's memory, e.g. 8GB.")
@click.option("--dry-run", is_flag=True, help="Say what it would make and cost; write nothing.")
@click.option("--force", is_flag=True, help="Replace a different bundle of this name.")
@click.option("--quiet", is_flag=True, help="No progress.")
@terminal.json_option
def command(
    source: Path,
    output: Path,
    task: str | None,
    family: str | None,
    device: str,
    precision: str,
    budget: tuple[str, ...],
    metric_cap: tuple[str, ...],
    plan: Path | None,
    protect: tuple[str, ...],
    calibration: Path | None,
    tiny_vae: Path | None,
    lora: tuple[str, ...],
    ip_adapter: Path | None,
    steps: int | None,
    max_memory: str | None,
    dry_run: bool,
    force: bool,
    quiet: bool,
    json: bool,
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
            tiny_vae=tiny_vae,
            ip_adapter=ip_adapter,
            loras=tuple(parse_lora(text) for text in lora),
            steps=steps,
            max_memory=None if max_memory is None else terminal.parse_bytes(max_memory),
            overwrite=force,
            budgets=budget,
            caps=metric_cap,
            protect=protect,
            plan=plan,
            calibration=calibration,
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
        if facts["reason"]:
            terminal.note(facts["reason"])


def _facts(manifest: Manifest) -> dict[str, Any]:
    from edgekit.export.build import PRECISION_NOTE

    return {
        "task": manifest.task,
        "family": manifest.family,
        "parts": list(manifest.parts),
        "precision": manifest.precision.requested,
        "stored": {name: part.precision for name, part in manifest.parts.items()},
        "reason": manifest.notes.get(PRECISION_NOTE, ""),
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
    click.echo(f"bundle {terminal.size(plan.disk_bytes)}, peak memory {terminal.size(plan.peak_bytes)}{seconds}")
    for line in plan.notes:
        click.echo(f"note: {line}")
