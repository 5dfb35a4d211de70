"""`edgekit run` on a few-step bundle: pictures, videos, sound or arrays into files, one each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli import terminal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgekit.cli.run import Asked
    from edgekit.runtime.diffusion.pipeline import DrawResult, FewStepPipeline, StepEvent

REQUEST = (
    *("steps", "negative", "guidance", "width", "height", "batch", "image", "strength", "seed_mode"),
    *("mask", "control", "control_scale", "reference", "reference_scale"),
    *("frames", "seconds", "inputs", "tiny", "tile"),
)
OUTPUT = ("preview", "grid")
DEFAULT_NAMES = {"image": "out.png", "video": "out.gif", "audio": "out.wav", "array": "out.npy"}


def run(model: FewStepPipeline, asked: Asked, options: dict[str, Any]) -> None:
    """Generate with a bar per step, then write one file each, with its recipe inside where the format has room.

    Raises:
        BadRequest: an option the bundle cannot honour, or an output that cannot be written.
    """
    from edgekit.cli.run import ONE_PROMPT, check_output
    from edgekit.errors import BadRequest

    if asked.prompt is None and model.contract.tokenizers:
        raise BadRequest(ONE_PROMPT)
    kind = model.contract.recipe.media.kind
    target = asked.output or Path(DEFAULT_NAMES[kind])
    check_output(target)
    _check_format(kind, target, options)
    request = {name: options[name] for name in REQUEST if options[name] is not None}
    request["inputs"] = read_arrays(options["inputs"])
    previews: list[Path] = []
    with terminal.progress(quiet=asked.quiet or asked.as_json) as report:

        def on_step(event: StepEvent) -> None:
            report(f"{event.stage} {event.row + 1}/{event.of}", (event.row + 1) / event.of)
            if options["preview"]:
                previews.extend(save_previews(event, target))

        result = model.generate(asked.prompt or "", **request, seed=asked.seed, on_step=on_step)
    files = [str(path) for path in save_all(result, target)]
    if options["grid"]:
        files.append(str(save_grid(result, target)))
    _tell(model, asked, result, files, [str(path) for path in previews])


def _tell(model: FewStepPipeline, asked: Asked, result: DrawResult, files: list[str], previews: list[str]) -> None:
    if asked.as_json:
        facts = {"files": files, "metadata": result.metadata, "stats": asdict(result.stats)}
        terminal.show_json({"task": model.task, **facts, **({"previews": previews} if previews else {})})
        return
    for path in files:
        click.echo(path)
    if asked.stats:
        terminal.show_figures(asdict(result.stats))


def _check_format(kind: str, target: Path, options: dict[str, Any]) -> None:
    """Refuse an ending this cannot be written as before anything is computed."""
    from edgekit.errors import BadRequest
    from edgekit.runtime.diffusion import media

    formats = {"image": media.PICTURES, "video": media.VIDEOS, "audio": media.SOUNDS, "array": media.ARRAYS}
    media.checked(target, formats[kind], {"image": "a picture", "audio": "sound"}.get(kind, f"a {kind}"))
    for name in OUTPUT:
        if options[name] and kind not in ("image", "video"):
            raise BadRequest(f"--{name} shows pictures; this bundle makes {kind}")


def read_arrays(named: Sequence[str]) -> dict[str, npt.NDArray[np.generic]]:
    """`name=file.npy` arguments as arrays.

    Raises:
        BadRequest: an argument of another form, a name given twice, a file that is not a plain array.
    """
    import numpy as np

    from edgekit.errors import BadRequest

    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for argument in named:
        name, equals, file = argument.partition("=")
        if not equals or not name or name in arrays:
            raise BadRequest(f"--input {argument}: write NAME=FILE.npy, each name once")
        try:
            array = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as why:
            raise BadRequest(f"--input {argument}: {why}") from why
        if not isinstance(array, np.ndarray):
            raise BadRequest(f"--input {argument}: the file holds several arrays; save one with numpy.save")
        arrays[name] = array
    return arrays


def save_all(result: DrawResult, output: Path) -> list[Path]:
    """One file each: `out.png`, or `out-0.png`, `out-1.png`, ... for a batch."""
    if len(result) == 1:
        return [result.save(output)]
    return [result.save(_numbered(output, str(number)), number) for number in range(len(result))]


def save_grid(result: DrawResult, output: Path) -> Path:
    """The batch on one sheet, `out-grid.png`; of a video, its frames."""
    from edgekit.runtime.diffusion import media

    pictures = result.images or [frame for video in result.videos for frame in video]
    columns = len(result.videos[0]) if result.videos else None
    path = _numbered(output, "grid").with_suffix(".png")
    media.save_picture(media.grid(pictures, columns), path, result.metadata)
    return path


def save_previews(event: StepEvent, output: Path) -> list[Path]:
    """What a row's estimate looks like: `out-base-1.png` after the first row of stage `base`, a sheet for a batch."""
    from edgekit.runtime.diffusion import media

    pictures = event.preview()
    if not pictures:
        return []
    path = _numbered(output, f"{event.stage}-{event.row + 1}").with_suffix(".png")
    media.save_picture(media.grid(pictures), path, {"stage": event.stage, "row": event.row + 1, "of": event.of})
    return [path]


def _numbered(output: Path, what: str) -> Path:
    return output.with_name(f"{output.stem}-{what}{output.suffix}")
