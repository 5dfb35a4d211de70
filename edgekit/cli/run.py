"""`edgekit run`: text to stdout, pictures to files, everything else to stderr."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from edgekit.cli import run_draw, run_text, terminal

ONE_PROMPT = "give exactly one of --prompt TEXT, --prompt - (standard input) and --prompt-file FILE"


@dataclass(frozen=True)
class Asked:
    """What every kind of run may be asked for; a prompt that nobody gave is None."""

    prompt: str | None
    output: Path | None
    seed: int
    stats: bool
    quiet: bool
    as_json: bool


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", help="What to make; - reads stdin.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="Read the prompt from a file.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write: its ending says the format.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N, or auto.")
@click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Engine threads; 0 leaves the choice to the engine.",
)
@click.option("--max-memory", metavar="SIZE", help="Take no more than this (2GB): parts in order, decoding in tiles.")
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same result.")
@click.option("--system", help="System message; implies --chat.")
@click.option("--chat", is_flag=True, help="Use the chat template.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Longest answer.")
@click.option("--temperature", type=float, help="0 is greedy.")
@click.option("--top-k", type=int, help="Keep the K best tokens; 0 keeps all.")
@click.option("--top-p", type=float, help="Keep the best tokens up to this probability.")
@click.option("--min-p", type=float, help="Keep tokens this probable against the best.")
@click.option("--repetition-penalty", type=float, help="Over 1 repeats less.")
@click.option("--stop", multiple=True, help="End before this. Repeatable.")
@click.option(
    "--draft",
    default="none",
    show_default=True,
    help="auto, none, ngram, lookahead, corpus:PATH, a draft bundle, or a method of the config.",
)
@click.option("--speculative-config", "speculative", metavar="JSON", help="vLLM's keys; see docs/controller.md.")
@click.option(
    "--exact", is_flag=True, help="Drafts change no bit of the text; a single step then costs two rows or more."
)
@click.option("--show-drafts", is_flag=True, help="Colour tokens by the drafter that guessed them.")
@click.option("--best-of", type=click.IntRange(min=1), default=1, show_default=True, help="Draw N, give the likeliest.")
@click.option("--prefix-cache", type=click.Path(path_type=Path), help="Load this cache of prompts; save it after.")
@click.option("--steps", type=int, help="One of the legal counts.")
@click.option("--negative", default="", help="What not to make.")
@click.option("--guidance", type=float, help="Guidance scale.")
@click.option("--width", type=int, help="Pixels.")
@click.option("--height", type=int, help="Pixels.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="How many to make.")
@click.option("--image", type=click.Path(path_type=Path), help="Start from this picture.")
@click.option("--strength", type=float, help="How much of it to redraw.")
@click.option("--mask", type=click.Path(path_type=Path), help="Redraw --image only where this picture is white.")
@click.option("--control", type=click.Path(path_type=Path), help="Follow this picture (ControlNet).")
@click.option("--control-scale", type=float, help="How closely; 1 by default.")
@click.option("--reference", type=click.Path(path_type=Path), help="Draw something like this picture (IP-Adapter).")
@click.option("--reference-scale", type=float, help="How alike; 1 by default.")
@click.option("--frames", type=click.IntRange(min=1), help="Frames of a video.")
@click.option("--seconds", type=float, help="Seconds of sound.")
@click.option(
    "--input", "inputs", multiple=True, metavar="NAME=FILE.npy", help="An array the bundle takes. Repeatable."
)
@click.option("--tiny", is_flag=True, help="Decode by the small decoder: much faster, a little worse.")
@click.option("--tile", type=click.IntRange(min=64), help="Decode in tiles of so many pixels: less memory.")
@click.option("--preview", is_flag=True, help="Write every step's estimate beside the output.")
@click.option("--grid", is_flag=True, help="Write a contact sheet of the batch as well.")
@click.option("--seed-mode", default="philox", show_default=True, help="philox or torch-cpu.")
@click.option("--stats", is_flag=True, help="Print times and counts.")
@terminal.json_option
@click.option("--quiet", is_flag=True, help="Only the result.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Check every file's sha256 first.")
def command(bundle: Path, json: bool, **options: Any) -> None:
    """Run a bundle, without torch.

    Text bundles take the options from --system to --prefix-cache, all others those from --steps to --seed-mode.
    """
    terminal.run_verb(lambda: _run(bundle, json, options), as_json=json)


def read_prompt(prompt: str | None, file: Path | None) -> str | None:
    """The prompt from the option, from a file, or from standard input; None where none was given.

    Raises:
        BadRequest: two given, or the file cannot be read as UTF-8.
    """
    from edgekit.errors import BadRequest

    if prompt is not None and file is not None:
        raise BadRequest(ONE_PROMPT)
    if file is None and prompt != "-":
        return prompt
    try:
        if file is not None:
            return file.read_text(encoding="utf-8-sig")
        if sys.stdin is None:
            raise BadRequest("standard input is closed, so --prompt - has nothing to read")
        return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig").read()
    except (OSError, UnicodeDecodeError) as why:
        raise BadRequest(f"cannot read the prompt: {why}") from why


def _run(bundle: Path, as_json: bool, options: dict[str, Any]) -> None:
    from edgekit.errors import BadRequest
    from edgekit.runtime.backends.devices import choose
    from edgekit.runtime.llm.pipeline import TextPipeline
    from edgekit.runtime.tasks import load

    prompt = read_prompt(options["prompt"], options["prompt_file"])
    output: Path | None = options["output"]
    asked = Asked(prompt, output, options["seed"], options["stats"], options["quiet"], as_json)
    if output is not None:
        check_output(output)
    chosen = choose(options["device"])
    if options["device"] == "auto" and not asked.quiet:
        terminal.note(f"device: {chosen}")
    setup = run_text.setup(options) if given(run_text.SETUP) else {}
    limit = None if options["max_memory"] is None else terminal.parse_bytes(options["max_memory"])
    model = load(bundle, device=chosen, threads=options["threads"], verify=options["verify"], max_memory=limit, **setup)
    if isinstance(model, TextPipeline):
        _refuse(given((*run_draw.REQUEST, *run_draw.OUTPUT)), "few-step")
        if prompt is None:
            raise BadRequest(ONE_PROMPT)
        run_text.run(model, asked, {name: options[name] for name in (*run_text.REQUEST, *run_text.SETUP)})
    else:
        _refuse(given((*run_text.REQUEST, *run_text.SETUP)), "text")
        run_draw.run(model, asked, {name: options[name] for name in (*run_draw.REQUEST, *run_draw.OUTPUT)})


def given(names: Sequence[str]) -> list[str]:
    """Those of the named options that somebody set, on the command line or in the environment."""
    context = click.get_current_context()
    return [name for name in names if context.get_parameter_source(name) is not ParameterSource.DEFAULT]


def check_output(path: Path) -> None:
    """Refuse a result file that cannot be written, before anything is computed.

    Raises:
        BadRequest: its folder is missing or cannot be written to, or it is a folder itself.
    """
    from edgekit.errors import BadRequest

    if path.is_dir():
        raise BadRequest(f"--output {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise BadRequest(f"--output {path}: {path.parent} is not a folder; make it first")
    if not os.access(path.parent, os.W_OK):
        raise BadRequest(f"--output {path}: {path.parent} cannot be written to; choose another folder")


def _refuse(names: Sequence[str], of: str) -> None:
    """An option of another task is a mistake, not something to drop in silence."""
    from edgekit.errors import BadRequest

    for name in names:
        flag = "--speculative-config" if name == "speculative" else f"--{name.replace('_', '-')}"
        raise BadRequest(f"{flag} is for {of} models; `edgekit inspect` says what this bundle is")
