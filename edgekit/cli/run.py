"""`edgekit run`: text to stdout, pictures to files, everything else to stderr."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli import terminal

if TYPE_CHECKING:
    from edgekit.runtime.diffusion.pipeline import ImagePipeline, ImageResult
    from edgekit.runtime.llm.pipeline import TextPipeline

OTHER_PICTURES = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}


@dataclass(frozen=True)
class Asked:
    """The options of one run; None means the bundle's own default."""

    prompt: str
    output: Path | None
    seed: int
    stats: bool
    quiet: bool
    as_json: bool
    text: dict[str, Any]
    image: dict[str, Any]
    chat: bool
    system: str | None


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", help="What to make; - reads stdin.")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="Read the prompt from a file.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="PNG (image) or text file to write.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N, or auto.")
@click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Engine threads; 0 leaves the choice to the engine.",
)
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
@click.option("--steps", type=int, help="One of the legal counts.")
@click.option("--negative", default="", help="What not to make.")
@click.option("--guidance", type=float, help="Guidance scale.")
@click.option("--width", type=int, help="Pixels.")
@click.option("--height", type=int, help="Pixels.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures to make.")
@click.option("--image", type=click.Path(path_type=Path), help="Start from this picture.")
@click.option("--strength", type=float, help="How much of it to redraw.")
@click.option("--seed-mode", default="philox", show_default=True, help="philox or torch-cpu.")
@click.option("--stats", is_flag=True, help="Print times and counts.")
@terminal.json_option
@click.option("--quiet", is_flag=True, help="Only the result.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Check every file's sha256 first.")
def command(
    bundle: Path,
    prompt: str | None,
    prompt_file: Path | None,
    output: Path | None,
    device: str,
    threads: int,
    seed: int,
    system: str | None,
    chat: bool,
    max_new_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    stop: tuple[str, ...],
    steps: int | None,
    negative: str,
    guidance: float | None,
    width: int | None,
    height: int | None,
    batch: int,
    image: Path | None,
    strength: float | None,
    seed_mode: str,
    stats: bool,
    json: bool,
    quiet: bool,
    verify: bool,
) -> None:
    """Run a bundle, without torch.

    Text bundles take the options from --system to --stop, image bundles those from --steps to --seed-mode.
    """
    text = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop,
    }
    pixels = {
        "steps": steps,
        "negative": negative,
        "guidance": guidance,
        "width": width,
        "height": height,
        "batch": batch,
        "image": image,
        "strength": strength,
        "seed_mode": seed_mode,
    }

    def verb() -> None:
        asked = Asked(read_prompt(prompt, prompt_file), output, seed, stats, quiet, json, text, pixels, chat, system)
        _run(bundle, asked, device=device, threads=threads, verify=verify)

    terminal.run_verb(verb, as_json=json)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the option, from a file, or from standard input.

    Raises:
        BadRequest: none or two given, or the file cannot be read as UTF-8.
    """
    from edgekit.errors import BadRequest

    if (prompt is None) == (file is None):
        raise BadRequest("give exactly one of --prompt TEXT, --prompt - (standard input) and --prompt-file FILE")
    if prompt is not None and prompt != "-":
        return prompt
    try:
        if file is not None:
            return file.read_text(encoding="utf-8-sig")
        if sys.stdin is None:
            raise BadRequest("standard input is closed, so --prompt - has nothing to read")
        return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig").read()
    except (OSError, UnicodeDecodeError) as why:
        raise BadRequest(f"cannot read the prompt: {why}") from why


def _run(bundle: Path, asked: Asked, *, device: str, threads: int, verify: bool) -> None:
    from edgekit.runtime.backends.devices import choose
    from edgekit.runtime.llm.pipeline import TextPipeline
    from edgekit.runtime.tasks import load

    if asked.output is not None:
        check_output(asked.output)
    chosen = choose(device)
    if device == "auto" and not asked.quiet:
        terminal.note(f"device: {chosen}")
    model = load(bundle, device=chosen, threads=threads, verify=verify)
    if isinstance(model, TextPipeline):
        _refuse_others(asked.image, "image")
        _run_text(model, asked)
    else:
        _refuse_others({**asked.text, "chat": asked.chat, "system": asked.system}, "text")
        _run_image(model, asked)


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


def _refuse_others(options: dict[str, Any], of: str) -> None:
    """An option of another task is a mistake, not something to drop in silence."""
    from edgekit.errors import BadRequest

    defaults: dict[str, Any] = {"max_new_tokens": 256, "batch": 1, "seed_mode": "philox", "negative": "", "stop": ()}
    for name, value in options.items():
        if value not in (None, False) and value != defaults.get(name):
            raise BadRequest(
                f"--{name.replace('_', '-')} is for {of} models; `edgekit inspect` says what this bundle is"
            )


def _run_text(model: TextPipeline, asked: Asked) -> None:
    """Stream to stdout as it comes, or collect for --json and -o."""
    request = {key: value for key, value in asked.text.items() if value is not None}
    if asked.chat or asked.system is not None:
        request["messages"] = [{"role": "user", "content": asked.prompt}]
        request["system"] = asked.system
    else:
        request["prompt"] = asked.prompt
    if asked.as_json or asked.output is not None:
        result = model.generate(**request, seed=asked.seed)
        if asked.output is not None:
            from edgekit.bundle.files import write_atomically

            write_atomically(asked.output, result.text.encode())
        if asked.as_json:
            terminal.show_json({"task": "text-generation", **asdict(result)})
        stats = result.stats
    else:
        for chunk in model.stream(**request, seed=asked.seed):
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
            stats = chunk.stats
        sys.stdout.write("\n")
    if asked.stats and not asked.as_json:
        _show_stats(asdict(stats))


def _run_image(model: ImagePipeline, asked: Asked) -> None:
    """Generate with a bar per step, then write one PNG per picture, each with its recipe inside."""
    from edgekit.errors import BadRequest

    target = asked.output or Path("out.png")
    check_output(target)
    if target.suffix.lower() in OTHER_PICTURES:
        raise BadRequest(f"--output {target}: pictures are written as PNG; name it {target.with_suffix('.png').name}")
    request = {key: value for key, value in asked.image.items() if value is not None}
    with terminal.progress(quiet=asked.quiet or asked.as_json) as report:
        result = model.generate(
            asked.prompt,
            **request,
            seed=asked.seed,
            on_step=lambda event: report(f"{event.stage} {event.row + 1}/{event.of}", (event.row + 1) / event.of),
        )
    files = [str(path) for path in save_all(result, target)]
    if asked.as_json:
        facts = {"files": files, "metadata": result.metadata, "stats": asdict(result.stats)}
        terminal.show_json({"task": model.task, **facts})
        return
    for path in files:
        click.echo(path)
    if asked.stats:
        _show_stats(asdict(result.stats))


def save_all(result: ImageResult, output: Path) -> list[Path]:
    """One file per picture: `out.png`, or `out-0.png`, `out-1.png`, ... for a batch."""
    if len(result.images) == 1:
        return [result.save(output)]
    names = [output.with_name(f"{output.stem}-{number}{output.suffix}") for number in range(len(result.images))]
    return [result.save(path, number) for number, path in enumerate(names)]


def _show_stats(stats: dict[str, Any]) -> None:
    """One line per figure, on stderr."""
    for name, value in stats.items():
        told = f"{value:.4g}" if isinstance(value, float) else value
        if isinstance(value, dict):
            told = ", ".join(f"{key} {part:.4g}" for key, part in value.items())
        terminal.note(f"{name.replace('_', ' ')}: {told}")
