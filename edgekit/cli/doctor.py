"""`edgekit doctor`: what is installed, which devices answer, and what conflicts."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import click

from edgekit.cli import terminal

PACKAGES = {
    "runtime": ("numpy", "msgspec", "tokenizers", "jinja2", "pillow", "onnxruntime", "onnxruntime-gpu"),
    "export": ("onnx", "onnx-ir", "ml-dtypes"),
    "torch": ("torch", "transformers", "diffusers", "safetensors", "onnxscript", "peft"),
}


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="Also open this bundle's graphs.")
@click.option("--device", default="cpu", show_default=True, help="Device to open them on.")
@terminal.json_option
def command(
    bundle: Path | None,
    device: str,
    json: bool,
) -> None:
    """Print versions, providers, devices and conflicts; exit 4 if something cannot work."""

    def verb() -> None:
        from edgekit.errors import DeviceMissing

        facts = examine(bundle, device)
        if json:
            terminal.show_json(facts)
        else:
            _show(facts)
        if facts["problems"]:
            if json:
                raise SystemExit(DeviceMissing.exit_code)
            raise DeviceMissing("; ".join(facts["problems"]))

    terminal.run_verb(verb, as_json=json)


def examine(bundle: Path | None, device: str) -> dict[str, Any]:
    """Everything doctor says, as plain values; `problems` is empty on a healthy machine."""
    from edgekit import __version__
    from edgekit.errors import DeviceMissing
    from edgekit.runtime.backends import devices

    problems: list[str] = []
    engine = None
    try:
        engine = devices.engine()
    except DeviceMissing as why:
        problems.append(str(why))
    facts: dict[str, Any] = {
        "edgekit": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "engine": None if engine is None else f"{engine.wheel} {engine.version}",
        "devices": [] if engine is None else list(engine.devices),
        "packages": {group: devices.packages(names) for group, names in PACKAGES.items()},
        "problems": problems,
    }
    if engine is not None:
        chosen = devices.choose(device)
        if bundle is not None:
            facts["graphs"] = _open_graphs(bundle, chosen)
        elif chosen.partition(":")[0] not in engine.devices:
            problems.append(f"device {chosen!r} is not among those that {engine.wheel} lists")
    return facts


def _open_graphs(path: Path, device: str) -> dict[str, str]:
    """Open every graph of a bundle on the device and say where it landed."""
    from edgekit.bundle.store import read_bundle
    from edgekit.runtime.backends import open_session

    bundle = read_bundle(path)
    return {
        name: f"opens on {open_session(bundle.root / part.graph, device).device}"
        for name, part in bundle.manifest.parts.items()
    }


def _show(facts: dict[str, Any]) -> None:
    rows = [(key, str(facts[key])) for key in ("edgekit", "python", "system", "engine")]
    rows.append(("devices listed", ", ".join(facts["devices"]) or "none"))
    terminal.table("", ("", ""), rows)
    packages = [
        (group, name, version or "not installed")
        for group, found in facts["packages"].items()
        for name, version in found.items()
    ]
    terminal.table("packages", ("extra", "package", "version"), packages)
    if "graphs" in facts:
        terminal.table("graphs", ("part", "result"), list(facts["graphs"].items()))
