"""What every verb shares: errors and their exit codes, progress with time left, JSON output, byte sizes.

Results go to stdout; progress, notes and errors go to stderr.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from decimal import Decimal
from typing import Any

import click

from edgekit.errors import BadRequest, EdgekitError

SCHEMA_VERSION = 1
INTERRUPTED = 130
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
json_option = click.option("--json", is_flag=True, help="One JSON object on stdout.")
Report = Callable[[str, float], None]  # (what is being done, fraction done)
UNUSABLE = {  # what the system says of a path that the request should not have named
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO),
}


def run_verb(verb: Callable[[], object], *, as_json: bool) -> None:
    """Run one verb and end the process with the exit code its outcome owns."""
    try:
        verb()
    except EdgekitError as why:
        fail(why, as_json=as_json)
        raise SystemExit(why.exit_code) from None
    except KeyboardInterrupt:
        note("interrupted; nothing was left half-written")
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:  # the reader went away, as in `edgekit run … | head`
        abandon_stdout()
        raise SystemExit(0) from None
    except OSError as why:
        told = translated(why)
        fail(told, as_json=as_json)
        abandon_stdout()
        raise SystemExit(told.exit_code) from None


def translated(why: OSError) -> EdgekitError:
    """What the system refused, in our words: a path that cannot be used is the request's fault, all else a failure."""
    if why.errno in UNUSABLE:
        return BadRequest(f"{why.filename2 or why.filename}: {why.strerror}; give a path that can be used")
    return EdgekitError(f"the system failed to read or write: {why}. Is the disk full?")


def abandon_stdout() -> None:
    """Nobody takes our output: what is still buffered must not fail once more when the interpreter ends."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(why: EdgekitError, *, as_json: bool) -> None:
    """Say what went wrong: one line for people, one object for programs."""
    if as_json:
        with suppress(OSError):  # where stdout itself is what failed, the exit code must do
            show_json(failure(type(why).__name__, str(why), why.exit_code))
    else:
        note(f"error: {why}")


def failure(kind: str, message: str, exit_code: int) -> dict[str, Any]:
    """The object that stands for a failure."""
    return {"error": {"kind": kind, "message": message, "exit_code": exit_code}}


def show_json(value: dict[str, Any]) -> None:
    """The one object a `--json` verb prints."""
    print(json.dumps({"schema_version": SCHEMA_VERSION, **value}, indent=1), flush=True)  # noqa: T201


def note(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Report]:
    """A bar with time left when someone is looking, nothing otherwise."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _what, _fraction: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<32.32}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, fraction: bar.update(task, description=what, completed=fraction)


def parse_bytes(text: str) -> int:
    """`300MB`, `8GiB` or plain bytes.

    Raises:
        BadRequest: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B?)", text.strip(), re.IGNORECASE)
    unit = match[2].upper() if match else None
    if match is None or unit not in UNITS:
        raise BadRequest(f"{text!r} is not a size; write for example 300MB, 8GB or 2GiB")
    count = int(Decimal(match[1]) * UNITS[unit])
    if count >= 2**63:
        raise BadRequest(f"{text!r} is more memory than any machine has")
    return count


def size(count: int | float) -> str:
    """Bytes as people read them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout, plain when piped."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title or None, title_justify="left", header_style="bold")
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    console = Console()
    with console.capture() as text:  # rich's own print ends the process with 1 where the reader went away
        console.print(grid)
    sys.stdout.write(text.get())
    sys.stdout.flush()


def show_figures(figures: Mapping[str, Any]) -> None:
    """One line per figure, on stderr."""
    for name, value in figures.items():
        told = f"{value:.4g}" if isinstance(value, float) else value
        if isinstance(value, dict):
            told = ", ".join(f"{key} {part:.4g}" for key, part in value.items())
        note(f"{name.replace('_', ' ')}: {told}")
