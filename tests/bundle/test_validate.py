"""The rules for manifests built in Python, and what a signature may leave open."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgekit.bundle.graphfile import GraphFile, GraphTensor
from edgekit.bundle.manifest import Manifest, Part, TensorSpec
from edgekit.bundle.recipe import Table
from edgekit.bundle.store import read_bundle
from edgekit.bundle.validate import check_graph, check_manifest
from edgekit.errors import BadManifest, BundleError, TableMismatch
from tests.bundle import tiny


@pytest.fixture
def manifest(image_bundle: Path) -> Manifest:
    """A good one."""
    return read_bundle(image_bundle).manifest


@pytest.mark.parametrize("column", range(10))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_coefficient_is_infinite(manifest: Manifest, column: int, value: float) -> None:
    """Wherever a table holds a NaN or an infinity, it is refused with its row."""
    row = (*tiny.ROW[:column], value, *tiny.ROW[column + 1 :])
    table = Table("base", 2, 1.0, (tiny.ROW, row))
    with pytest.raises(TableMismatch, match="row 1"):
        check_manifest(msgspec.structs.replace(manifest, tables=(table,)))


@pytest.mark.parametrize("field", ["init_scale", "init_keep"])
def test_no_start_is_infinite(manifest: Manifest, field: str) -> None:
    """Nor may the start of a stage be."""
    table = msgspec.structs.replace(manifest.tables[0], **{field: math.inf})
    with pytest.raises(TableMismatch, match=field):
        check_manifest(msgspec.structs.replace(manifest, tables=(table,)))


def test_a_step_count_is_listed_once(manifest: Manifest) -> None:
    """`legal_steps` is a set, written as a list."""
    recipe = tiny.image_recipe()
    sampler = msgspec.structs.replace(recipe.stages[0].sampler, legal_steps=(2, 4, 2))
    stages = (msgspec.structs.replace(recipe.stages[0], sampler=sampler),)
    with pytest.raises(BadManifest, match="twice"):
        check_manifest(msgspec.structs.replace(manifest, recipe=msgspec.structs.replace(recipe, stages=stages)))


Shape = tuple[Any, ...] | None
AGREE: list[tuple[tuple[Any, ...], Shape]] = [
    (("batch", 4), ("batch", 4)),
    (("batch", 4), ("b", 4)),
    (("batch", 4), (None, 4)),
    (("batch", 4), None),
    ((), ()),
]
DIFFER: list[tuple[tuple[Any, ...], Shape]] = [
    (("batch", 4), ("batch", 5)),
    (("batch", 4), (1, 4)),
    ((1, 4), ("batch", 4)),
    ((1, 4), (None, 4)),
    (("batch", 4), ("batch",)),
    ((), (1,)),
]


def compare(declared: tuple[Any, ...], actual: Shape) -> None:
    """Hold a one-input part against a one-input graph."""
    part = Part("graphs/g.onnx", (TensorSpec("x", "float32", declared),), ())
    check_graph("p", part, GraphFile((GraphTensor("x", "float32", actual),), (), frozenset(), (), {}), {})


@pytest.mark.parametrize(("declared", "actual"), AGREE)
def test_shapes_that_agree(declared: tuple[Any, ...], actual: Shape) -> None:
    """Axis names are the manifest's affair; a graph that says nothing of its shape contradicts nothing."""
    compare(declared, actual)


@pytest.mark.parametrize(("declared", "actual"), DIFFER)
def test_shapes_that_differ(declared: tuple[Any, ...], actual: Shape) -> None:
    """Fixed against dynamic, another size and another rank are contradictions."""
    with pytest.raises(BadManifest, match="in the graph it is"):
        compare(declared, actual)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: {"axes": {}}, None),
        (lambda m: {"tables": ()}, None),
        (lambda m: {"recipe": None}, "recipe"),
        (lambda m: {"task": "super-resolution"}, None),
        (lambda m: {"task": "text-generation"}, "decoding"),
    ],
)
def test_what_may_be_left_out(
    manifest: Manifest, change: Callable[[Manifest], dict[str, Any]], words: str | None
) -> None:
    """Axes and tables are optional, the contract of the task is not."""
    changed = msgspec.structs.replace(manifest, **change(manifest))
    if words is None:
        check_manifest(changed)
    else:
        with pytest.raises(BundleError, match=words):
            check_manifest(changed)
