"""The pages lead somewhere and name what the code has."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from edgekit.runtime.llm.ledger import SpeculationStats
from edgekit.runtime.llm.speculation import DRAFTERS, SpeculativeConfig
from tests.house.source import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
ELSEWHERE = re.compile(r"[a-z]+:")  # https:, mailto:
CONTROLLER = (DOCS / "controller.md").read_text(encoding="utf-8")


def headings(page: Path) -> set[str]:
    """What `#` in a link to a page may name: its headings as anchors."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def broken(page: Path, text: str) -> list[str]:
    """Relative links of a page that lead to no file, or to a heading that its page does not have."""
    wrong = []
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not ELSEWHERE.match(link) and (not target.exists() or (anchor and anchor not in headings(target))):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    """Every relative link of a page names a file that is there, and a heading of it where it names one."""
    assert broken(page, page.read_text(encoding="utf-8")) == []


def test_a_dead_link_is_found() -> None:
    """A missing file and a missing heading are told from a web address and a heading that is there."""
    text = "[a](no-such-page.md) [b](controller.md#no-such-heading) [c](https://example.org) [d](controller.md#threads)"
    assert broken(DOCS / "design.md", text) == ["no-such-page.md", "controller.md#no-such-heading"]


@pytest.mark.parametrize("name", [name for name in DRAFTERS if name != "none"])
def test_every_drafter_has_a_page(name: str) -> None:
    """The page of a drafter is called by its name, says it in its title, and is linked from the controller's."""
    page = DOCS / "drafters" / f"{name}.md"
    assert page.is_file()
    assert f"`{name}`" in page.read_text(encoding="utf-8").splitlines()[0]
    assert f"(drafters/{name}.md)" in CONTROLLER


@pytest.mark.parametrize("key", SpeculativeConfig.__struct_fields__)
def test_every_key_of_the_configuration_is_explained(key: str) -> None:
    """A key of `--speculative-config` has a row of its own on the controller's page."""
    assert f"\n| `{key}` |" in CONTROLLER


@pytest.mark.parametrize("name", [field.name for field in fields(SpeculationStats)])
def test_every_figure_is_explained(name: str) -> None:
    """A field of the stats has a row of its own on the controller's page."""
    assert f"\n| `{name}` |" in CONTROLLER
