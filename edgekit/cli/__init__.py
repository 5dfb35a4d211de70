"""The command line: parse, one call, print. Heavy imports live inside the verbs, so `--help` answers at once."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import typer

from edgekit.cli import demo, doctor, export, inspect, run, terminal

app = typer.Typer(
    name="edgekit",
    help="Few-step generators and small language models, compiled and run on the device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"auto_envvar_prefix": "EDGEKIT", "help_option_names": ["-h", "--help"]},
    epilog="Every option can be set as EDGEKIT_VERB_OPTION. Exit codes: 0 ok, 1 failure, 2 usage, 3 gate failed, "
    "4 device, 5 integrity, 6 network, 130 interrupted.",
)
app.command("export")(export.command)
app.command("run")(run.command)
app.command("inspect")(inspect.command)
app.command("doctor")(doctor.command)
app.command("demo")(demo.command)


Misuse: Any = typer.BadParameter.__bases__[0]  # the parser's UsageError: typer keeps its own copy of it, or click's


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context,
    show: bool = typer.Option(False, "--version", envvar=None, show_envvar=False, help="Print the version and exit."),
) -> None:
    """Few-step generators and small language models, compiled and run on the device."""
    if show:
        from edgekit import __version__

        typer.echo(f"edgekit {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def main() -> None:
    """The `edgekit` console script: what goes wrong before a verb has begun ends like what goes wrong in one."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # closed by the shell: `>&-`  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal of few characters shows the others as question marks
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        raise SystemExit(terminal.INTERRUPTED) from None
    except BrokenPipeError:
        terminal.abandon_stdout()
        raise SystemExit(0) from None
    except Misuse as why:
        if _asked_for_json(sys.argv[1:]):
            terminal.show_json(terminal.failure("UsageError", why.format_message(), 2))
        else:
            why.show()
        raise SystemExit(2) from None
    raise SystemExit(code)


def _asked_for_json(words: list[str]) -> bool:
    """Whether a command line that could not be parsed wanted its answer as JSON."""
    by_environment = os.environ.get(f"EDGEKIT_{words[0].upper()}_JSON", "") if words else ""
    return "--json" in words or by_environment.lower() in ("1", "true", "t", "yes", "y", "on")
