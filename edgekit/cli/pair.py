"""`edgekit pair`: does this draft help this target, on this machine and this text?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekit.cli import terminal
from edgekit.cli.run_text import show_speculation

if TYPE_CHECKING:
    from edgekit.runtime.llm.pairing import Pairing


@click.command()
@click.argument("target", type=click.Path(path_type=Path))
@click.argument("draft", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), help="Your own text, UTF-8; pieces of it are continued.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N, or auto.")
@click.option("--threads", type=click.IntRange(min=0), default=0, show_default=True, help="0: the engine's choice.")
@click.option("--max-new-tokens", type=click.IntRange(min=8), default=64, show_default=True, help="Per piece.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@terminal.json_option
@click.option("--quiet", is_flag=True, help="No progress.")
def command(
    target: Path,
    draft: Path,
    text: Path | None,
    device: str,
    threads: int,
    max_new_tokens: int,
    temperature: float,
    json: bool,
    quiet: bool,
) -> None:
    """Try a draft model with a target model: tokenizers, acceptance by depth, predicted and measured speedup."""

    def verb() -> None:
        from edgekit.cli.run import read_prompt
        from edgekit.runtime.backends.devices import choose
        from edgekit.runtime.llm.pairing import SAMPLE, pair

        sample = SAMPLE if text is None else read_prompt(None, text) or ""
        with terminal.progress(quiet=quiet or json) as report:
            found = pair(
                target,
                draft,
                sample,
                device=choose(device),
                threads=threads,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                progress=report,
            )
        if json:
            terminal.show_json(asdict(found))
        else:
            _show(found)

    terminal.run_verb(verb, as_json=json)


def _show(found: Pairing) -> None:
    large, small = found.parameters
    rows = [
        ("tokenizer", "the same" if found.same_tokenizer else "another: drafts go through text"),
        ("parameters", f"{large / 1e6:,.1f} M and {small / 1e6:,.1f} M ({large / max(1, small):.1f} : 1)"),
        ("same text as without drafts", f"{found.same_text} of {found.prompts}"),
        ("acceptance by depth", " ".join(f"{row.rate:.2f}" for row in found.acceptance)),
        ("a draft costs", f"{found.draft_cost:.2f} plain steps"),
        ("predicted speedup", f"{found.predicted:.2f} with {found.depth} drafts a step" if found.depth else "none"),
        ("measured speedup", f"{found.speedup:.2f} ({found.slowest:.2f} to {found.fastest:.2f})"),
    ]
    terminal.table("target and draft", ("what", "found"), rows)
    show_speculation(found.speculation)
