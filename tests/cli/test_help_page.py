"""The manual page cannot drift from the command line: it quotes every verb's help."""

from __future__ import annotations

import re

from tests.cli.conftest import ROOT, Run

PAGE = ROOT / "docs" / "command-line.md"
PLAIN = {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"}


def test_the_page_quotes_the_help_of_every_verb(edgekit: Run) -> None:
    """Each block between `$ edgekit ... --help` and its fence is what the command prints now.

    To renew one: COLUMNS=100 edgekit VERB --help.
    """
    blocks = re.findall(r"```\n\$ edgekit ([a-z ]*)--help\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [verb.strip() for verb, _ in blocks] == [
        *("", "export", "run", "inspect", "pair", "plan", "recipes", "recipes ls", "recipes show", "doctor", "demo")
    ]
    for verb, quoted in blocks:
        shown = edgekit(*verb.split(), "--help", env=PLAIN).stdout
        assert quoted.split() == shown.replace("python -m edgekit.cli", "edgekit").split(), verb
