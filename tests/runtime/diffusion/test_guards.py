"""Guards: outputs that say whether a graph was fed what its constants came from, read by the runtime alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgekit.bundle.manifest import AxisRange, TensorSpec
from edgekit.bundle.recipe import Call, Denoise, Recipe
from edgekit.errors import BundleError, ForeignInput
from tests.runtime.diffusion.bench import ARRAY, FEEDS, PLAIN, TEXT, Network, stage, studio
from tests.runtime.diffusion.fakes import Arrays, Studio, encode_text

GUARD = TensorSpec("guard.x", "float32", ())


def guarded(value: Any) -> Network:
    """The plain network, and a guard that says `value`, or what it gives for the feeds."""
    answer, inputs, outputs = PLAIN["net"]

    def run(feeds: Arrays) -> Arrays:
        told = value(feeds) if callable(value) else value
        return {**answer(feeds), "guard.x": np.asarray(told, np.float32)}

    return run, inputs, (*outputs, GUARD)


def bench(root: Path, value: Any, largest: int = 8) -> Studio:
    """A bundle of the guarded network."""
    made = studio(root, Recipe((stage(),), media=ARRAY), {"net": guarded(value)})
    manifest = msgspec.structs.replace(made.bundle.manifest, axes={"batch": AxisRange(1, largest)})
    made.bundle = type(made.bundle)(root, manifest, made.bundle.digest)
    return made


@pytest.mark.parametrize("value", [0.0, 9e-4, [5e-4]])
def test_a_still_guard_changes_nothing(tmp_path: Path, value: Any) -> None:
    """Below the limit, as a number or as an array of one: the latents of the network without a guard."""
    plain = studio(tmp_path / "plain", Recipe((stage(),), media=ARRAY), PLAIN).pipeline().generate(seed=2)
    watched = bench(tmp_path / "watched", value).pipeline().generate(seed=2)
    assert np.array_equal(watched.latents, plain.latents)


@pytest.mark.parametrize("value", [1.1e-3, 30.0, float("inf"), float("nan"), [0.5]])
def test_a_guard_above_its_limit_ends_the_request(tmp_path: Path, value: Any) -> None:
    """A number above 1e-3, or none: an error of the bundle that names part, input and remedy."""
    with pytest.raises(ForeignInput, match=r"part 'net', input 'x'.*export again with it") as caught:
        bench(tmp_path, value).pipeline().generate()
    assert isinstance(caught.value, BundleError)
    assert caught.value.exit_code == 5


def test_the_worst_slice_counts(tmp_path: Path) -> None:
    """A batch that is run one by one is refused for its last picture alone, and served if all are right."""
    seen = []

    def last(feeds: Arrays) -> float:
        seen.append(len(feeds["x"]))
        return 1.0 if len(seen) == 3 else 0.0

    with pytest.raises(ForeignInput):
        bench(tmp_path / "wrong", last, largest=1).pipeline().generate(batch=3)
    assert seen == [1, 1, 1]
    assert bench(tmp_path / "right", 0.0, largest=1).pipeline().generate(batch=3).latents.shape == (3, 2, 4, 4)


def test_a_condition_may_have_one(tmp_path: Path) -> None:
    """What runs once per prompt is watched as well, and its guard is no source for others."""
    encoder: Network = (
        lambda feeds: {**encode_text(feeds), "guard.ids": np.float32(0.4)},
        TEXT[1],
        (*TEXT[2], TensorSpec("guard.ids", "float32", ())),
    )
    answer, (x, t), outputs = PLAIN["net"]
    net: Network = (answer, (x, t, TEXT[2][0]), outputs)
    denoise = Denoise("net", {**FEEDS, "hidden": "text.hidden"}, "m")
    recipe = Recipe((stage(denoise=denoise),), (Call("text", {"ids": "@tokens"}),))
    made = studio(tmp_path, recipe, {"text": encoder, "net": net})
    with pytest.raises(ForeignInput, match="part 'text', input 'ids'"):
        made.pipeline().generate("red apple")
    assert "net" not in made.calls
