"""The command line: parse, one call, print. Heavy imports live inside the verbs, so `--help` answers at once."""

from __future__ import annotations

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
    """The `edgekit` console script; Ctrl-C before a verb has begun ends like Ctrl-C in one."""
    try:
        app()
    except KeyboardInterrupt:
        raise SystemExit(terminal.INTERRUPTED) from None
