"""Every recipe of the catalogue runs: compiled, fed, and drawn end to end on random networks of its signature."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import msgspec
import numpy as np
import pytest

from edgekit.bundle import catalogue
from edgekit.bundle.catalogue import Entry
from edgekit.bundle.manifest import encode_manifest
from edgekit.bundle.recipe import TABLE_FREE
from edgekit.bundle.sampling import SamplerKind
from edgekit.bundle.validate import check_manifest, decode_manifest
from edgekit.errors import BadRequest
from edgekit.runtime.diffusion.contract import Contract
from edgekit.runtime.diffusion.tables import check_tables, compile_stage
from tests.runtime.diffusion.catalogue_bench import ALWAYS, BATCH, NEVER, bench, finished, picture
from tests.runtime.diffusion.random_networks import manifest_of, shrunk

MOST_ROWS = 130  # of a run; longer ones are the same loop again
PIXEL = 1.0  # of 255


@pytest.fixture(params=catalogue.names())
def entry(request: pytest.FixtureRequest) -> Entry:
    """Each entry in turn, as published."""
    return catalogue.entry(request.param)


def test_an_entry_is_the_same_after_a_round_trip(entry: Entry) -> None:
    """What is read from a file is written as the same value, alone and as part of a manifest."""
    assert msgspec.json.decode(msgspec.json.encode(entry), type=Entry) == entry
    manifest = manifest_of(entry)
    assert decode_manifest(encode_manifest(manifest)) == manifest


def test_an_entry_is_a_manifest_without_files(entry: Entry) -> None:
    """Every graph input has a source, every setting a sampler that acts on it, and the tables are the recipe's."""
    manifest = manifest_of(entry)
    check_manifest(manifest)
    check_tables(manifest)
    Contract.of(entry.recipe)


def test_an_entry_says_where_it_is_from(entry: Entry) -> None:
    """Authors and a year; numbers of weights that nobody has seen cannot be verified; notes are sentences."""
    assert any(f" {year}, arXiv " in entry.paper for year in range(2020, 2027))
    assert entry.state == "from the paper" or entry.source != "none"
    assert all(note.endswith(".") for note in entry.notes)


def test_the_catalogue_names_nearly_every_sampler() -> None:
    """The three it does not are those of families with an exporter alone, and of the solver tests."""
    used = {stage.sampler.kind for name in catalogue.names() for stage in catalogue.entry(name).recipe.stages}
    assert set(get_args(SamplerKind)) - used == {"euler_ancestral", "flow_midpoint", "flow_stochastic"}


def test_an_unknown_name_is_answered_with_close_ones() -> None:
    """A slip of the pen finds its entry; a word from elsewhere is told where the list is."""
    with pytest.raises(BadRequest, match=r"no recipe 'ResShift-4'; close ones: resshift_4"):
        catalogue.entry("ResShift-4")
    with pytest.raises(BadRequest, match="edgekit recipes ls"):
        catalogue.entry("zzz")


def test_a_shrunk_entry_keeps_its_contract(entry: Entry) -> None:
    """What the tests below run has the tables and feeds of what is published."""
    small = shrunk(entry)
    check_manifest(manifest_of(small))
    for published, ours in zip(entry.recipe.stages, small.recipe.stages, strict=True):
        assert ours.denoise.feeds == published.denoise.feeds
        if published.sampler.kind not in TABLE_FREE:
            assert compile_stage(ours, ours.sampler.steps) == compile_stage(published, published.sampler.steps)


def test_a_recipe_draws(entry: Entry, tmp_path: Path) -> None:
    """At the default step count: finite, in the right shape, every part run as often as the contract says."""
    tried = bench(tmp_path, entry)
    result = tried.draw()
    assert tried.shape_is_right(result)
    steps = result.source.get("chosen_steps", result.used.steps)
    assert result.stats.runs == tried.expected_runs(steps, asked=False)


def test_a_recipe_draws_at_every_other_legal_step_count(entry: Entry, tmp_path: Path) -> None:
    """Up to as many rows as a test can afford."""
    tried = bench(tmp_path, entry)
    sampler = tried.contract.main.sampler
    for steps in sampler.legal_steps:
        if steps != sampler.steps and steps <= MOST_ROWS:
            result = tried.draw(steps=steps)
            assert tried.shape_is_right(result), steps
            assert result.stats.runs == tried.expected_runs(steps, asked=True), steps


def test_a_seed_says_what_is_drawn(entry: Entry, tmp_path: Path) -> None:
    """The same seed draws the same again, and another seed something else, unless the recipe draws no noise."""
    tried = bench(tmp_path, entry)
    first, again, other = (finished(tried.draw(seed=seed)) for seed in (5, 5, 6))
    assert all(map(np.array_equal, first, again))
    assert all(map(np.array_equal, first, other)) == (not tried.is_noisy)


def test_an_element_alone_is_the_one_in_the_batch(entry: Entry, tmp_path: Path) -> None:
    """Nothing of one sample reaches another: the second of two is what it is alone."""
    tried = bench(tmp_path, entry)
    together, alone = finished(tried.draw()), finished(tried.draw(batch=1, first_image=1))
    for both, one in zip(together, alone, strict=True):
        assert (len(both), len(one)) == (BATCH, 1)
        close = PIXEL if both.dtype == np.float32 and both.max() > 100 else 2e-5 * max(1.0, np.abs(both).max())
        np.testing.assert_allclose(one[0], both[1], atol=close)


def test_a_recipe_draws_at_another_size(entry: Entry, tmp_path: Path) -> None:
    """Where the size is free it need not be the recipe's, nor square."""
    tried = bench(tmp_path, entry)
    init = tried.contract.main.init
    free = tried.entry.recipe.media.kind in ("image", "video") and init.kind == "noise" and not init.fixed_size
    if free and not tried.contract.needs_picture and tried.contract.main.denoise.fixed is None:
        unit = init.downscale * tried.contract.enlarge
        width, height = init.width * tried.contract.enlarge + unit, init.height * tried.contract.enlarge
        result = tried.draw(width=width, height=height)
        assert (result.used.width, result.used.height) == (width, height)
        assert tried.shape_is_right(result)


def test_a_recipe_with_an_encoder_redraws_a_picture(entry: Entry, tmp_path: Path) -> None:
    """Image-to-image at half strength and the largest step count: the encoder runs once, the rows are fewer."""
    tried = bench(tmp_path, entry)
    stage = tried.contract.main
    steps = max(stage.sampler.legal_steps)
    if tried.contract.optional_picture and steps > 1 and not stage.sampler.nets:
        given = picture(stage.init.width, stage.init.height)
        result = tried.draw(steps=steps, image=given, strength=0.5)
        assert tried.shape_is_right(result)
        assert stage.init.encode is not None
        assert result.stats.runs[stage.init.encode.part] == 1
        assert result.stats.runs[stage.denoise.part] == len(compile_stage(stage, steps, 0.5).rows)


@pytest.mark.parametrize(("threshold", "redrawn"), [(ALWAYS, 0), (NEVER, 4)])
def test_a_student_is_followed_where_it_fails(threshold: float, redrawn: int, tmp_path: Path) -> None:
    """The teacher of a pair runs where the score is below the threshold, and is not even opened above it."""
    tried = bench(tmp_path, catalogue.entry("teacher_student"), threshold)
    assert tried.draw().stats.runs.get("unet_teacher", 0) == redrawn
    assert ("unet_teacher" in tried.studio.opened) == (redrawn > 0)


def test_a_policy_is_asked_only_where_the_count_is_open(tmp_path: Path) -> None:
    """Left open, the count is the policy's; asked for, it is the request's and the policy does not run."""
    tried = bench(tmp_path, catalogue.entry("adadiff"))
    chosen = tried.draw()
    assert chosen.stats.runs["policy"] == 1
    assert chosen.stats.runs["unet"] in catalogue.entry("adadiff").recipe.select.steps  # type: ignore[union-attr]
    assert "policy" not in tried.draw(steps=15).stats.runs
