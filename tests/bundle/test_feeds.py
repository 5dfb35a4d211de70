"""Which sources have a value where, shown on recipes that are right."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from edgekit.bundle.feeds import BY_NAME, GIVEN, LANGUAGE_INPUTS, check_feeds
from edgekit.bundle.manifest import Manifest, TensorSpec
from edgekit.bundle.recipe import Call, Denoise, Guidance, Init, Recipe, Stage
from edgekit.bundle.store import read_bundle
from edgekit.errors import BadManifest, BundleError, UnfedInput
from tests.bundle import tiny

PLACES = ("conditions", "encode", "denoise", "decode")
SOURCES = sorted(
    f"{source}.row" if source in BY_NAME else source for source in set().union(*GIVEN.values()) - {"@guidance"}
)


def fed_from(manifest: Manifest, place: str, source: str) -> Manifest:
    """A recipe of two stages, the second guided by an embedding, and one more part that takes `source` at `place`."""
    recipe = tiny.image_recipe()
    more, feeds = tiny.image_recipe().stages[0].decode, {"probe": source}
    assert more is not None
    shape = ("n", 3, 8, 8) if source == "@reference" else ("n",)
    part = msgspec.structs.replace(manifest.parts["unet"], inputs=(TensorSpec("probe", "float32", shape),))
    guided = msgspec.structs.replace(recipe.stages[0], name="second", guidance=Guidance("w_embedding", dim=4))
    conditions = recipe.conditions
    if place == "conditions":
        conditions = (*conditions, Call("probe", feeds))
    if place == "encode":
        guided = msgspec.structs.replace(guided, init=Init("previous", encode=Call("probe", feeds)))
    if place == "denoise":
        guided = msgspec.structs.replace(guided, denoise=Denoise("probe", feeds, "out_sample"))
    if place == "decode":
        guided = msgspec.structs.replace(
            guided, decode=msgspec.structs.replace(more, part="probe", feeds=feeds, output="out_sample")
        )
    return msgspec.structs.replace(
        manifest,
        parts={**manifest.parts, "probe": part},
        recipe=Recipe((recipe.stages[0], guided), conditions, constants={"row": (1.0,)}),
    )


@pytest.mark.parametrize(("place", "source"), list(itertools.product(PLACES, SOURCES)))
def test_each_source_has_a_value_where_the_table_says(image_bundle: Path, place: str, source: str) -> None:
    """For every place and built-in source: accepted if GIVEN lists it, else refused with the list."""
    manifest = fed_from(read_bundle(image_bundle).manifest, place, source)
    if source.partition(".")[0] in GIVEN[place]:
        check_feeds(manifest)
    else:
        with pytest.raises(UnfedInput, match="no value there"):
            check_feeds(manifest)


@pytest.mark.parametrize("shape", [("n",), ("n", 3, 8, 9), ("n", 1, 8, 8), ("n", 3, "side", "side")])
def test_a_reference_picture_goes_where_its_size_is_known(image_bundle: Path, shape: tuple[int | str, ...]) -> None:
    """The graph must declare a square of three channels, for the runtime makes the picture that large."""
    manifest = fed_from(read_bundle(image_bundle).manifest, "conditions", "@reference")
    probe = msgspec.structs.replace(manifest.parts["probe"], inputs=(TensorSpec("probe", "float32", shape),))
    with pytest.raises(BadManifest, match="a reference picture is"):
        check_feeds(msgspec.structs.replace(manifest, parts={**manifest.parts, "probe": probe}))


@pytest.mark.parametrize("place", PLACES[1:])
def test_conditions_reach_every_run_of_a_stage(image_bundle: Path, place: str) -> None:
    """An output of a condition may be fed to encoder, network and decoder."""
    check_feeds(fed_from(read_bundle(image_bundle).manifest, place, "text_encoder.last_hidden_state"))


def test_a_named_tokenizer_is_a_source(image_bundle: Path) -> None:
    """`@tokens.second` is there once the bundle has a tokenizer of that name."""
    manifest = fed_from(read_bundle(image_bundle).manifest, "conditions", "@tokens.second")
    with pytest.raises(BundleError, match="tokenizers are default"):
        check_feeds(manifest)
    both = {**manifest.tokenizers, "second": manifest.tokenizers["default"]}
    check_feeds(msgspec.structs.replace(manifest, tokenizers=both))


def one_stage_without(stage: Stage) -> Iterator[tuple[str, Stage]]:
    """The stage with each feed of its network left out in turn."""
    for name in stage.denoise.feeds:
        feeds = {key: source for key, source in stage.denoise.feeds.items() if key != name}
        yield name, msgspec.structs.replace(stage, denoise=msgspec.structs.replace(stage.denoise, feeds=feeds))


def test_every_single_missing_feed_is_named(image_bundle: Path) -> None:
    """Whichever input loses its feed, the message names it."""
    manifest = read_bundle(image_bundle).manifest
    recipe = tiny.image_recipe()
    for name, stage in one_stage_without(recipe.stages[0]):
        spoilt = msgspec.structs.replace(manifest, recipe=msgspec.structs.replace(recipe, stages=(stage,)))
        with pytest.raises(UnfedInput, match=f"does not feed '{name}'"):
            check_feeds(spoilt)


def test_a_sliding_bias_is_fed_when_there_is_a_window(text_bundle: Path) -> None:
    """Both biases, either or none: what the graph has is fed, as long as the window is known."""
    manifest = read_bundle(text_bundle).manifest
    assert manifest.decoding is not None
    decoder = manifest.parts["decoder"]
    bias = next(spec for spec in decoder.inputs if spec.name == "attention_bias")
    sliding = msgspec.structs.replace(bias, name="attention_bias_sliding")
    rest = tuple(spec for spec in decoder.inputs if spec.name != "attention_bias")
    windowed = msgspec.structs.replace(manifest.decoding, sliding_window=16)
    for biases in ((bias,), (sliding,), (bias, sliding), ()):
        part = msgspec.structs.replace(decoder, inputs=(*rest, *biases))
        check_feeds(msgspec.structs.replace(manifest, parts={"decoder": part}, decoding=windowed))


@pytest.mark.parametrize("dialect", LANGUAGE_INPUTS)
def test_the_page_lists_each_dialects_inputs(dialect: str) -> None:
    """docs/bundle.md is the contract in prose: it names every input of every dialect."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "bundle.md").read_text()
    assert f"`{dialect}`" in page
    for name in (*LANGUAGE_INPUTS[dialect], "attention_bias", "attention_bias_sliding"):
        assert f"`{name}`" in page
