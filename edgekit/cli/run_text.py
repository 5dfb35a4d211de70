"""The text half of `edgekit run`: what a text pipeline is set up with, its answer on stdout, its figures on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli import terminal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgekit.cli.run import Asked
    from edgekit.runtime.llm.ledger import SpeculationStats
    from edgekit.runtime.llm.pipeline import TextPipeline
    from edgekit.runtime.llm.prefix import PrefixStore
    from edgekit.runtime.llm.result import Stats, TextChunk
    from edgekit.runtime.llm.tree import Source
    from edgekit.runtime.tasks import TextSetup

SETUP = ("draft", "speculative", "exact", "prefix_cache")
DRAWING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop")
REQUEST = (*DRAWING, "system", "chat", "show_drafts", "best_of")
PREFIX_BYTES = 1 << 30  # of keys and values that a cache of prompts keeps
ITSELF = "model itself"
COLOURS = {"ngram": "green", "corpus": "yellow", "model": "cyan", "lookahead": "magenta"}


def setup(options: dict[str, Any]) -> TextSetup:
    """What a text pipeline is opened with.

    Raises:
        BadRequest: --speculative-config is no JSON object.
    """
    return {
        "draft": options["draft"],
        "speculative_config": read_json_object(options["speculative"]),
        "exact": options["exact"],
        **({} if options["quiet"] else {"report": terminal.note}),
    }


def read_json_object(text: str | None) -> dict[str, Any] | None:
    """The object that --speculative-config holds. Raises BadRequest."""
    from edgekit.errors import BadRequest

    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as why:
        raise BadRequest(
            f'--speculative-config is no JSON: {why}; write for example \'{{"method": "ngram"}}\''
        ) from why
    if not isinstance(value, dict):
        raise BadRequest(f"--speculative-config is {text}; it must be a JSON object of vLLM's keys")
    return value


def run(model: TextPipeline, asked: Asked, options: dict[str, Any]) -> None:
    """Stream to stdout as it comes, or collect for --json, --best-of and -o; then keep the prompts' cache."""
    from edgekit.bundle.files import write_atomically
    from edgekit.errors import BadRequest

    streams = not (asked.as_json or asked.output is not None or options["best_of"] > 1)
    if options["show_drafts"] and not streams:
        raise BadRequest("--show-drafts colours text that streams; leave out --json, -o and --best-of")
    request = {name: options[name] for name in DRAWING if options[name] is not None}
    if options["chat"] or options["system"] is not None:
        request |= {"messages": [{"role": "user", "content": asked.prompt}], "system": options["system"]}
    else:
        request["prompt"] = asked.prompt
    store = open_prefixes(model, options["prefix_cache"])
    if not streams:
        result = model.generate(**request, seed=asked.seed, best_of=options["best_of"])
        if asked.output is not None:
            write_atomically(asked.output, result.text.encode())
        if asked.as_json:
            terminal.show_json({"task": "text-generation", **asdict(result)})
        elif asked.output is None:
            click.echo(result.text)
        stats = result.stats
    else:
        stats = show(model.stream(**request, seed=asked.seed), origins=options["show_drafts"])
    if store is not None:
        store.save(options["prefix_cache"], fingerprint(model))
    if asked.stats and not asked.as_json:
        show_stats(stats)


def open_prefixes(model: TextPipeline, path: Path | None) -> PrefixStore | None:
    """The store that --prefix-cache names, read if the file is there, and given to the model."""
    from edgekit.runtime.llm.prefix import PrefixStore

    if path is None:
        return None
    store = PrefixStore(PREFIX_BYTES)
    if path.exists():
        store = PrefixStore.load(path, fingerprint(model), PREFIX_BYTES)
    model.verifier.prefixes = store
    return store


def fingerprint(model: TextPipeline) -> dict[str, str]:
    """What stored keys and values hold for."""
    return {"decoder": model.fingerprint, "granule": str(model.verifier.granule)}


def show(chunks: Iterator[TextChunk], *, origins: bool) -> Stats:
    """Print a stream as it comes; the figures of its end. Colours need a terminal and no NO_COLOR."""
    colours = COLOURS if origins and "NO_COLOR" not in os.environ else {}
    sources: list[Source | None] = []
    for chunk in chunks:
        text = chunk.text
        if chunk.tokens:
            sources.append(chunk.source)
            drafter = ITSELF if chunk.source is None else chunk.source.drafter
            text = click.style(text, fg=colours[drafter]) if drafter in colours else text
        click.echo(text, nl=False)
        sys.stdout.flush()
        stats = chunk.stats
    click.echo()
    if origins:
        show_origins(sources, colours)
    return stats


def show_origins(sources: list[Source | None], colours: dict[str, str]) -> None:
    """How many tokens each drafter guessed, and where the copied ones stand; on stderr."""
    from edgekit.runtime.llm.drafters.corpus import spans

    seen = Counter(ITSELF if source is None else source.drafter for source in sources)
    told = (f"{click.style(name, fg=colours.get(name))} {count}" for name, count in seen.items())
    click.echo(f"tokens by origin: {', '.join(told)}", err=True)
    for span in spans(sources):
        terminal.note(f"tokens {span.start} to {span.end - 1} stand in {span.document} from its token {span.offset} on")


def show_stats(stats: Stats) -> None:
    """One line per figure, on stderr."""
    figures = asdict(stats)
    figures.pop("speculation")
    terminal.show_figures(figures)
    if stats.speculation is not None:
        show_speculation(stats.speculation)


def show_speculation(stats: SpeculationStats) -> None:
    """What the drafter did and why the controller did what it did."""
    spent = {
        "drafting": stats.draft_seconds,
        "verifying": stats.verify_seconds,
        "drawing": stats.accept_seconds,
        "at rest": stats.rest_seconds,
    }
    terminal.show_figures(
        {
            "drafter": ", ".join(f"{name} {mode}" for name, mode in stats.modes.items()),
            "drafts": f"{stats.accepted} of {stats.drafted} accepted"
            + "".join(f"; {row.drafter} {row.accepted} of {row.drafted}" for row in stats.drafters),
            "acceptance by depth": " ".join(f"{row.rate:.2f}" for row in stats.acceptance) or "no drafts",
            "tokens per verification": stats.tokens_per_verify,
            "rows per token": stats.rows_per_token,
            "seconds": spent,
            "estimated speedup": f"{stats.speedup:.2f} (a plain step takes {stats.plain_ms:.2f} ms)",
            "T(n) / T(1)": {str(rows): cost for rows, cost in stats.curve.items()},
            "text": promise(stats),
        }
    )
    for change in stats.changes:
        terminal.note(f"at token {change.token}: {change.drafter} {change.mode}, {change.reason}")


def promise(stats: SpeculationStats) -> str:
    """What the text has to do with the text without drafts."""
    if not stats.lossless:
        return f"lossy, {stats.acceptance_rule}: {stats.disagreements} tokens are not the model's own"
    if stats.acceptance_rule != "own-draw":
        return f"{stats.acceptance_rule}: distributed as without drafts"
    if stats.granule > 1 or stats.invariance == "exact":
        return "that without drafts, bit for bit"
    return f"that without drafts, up to the engine's rounding ({stats.margin:.2g} logits seen)"
