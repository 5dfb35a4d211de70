"""`edgekit inspect`: what a bundle holds and promises, with every hash verified."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli import terminal

if TYPE_CHECKING:
    from edgekit.bundle.manifest import Manifest


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--verify/--no-verify", default=True, show_default=True, help="Check every file's sha256.")
@terminal.json_option
def command(
    bundle: Path,
    verify: bool,
    json: bool,
) -> None:
    """Print parts, sizes, recipe, legal steps, precision and provenance of a bundle."""

    def verb() -> None:
        from edgekit.bundle.store import read_bundle

        manifest = read_bundle(bundle, verify=verify).manifest
        if json:
            import msgspec

            facts: dict[str, Any] = {"bundle": str(bundle), "verified": verify}
            terminal.show_json({**facts, "manifest": msgspec.to_builtins(manifest)})
        else:
            _show(bundle, manifest, verified=verify)

    terminal.run_verb(verb, as_json=json)


def _show(path: Path, manifest: Manifest, *, verified: bool) -> None:
    total = sum(file.bytes for file in manifest.files)
    check = "every hash verified" if verified else "hashes not checked"
    click.echo(f"{path}: {manifest.task}, family {manifest.family}, {terminal.size(total)}, {check}\n")
    _show_parts(manifest)
    if manifest.recipe is not None:
        _show_recipe(manifest)
    if manifest.decoding is not None:
        _show_decoding(manifest)
    _show_record(manifest)


def _show_parts(manifest: Manifest) -> None:
    bytes_of = {file.path: file.bytes for file in manifest.files}
    rows = []
    for name, part in manifest.parts.items():
        weight = sum(bytes_of[path] for path in (part.graph, *part.data))
        inputs = "\n".join(f"{spec.name} {spec.dtype} ({', '.join(map(str, spec.shape))})" for spec in part.inputs[:8])
        if len(part.inputs) > 8:
            inputs += f"\n… and {len(part.inputs) - 8} more"
        rows.append((name, part.precision, terminal.size(weight), f"{part.parameters:,}", inputs))
    terminal.table("parts", ("part", "precision", "bytes", "parameters", "inputs"), rows)


def _show_recipe(manifest: Manifest) -> None:
    assert manifest.recipe is not None
    rows = []
    for stage in manifest.recipe.stages:
        guidance = stage.guidance
        scale = "" if guidance.kind == "none" else f" {guidance.scale:g}"
        legal = ", ".join(map(str, stage.sampler.legal_steps))
        rows.append(
            (
                stage.name,
                stage.sampler.kind,
                f"{stage.sampler.steps} of {legal}",
                guidance.kind + scale,
                stage.denoise.part,
            )
        )
    terminal.table("recipe", ("stage", "sampler", "steps (default of legal)", "guidance", "network"), rows)


def _show_decoding(manifest: Manifest) -> None:
    decoding = manifest.decoding
    assert decoding is not None
    kv = decoding.kv
    per_token = 2 * kv.layers * kv.heads * kv.head_dim * (4 if kv.dtype == "float32" else 2)
    rows = [
        ("dialect", decoding.dialect),
        ("context length", f"{decoding.context_length:,} tokens"),
        ("vocabulary", f"{decoding.vocab_size:,}"),
        ("KV cache", f"{kv.layers} layers x {kv.heads} heads x {kv.head_dim}, {terminal.size(per_token)} per token"),
        ("ends at", ", ".join(map(str, decoding.eos)) or "no end-of-sequence token"),
    ]
    if decoding.sliding_window is not None:
        rows.append(("sliding window", f"{decoding.sliding_window:,} tokens"))
    terminal.table("decoding", ("", ""), rows)


def _show_record(manifest: Manifest) -> None:
    origin = manifest.provenance
    rows = [("source", origin.source), ("source sha256", origin.source_sha256), ("licence", origin.licence)]
    rows += [("lora", lora) for lora in origin.loras]
    rows += [("made", origin.created)] if origin.created else []
    rows += [("tool", f"{name} {version}") for name, version in origin.tools.items()]
    rows += [("precision asked", manifest.precision.requested)]
    rows += [(f"{name} note", text) for name, text in manifest.notes.items()]
    rows += [("gate", f"{gate.what}: {gate.value:.3g} (limit {gate.limit:.3g})") for gate in manifest.precision.gates]
    terminal.table("provenance", ("", ""), rows)
