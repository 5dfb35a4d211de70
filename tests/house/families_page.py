"""docs/families.md from what there is: the catalogue's families, the exporters, and what is not there yet.

To renew the page: python -m tests.house.families_page
"""

from __future__ import annotations

import re
from importlib import import_module
from itertools import groupby

from edgekit.bundle import catalogue
from edgekit.bundle.catalogue import Entry
from edgekit.export.families import FAMILIES
from tests.house.source import ROOT

PAGE = ROOT / "docs" / "families.md"
EXPORT_PAGE = "few-step-export.md#families"
HEADER = "| family | task | rule | recipes | state |\n|---|---|---|---|---|\n"

# Families without a recipe: what a recipe would have to say, and cannot.
NOT_YET = {
    "DiffDock": (
        "arrays",
        "reverse diffusion of a pose",
        "the kernel is there and tested (`score_pose` in edgekit.runtime.diffusion.rigid), a recipe has no start, "
        "noise levels or bonds of a pose",
    ),
}


def table() -> str:
    """The page's table: a row per family of the catalogue, per exporter without an entry, per family not yet there."""
    entries = sorted(map(catalogue.entry, catalogue.names()), key=lambda entry: (entry.family.lower(), entry.name))
    rows = [_family(name, list(group)) for name, group in groupby(entries, key=lambda entry: entry.family)]
    named = {entry.exporter for entry in entries}
    rows += [_exported(name) for name in FAMILIES if name not in named]
    rows += [f"| {name} | {task} | {rule} | | not yet: {why} |" for name, (task, rule, why) in NOT_YET.items()]
    return HEADER + "\n".join(sorted(rows, key=str.lower)) + "\n"


def rows_of(page: str) -> dict[str, str]:
    """State by family, as a page has it."""
    found = re.findall(r"^\| ([^|]+) \|.*\| ([^|]+) \|$", page, re.MULTILINE)
    return {family: state for family, state in found if family != "family"}


def renewed(page: str) -> str:
    """A page with its table written anew."""
    start = page.index(HEADER.partition("\n")[0])
    end = re.compile(r"\n(?!\|)").search(page, start)
    return page[:start] + table() + (page[end.end() :] if end else "")


def _family(name: str, entries: list[Entry]) -> str:
    tasks = dict.fromkeys(entry.task for entry in entries)
    rules = dict.fromkeys(stage.sampler.kind for entry in entries for stage in entry.recipe.stages)
    recipes = ", ".join(f"`{entry.name}`" for entry in entries)
    return (
        f"| {name} | {', '.join(tasks)} | {', '.join(f'`{rule}`' for rule in rules)} | {recipes} | {_state(entries)} |"
    )


def _state(entries: list[Entry]) -> str:
    exporters = dict.fromkeys(entry.exporter for entry in entries if entry.exporter is not None)
    alone = [entry for entry in entries if entry.exporter is None]
    if not exporters:
        sources = ", ".join(dict.fromkeys(entry.source for entry in alone))
        found = "no weights found in public" if sources == "none" else f"in public, {sources}"
        numbers = " or ".join(dict.fromkeys(entry.state for entry in alone))
        return f"recipe only: {found}; numbers {numbers}"
    linked = ", ".join(f"[`{exporter}`]({EXPORT_PAGE})" for exporter in exporters)
    rest = f"; recipe only: {', '.join(f'`{entry.name}`' for entry in alone)}" if alone else ""
    return f"runs with reference parity: {linked}{rest}"


def _exported(name: str) -> str:
    """A family with an exporter and no entry: its module's first sentence says what it is."""
    module = import_module(f"edgekit.export.families.{FAMILIES[name]}")
    what = str(module.__doc__).strip().splitlines()[0].rstrip(".")
    return f"| {name} | {module.FAMILY.task} | {what} | | runs with reference parity: [`{name}`]({EXPORT_PAGE}) |"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
