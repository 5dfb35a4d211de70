"""`edgekit recipes`: the catalogue as a table and one entry in full, for people and for programs."""

from __future__ import annotations

import json

import msgspec

from edgekit.bundle import catalogue
from edgekit.bundle.recipe import Recipe, Table
from edgekit.runtime.diffusion.tables import compile_stage
from tests.cli.conftest import Run, only_json


def test_ls_has_a_line_per_recipe(edgekit: Run) -> None:
    """Every name, with task, sampler, default steps, guidance and state beside it."""
    done = edgekit("recipes", "ls")
    assert (done.returncode, done.stderr) == (0, "")
    lines = {line.split("│")[1].strip(): line for line in done.stdout.splitlines() if line.count("│") > 2}
    assert set(catalogue.names()) <= set(lines)
    cells = [cell.strip() for cell in lines["lcm"].split("│")[1:-1]]
    assert cells == ["lcm", "text-to-image", "lcm", "4", "w_embedding 8.5", "verified"]
    assert "lcm, dpmpp_2m" in lines["teacher_student"]


def test_ls_json_has_an_object_per_recipe(edgekit: Run) -> None:
    """Programs get the same rows, with family and title."""
    rows = only_json(edgekit("recipes", "ls", "--json"))["recipes"]
    assert [row["name"] for row in rows] == list(catalogue.names())
    (found,) = [row for row in rows if row["name"] == "resshift_4"]
    assert (found["family"], found["sampler"], found["steps"]) == ("ResShift", "residual_shift", "4")
    assert found["guidance"] == "none"


def test_show_tells_all_of_an_entry(edgekit: Run) -> None:
    """Prose, networks, the recipe as JSON that reads back, and the compiled table with the part of every row."""
    done = edgekit("recipes", "show", "hybrid_sd")
    assert done.returncode == 0, done.stderr
    entry = catalogue.entry("hybrid_sd")
    assert done.stdout.startswith(f"hybrid_sd: {entry.title}\n")
    assert entry.paper in done.stdout
    assert "timestep_cond float32 (batch, 256)" in done.stdout
    text = done.stdout.partition("\nrecipe\n")[2]
    value, end = json.JSONDecoder().raw_decode(text)
    assert msgspec.convert(value, Recipe) == entry.recipe
    table = [line.split("│")[1:-1] for line in text[end:].splitlines() if line.count("│") > 2]
    assert "stage base, 4 steps, from 1 noise" in text[end:]
    assert [(float(row[0]), row[-1].strip()) for row in table] == [
        (999.0, "unet_large"),
        (759.0, "unet_large"),
        (499.0, "unet_small"),
        (259.0, "unet_small"),
    ]


def test_show_says_what_a_stage_starts_from(edgekit: Run) -> None:
    """A stage that starts from a picture keeps part of it; a graph without inputs takes nothing."""
    assert "from 1 picture + 1.98 noise" in edgekit("recipes", "show", "resshift_4").stdout
    shown = edgekit("recipes", "show", "tsd_sr").stdout
    assert "stage base, 1 steps, from 1 picture\n" in shown
    assert "nothing" in shown


def test_show_json_is_the_entry_and_its_tables(edgekit: Run) -> None:
    """The entry reads back as it is, and the tables are the ones a bundle would ship; token samplers have none."""
    told = only_json(edgekit("recipes", "show", "icd_editing", "--json"))
    entry = msgspec.convert(told["entry"], catalogue.Entry)
    assert entry == catalogue.entry("icd_editing")
    wanted = [compile_stage(stage, stage.sampler.steps) for stage in entry.recipe.stages]
    assert [msgspec.convert(table, Table) for table in told["tables"]] == wanted
    assert only_json(edgekit("recipes", "show", "amused_256", "--json"))["tables"] == []


def test_an_unknown_recipe_is_a_usage_error_with_close_names(edgekit: Run) -> None:
    """Exit code 2, and what may have been meant, for people and for programs."""
    done = edgekit("recipes", "show", "animate-lcm")
    assert (done.returncode, done.stdout) == (2, "")
    assert "close ones: animatelcm" in done.stderr
    error = only_json(edgekit("recipes", "show", "animate-lcm", "--json"))["error"]
    assert (error["kind"], error["exit_code"]) == ("BadRequest", 2)
