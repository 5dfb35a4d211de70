"""The command line: parse, one call, print. Heavy imports live inside the verbs, so `--help` answers at once."""

from __future__ import annotations

import io
import os
import sys

import click

from edgekit.cli import demo, doctor, export, inspect, pair, plan, recipes, run, terminal

CONTEXT = {"auto_envvar_prefix": "EDGEKIT", "help_option_names": ["-h", "--help"], "max_content_width": 100}
EPILOG = """Every option can be set as EDGEKIT_VERB_OPTION. Exit codes: 0 ok, 1 failure, 2 usage, 3 gate failed,
4 device, 5 integrity, 6 network, 130 interrupted."""
VERBS = {
    "export": export.command,
    "plan": plan.command,
    "run": run.command,
    "inspect": inspect.command,
    "pair": pair.command,
    "recipes": recipes.command,
    "doctor": doctor.command,
    "demo": demo.command,
}


@click.group("edgekit", commands=VERBS, context_settings=CONTEXT, epilog=EPILOG, invoke_without_command=True)
@click.option("--version", "show", is_flag=True, allow_from_autoenv=False, help="Print the version and exit.")
@click.pass_context
def app(context: click.Context, show: bool) -> None:
    """Few-step generators and small language models, compiled and run on the device."""
    if show:
        from edgekit import __version__

        click.echo(f"edgekit {__version__}")
        context.exit()
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
        context.exit(2)


def main() -> None:
    """The `edgekit` console script: what goes wrong before a verb has begun ends like what goes wrong in one."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # closed by the shell: `>&-`  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal of few characters shows the others as question marks
    try:
        code = app(prog_name="edgekit", standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        raise SystemExit(terminal.INTERRUPTED) from None
    except BrokenPipeError:
        terminal.abandon_stdout()
        raise SystemExit(0) from None
    except click.UsageError as why:
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
