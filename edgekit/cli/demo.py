"""`edgekit demo`: export the models that ship with the project, run both tasks, leave pictures, code and a table."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli import terminal

if TYPE_CHECKING:
    from edgekit.runtime.diffusion.pipeline import FewStepPipeline
    from edgekit.runtime.llm.pipeline import TextPipeline

PICTURES = (
    *("red apple", "dog face", "rocket", "pizza", "sun"),
    *("cat face", "tulip", "snowman", "red heart", "fire engine"),
)
STEPS = (1, 2, 4)
DRAFTS = 4  # a step: the shipped pair is too small for drafts to pay, and large enough to show that they stand
CODE = "def read_json(path):\n    with open(path) as f:\n"


@dataclass(frozen=True)
class Shipped:
    """A checkpoint that ships with the project, and the bundle the demo makes of it."""

    model: str
    bundle: str


SHIPPED = (
    Shipped("emoji", "emoji.bundle"),
    Shipped("pycode", "pycode.bundle"),
    Shipped("pycode-draft", "pycode-draft.bundle"),
)


@click.command()
@click.option(
    "--models",
    type=click.Path(path_type=Path),
    default=Path("models"),
    show_default=True,
    help="Folder of the shipped checkpoints.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Where bundles and results go.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same pictures.")
@click.option("--quiet", is_flag=True, help="No progress.")
@terminal.json_option
def command(
    models: Path,
    output: Path,
    seed: int,
    quiet: bool,
    json: bool,
) -> None:
    """Export the shipped checkpoints (what is up to date is reused) and run both tasks."""

    def verb() -> None:
        summary = {
            "bundles": export_all(models, output, quiet=quiet or json),
            "pictures": draw(output, seed),
            "code": complete(output, seed),
        }
        import msgspec

        from edgekit.bundle.files import write_atomically

        write_atomically(output / "summary.json", msgspec.json.format(msgspec.json.encode(summary), indent=1))
        if json:
            terminal.show_json(summary)
        else:
            _show(output, summary)

    terminal.run_verb(verb, as_json=json)


def export_all(models: Path, output: Path, *, quiet: bool) -> list[dict[str, Any]]:
    """Export every shipped model whose bundle is not up to date.

    Raises:
        BadRequest: the checkpoints are not in `models` (they come with the repository, not with the wheel).
    """
    from edgekit.errors import BadRequest
    from edgekit.export import build

    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for ship in SHIPPED:
        if not (models / ship.model).is_dir():
            raise BadRequest(f"{models / ship.model} is missing; run in a clone of the repository, or give --models")
        request = build.ExportRequest(models / ship.model, output / ship.bundle, overwrite=True)
        start = time.perf_counter()
        made = build.current(request)
        if made is None:
            with terminal.progress(quiet=quiet) as report:
                manifest = build.export(request, report)
        else:
            manifest = made
        rows.append(
            {
                "bundle": str(request.target),
                "reused": made is not None,
                "seconds": round(time.perf_counter() - start, 2),
                "bytes": sum(file.bytes for file in manifest.files),
            }
        )
    return rows


def draw(output: Path, seed: int) -> list[dict[str, Any]]:
    """Every prompt at every step count: one PNG each, and one sheet of all of them."""
    from edgekit.runtime.tasks import load

    model: FewStepPipeline = load(output / "emoji.bundle", task="text-to-image")
    rows, grid = [], []
    for prompt in PICTURES:
        line = []
        for steps in STEPS:
            result = model.generate(prompt, steps=steps, seed=seed)
            line.append(result.images[0])
            rows.append({"prompt": prompt, "steps": steps, "milliseconds": round(1e3 * result.stats.seconds, 1)})
        rows[-1]["file"] = str(result.save(output / f"{prompt.replace(' ', '-')}.png"))
        grid.append(line)
    _sheet(grid).save(output / "sheet.png")
    return rows


def _sheet(grid: list[list[Any]]) -> Any:
    """One column per prompt, one row per step count."""
    from PIL import Image

    side = grid[0][0].width
    sheet = Image.new("RGB", (side * len(grid), side * len(grid[0])), "white")
    for column, line in enumerate(grid):
        for row, picture in enumerate(line):
            sheet.paste(picture, (column * side, row * side))
    return sheet


def complete(output: Path, seed: int) -> dict[str, Any]:
    """A function completed by the shipped code model, greedy; and again with the shipped draft, to the same text."""
    from edgekit.runtime.tasks import load

    model: TextPipeline = load(output / "pycode.bundle", task="text-generation")
    result = model.generate(CODE, max_new_tokens=64, temperature=0.0, seed=seed, stop=("\n\n",))
    config = {"method": "model", "model": str(output / "pycode-draft.bundle"), "num_speculative_tokens": DRAFTS}
    helped: TextPipeline = load(output / "pycode.bundle", task="text-generation", speculative_config=config)
    again = helped.generate(CODE, max_new_tokens=64, temperature=0.0, seed=seed, stop=("\n\n",))
    told = again.stats.speculation
    assert told is not None
    return {
        "drafts_accepted": told.accepted,
        "drafts": told.drafted,
        "tokens_per_verification": round(told.tokens_per_verify, 2),
        "same_text_with_drafts": again.tokens == result.tokens,
        "prompt": CODE,
        "completion": result.text,
        "tokens": len(result.tokens),
        "tokens_per_second": round(result.stats.decode_tokens / max(result.stats.decode_seconds, 1e-9), 1),
    }


def _show(output: Path, summary: dict[str, Any]) -> None:
    bundles = [
        (row["bundle"], terminal.size(row["bytes"]), "reused" if row["reused"] else f"{row['seconds']:.1f} s")
        for row in summary["bundles"]
    ]
    terminal.table("exported", ("bundle", "size", "time"), bundles)
    times = {(row["prompt"], row["steps"]): f"{row['milliseconds']:.0f} ms" for row in summary["pictures"]}
    rows = [(prompt, *(times[prompt, steps] for steps in STEPS)) for prompt in PICTURES]
    terminal.table("pictures (128 px)", ("prompt", *(f"{steps} step{'s' * (steps > 1)}" for steps in STEPS)), rows)
    code = summary["code"]
    click.echo(f"completed code ({code['tokens']} tokens, {code['tokens_per_second']} tokens/s):\n")
    click.echo(code["prompt"] + code["completion"])
    same = "the same text" if code["same_text_with_drafts"] else "ANOTHER text"
    click.echo(
        f"with {DRAFTS} drafts a step by pycode-draft: {same}, {code['drafts_accepted']} of {code['drafts']} accepted, "
        f"{code['tokens_per_verification']} tokens per verification"
    )
    click.echo(f"\npictures: {output}/sheet.png and one file per prompt; figures: {output}/summary.json")
