"""Guard outputs in a manifest: legal beside a part's answers, and nobody's source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgekit.bundle.manifest import Manifest, Part, TensorSpec
from edgekit.bundle.recipe import Recipe
from edgekit.bundle.store import read_bundle
from edgekit.bundle.validate import check_manifest
from edgekit.errors import BadManifest, UnfedInput

GUARD = TensorSpec("guard.encoder_hidden_states", "float32", ())


def with_outputs(manifest: Manifest, name: str, *specs: TensorSpec, alone: bool = False) -> Manifest:
    """A part with more outputs, or with these alone."""
    part = manifest.parts[name]
    changed = msgspec.structs.replace(part, outputs=specs if alone else (*part.outputs, *specs))
    return msgspec.structs.replace(manifest, parts={**manifest.parts, name: changed})


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_guard_is_no_answer(image_bundle: Path, shape: tuple[int, ...]) -> None:
    """A part may have one more output, a number; what others may read is what they could before."""
    manifest = read_bundle(image_bundle).manifest
    guarded = with_outputs(manifest, "unet", msgspec.structs.replace(GUARD, shape=shape))
    check_manifest(guarded)
    assert guarded.parts["unet"].answers == manifest.parts["unet"].answers == ("out_sample",)


@pytest.mark.parametrize(
    "changes",
    [{"name": "guard.nothing"}, {"name": "guard."}, {"dtype": "float16"}, {"shape": ("batch",)}, {"shape": (2,)}],
    ids=["no-input", "no-name", "half", "batched", "two"],
)
def test_other_guards_are_refused(image_bundle: Path, changes: dict[str, Any]) -> None:
    """It is named after an input of its part, and is one float32 number."""
    spec = msgspec.structs.replace(GUARD, **changes)
    with pytest.raises(BadManifest, match="a guard is one float32 number"):
        check_manifest(with_outputs(read_bundle(image_bundle).manifest, "unet", spec))


def test_a_guard_alone_is_no_use(image_bundle: Path) -> None:
    """A part has an output that something can use."""
    with pytest.raises(BadManifest, match="no outputs"):
        check_manifest(with_outputs(read_bundle(image_bundle).manifest, "unet", GUARD, alone=True))


def test_nothing_reads_a_guard(image_bundle: Path) -> None:
    """Not a feed of a later part, and not the output that a stage takes."""
    spec = TensorSpec("guard.input_ids", "float32", ())
    manifest = with_outputs(read_bundle(image_bundle).manifest, "text_encoder", spec)
    manifest = with_outputs(manifest, "unet", GUARD)
    assert manifest.recipe is not None
    net = manifest.recipe.stages[0].denoise

    def drawn_by(**changes: Any) -> Manifest:
        assert manifest.recipe is not None
        stage = msgspec.structs.replace(manifest.recipe.stages[0], denoise=msgspec.structs.replace(net, **changes))
        return msgspec.structs.replace(manifest, recipe=Recipe((stage,), manifest.recipe.conditions))

    check_manifest(drawn_by())
    with pytest.raises(UnfedInput, match="no earlier condition gives that"):
        check_manifest(drawn_by(feeds={**net.feeds, "encoder_hidden_states": "text_encoder.guard.input_ids"}))
    with pytest.raises(BadManifest, match="not an output of unet"):
        check_manifest(drawn_by(output=GUARD.name))


def test_a_language_model_has_none(text_bundle: Path) -> None:
    """Its runtime would not read it, and a guard that is not read guards nothing."""
    spec = TensorSpec("guard.input_ids", "float32", ())
    with pytest.raises(BadManifest, match=r"nothing reads guard\.input_ids"):
        check_manifest(with_outputs(read_bundle(text_bundle).manifest, "decoder", spec))


def test_answers_keep_their_order() -> None:
    """As the graph has them, guards left out wherever they stand."""
    named = [TensorSpec(name, "float32", ()) for name in ("b", "guard.x", "a", "guards", "guard.y")]
    assert Part("g.onnx", (), tuple(named)).answers == ("b", "a", "guards")
