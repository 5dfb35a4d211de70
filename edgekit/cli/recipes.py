"""`edgekit recipes`: the few-step contracts of published models, as bundles of them would carry them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgekit.cli import terminal

if TYPE_CHECKING:
    from edgekit.bundle.catalogue import Entry, Signature
    from edgekit.bundle.recipe import Guidance, Table


@click.group()
def command() -> None:
    """List the few-step recipes of published models, or show one with its compiled tables."""


@command.command("ls")
@terminal.json_option
def ls(json: bool) -> None:
    """List every recipe: task, sampler, default step count, guidance, and whether its numbers were verified."""

    def verb() -> None:
        from edgekit.bundle import catalogue

        rows = [summary(catalogue.entry(name)) for name in catalogue.names()]
        if json:
            terminal.show_json({"recipes": rows})
            return
        columns = ("name", "task", "sampler", "steps", "guidance", "state")
        terminal.table("recipes", columns, [[str(row[column]) for column in columns] for row in rows])

    terminal.run_verb(verb, as_json=json)


@command.command("show")
@click.argument("name")
@terminal.json_option
def show(name: str, json: bool) -> None:
    """Show one recipe: where it is from, its networks, the recipe as JSON, its tables at the default step counts."""

    def verb() -> None:
        import msgspec

        from edgekit.bundle import catalogue

        entry = catalogue.entry(name)
        tables = default_tables(entry)
        if json:
            terminal.show_json({"entry": msgspec.to_builtins(entry), "tables": msgspec.to_builtins(tables)})
        else:
            _show(entry, tables)

    terminal.run_verb(verb, as_json=json)


def summary(entry: Entry) -> dict[str, Any]:
    """A row of the list; what a stage decides stands once per stage."""
    stages = entry.recipe.stages
    return {
        "name": entry.name,
        "family": entry.family,
        "title": entry.title,
        "task": entry.task,
        "sampler": ", ".join(stage.sampler.kind for stage in stages),
        "steps": ", ".join(str(stage.sampler.steps) for stage in stages),
        "guidance": ", ".join(_guidance(stage.guidance) for stage in stages),
        "state": entry.state,
    }


def default_tables(entry: Entry) -> list[Table]:
    """The table of every stage that has one, at its default step count."""
    from edgekit.bundle.recipe import TABLE_FREE
    from edgekit.runtime.diffusion.tables import compile_stage

    stages = entry.recipe.stages
    return [compile_stage(each, each.sampler.steps) for each in stages if each.sampler.kind not in TABLE_FREE]


def _guidance(guidance: Guidance) -> str:
    return "none" if guidance.kind == "none" else f"{guidance.kind} {guidance.scale:g}"


def _show(entry: Entry, tables: list[Table]) -> None:
    import msgspec

    click.echo(f"{entry.name}: {entry.title}\n")
    rows = [("family", entry.family), ("paper", entry.paper), ("task", entry.task), ("weights", entry.source)]
    rows += [("numbers", entry.state), ("exporter", entry.exporter or "none: the recipe alone")]
    rows += [("tokenizer", f"{name}, {length} ids") for name, length in entry.tokenizers.items()]
    rows += [("note", note) for note in entry.notes]
    terminal.table("", ("", ""), rows)
    terminal.table("networks", ("part", "inputs", "outputs"), [_part(*part) for part in entry.parts.items()])
    click.echo("recipe")
    click.echo(msgspec.json.format(msgspec.json.encode(entry.recipe), indent=1))
    for table in tables:
        _show_table(table)


def _part(name: str, part: Signature) -> tuple[str, str, str]:
    sides = [
        "\n".join(f"{spec.name} {spec.dtype} ({', '.join(map(str, spec.shape))})" for spec in specs)
        for specs in (part.inputs, part.outputs)
    ]
    return name, sides[0] or "nothing", sides[1]


def _show_table(table: Table) -> None:
    from edgekit.bundle.recipe import COLUMNS

    terms = [(table.init_keep, "picture"), (table.init_scale, "noise")]
    start = " + ".join(f"{weight:.6g} {what}" for weight, what in terms if weight)
    rows = [[f"{value:.6g}" for value in row] for row in table.rows]
    columns = list(COLUMNS)
    if table.nets:
        columns.append("part")
        rows = [[*row, part] for row, part in zip(rows, table.nets, strict=True)]
    click.echo(f"\nstage {table.stage}, {table.steps} steps, from {start}")
    terminal.table("", columns, rows)
