"""Imports point one way, and what must stay light stays light."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict

import pytest

from tests.house.source import PACKAGE, Import, imports, modules

# Who may import whom: each layer what stands before it. `edgekit` itself is the package's face and its version.
LAYERS = ("errors", "bundle", "runtime", "quant", "export", "cli")
MAY_IMPORT = {layer: set(LAYERS[:place]) | {layer} for place, layer in enumerate(LAYERS)}
MAY_IMPORT["edgekit"] = {"errors", "runtime"}
MAY_IMPORT["serve"] = MAY_IMPORT["bench"] = {"errors", "bundle", "runtime"}
FACE = "edgekit"

NOT_IN_RUNTIME = ("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "diffusers", "peft", "ml_dtypes", "scipy")
TORCH = ("torch", "transformers", "diffusers", "peft")
HEAVY = (*NOT_IN_RUNTIME, "onnxruntime", "numpy", "tokenizers", "PIL", "jinja2")
LIGHT = ("errors", "bundle", "cli", FACE)  # layers whose import costs next to nothing


def layer_of(module: str) -> str:
    """`edgekit.runtime.llm.tree` -> `runtime`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else FACE


def label(found: Import) -> str:
    """How an import reads in a test's name."""
    return f"{found.importer}:{found.line}->{found.imported}"


OWN = [found for found in imports() if found.imported.split(".")[0] == "edgekit"]
FOREIGN = [found for found in imports() if found.imported.split(".")[0] != "edgekit"]


@pytest.mark.parametrize("importer", modules())
def test_imports_follow_the_arrows(importer: str) -> None:
    """A module imports its own layer and what stands before it, inside functions too."""
    allowed = MAY_IMPORT[layer_of(importer)] | {layer_of(importer), FACE}
    assert [label(f) for f in OWN if f.importer == importer and layer_of(f.imported) not in allowed] == []


def test_every_layer_is_drawn() -> None:
    """A new folder needs a row in the table before it needs a file."""
    layers = {layer_of(name) for name in modules()}
    assert layers <= set(MAY_IMPORT), f"no arrow for {layers - set(MAY_IMPORT)}"
    assert {"errors", "bundle", "runtime", "export", "cli"} <= layers


def test_runtime_never_names_an_export_package() -> None:
    """Not at the top, not inside a function: the runtime is numpy, one engine and tokenizers."""
    low = [f for f in FOREIGN if layer_of(f.importer) in ("errors", "bundle", "runtime")]
    assert low
    assert [label(f) for f in low if f.imported.split(".")[0] in NOT_IN_RUNTIME] == []


def test_light_layers_import_nothing_heavy_on_load() -> None:
    """What `--help` and `inspect` load names no engine, array or model package at module level."""
    heavy = [f for f in FOREIGN if f.on_load and layer_of(f.importer) in LIGHT and f.imported.split(".")[0] in HEAVY]
    assert [label(f) for f in heavy] == []


def test_imports_are_absolute() -> None:
    """One spelling for one module."""
    assert [label(f) for f in imports() if not f.imported] == []


def knots(edges: dict[str, set[str]]) -> list[set[str]]:
    """Strongly connected sets of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            found.append(set(stack[at:]))
            del stack[at:]

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return [knot for knot in found if len(knot) > 1]


def test_the_knot_finder_finds_knots() -> None:
    """Two rings that share a module are one knot; a chain is none."""
    assert knots({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"c"}, "e": {"a"}}) == [{"a", "b", "c", "d"}]
    assert knots({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_import_cycle() -> None:
    """Module-level imports form no ring; a package counts as imported by what imports a module inside it."""
    edges: dict[str, set[str]] = defaultdict(set)
    for found in OWN:
        if found.on_load and found.imported != found.importer:
            edges[found.importer].add(found.imported)
    assert knots(edges) == []


HIDE = "import sys\nfor name in {names!r}: sys.modules[name] = None\n"


@pytest.mark.parametrize("layer", ["bundle", "runtime"])
def test_a_layer_imports_without_the_export_packages(layer: str) -> None:
    """Every module of it, in a fresh process where those packages cannot be imported at all."""
    names = [name for name in modules() if layer_of(name) in ("errors", layer)]
    script = HIDE.format(names=NOT_IN_RUNTIME) + "".join(f"import {name}\n" for name in names)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_language_models_export_without_torch() -> None:
    """The language exporter reads safetensors and writes ONNX: every module of it imports with torch out of reach."""
    names = [name for name in modules() if name.startswith("edgekit.export.language")]
    assert names
    script = HIDE.format(names=TORCH) + "".join(f"import {name}\n" for name in names)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
