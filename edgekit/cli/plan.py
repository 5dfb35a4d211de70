"""`edgekit plan`: other budgets for a bundle of mixed precision, from what was measured when it was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli import terminal

if TYPE_CHECKING:
    from edgekit.bundle.store import Bundle
    from edgekit.quant.allocate import Allocation
    from edgekit.quant.budget import Budget
    from edgekit.quant.plan import PrecisionPlan
    from edgekit.quant.study import Study

POINTS = 8  # of the front that is printed


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--budget", multiple=True, help="300MB, 4.5bits a weight, 20ms, or 0.6x the time. Repeatable.")
@click.option("--metric-cap", multiple=True, help="Most error, NAME=X (content, quality, kl). Repeatable.")
@click.option("--protect", multiple=True, help="Layers that keep floats, as a pattern. Repeatable.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Plan to write, for export --plan.")
@click.option("--force", is_flag=True, help="Replace a file of this name.")
@terminal.json_option
def command(
    bundle: Path,
    budget: tuple[str, ...],
    metric_cap: tuple[str, ...],
    protect: tuple[str, ...],
    output: Path | None,
    force: bool,
    json: bool,
) -> None:
    """Show what sizes a mixed bundle could have and at what error; with a budget, choose one.

    Nothing is measured anew: errors and times are what the study in the bundle predicts.
    """

    def verb() -> None:
        from edgekit.bundle.files import write_atomically
        from edgekit.bundle.store import read_bundle
        from edgekit.errors import BadRequest
        from edgekit.quant.budget import parse_budget
        from edgekit.quant.plan import encode_plan

        asked = parse_budget(budget, metric_cap)
        if output is not None and output.exists() and not force:
            raise BadRequest(f"{output} exists already; choose another name, or replace it with --force")
        study, own = read_study(read_bundle(bundle, verify=False))
        wanted = bool(budget or metric_cap or output)
        chosen = study.decide(asked, protect) if wanted else None
        if output is not None and chosen is not None:
            write_atomically(output, encode_plan(planned(own, study, chosen, asked)))
        found = {
            "front": [summary(study, one) for one in study.front(protect, POINTS)],
            "current": summary(study, current(study, own)),
            "chosen": None if chosen is None else summary(study, chosen),
        }
        if json:
            written = None if output is None else str(output)
            terminal.show_json({"bundle": str(bundle), "target": study.target, **found, "output": written})
        else:
            _show(bundle, study, found, output)

    terminal.run_verb(verb, as_json=json)


def read_study(bundle: Bundle) -> tuple[Study, PrecisionPlan]:
    """What was measured of a bundle, and the plan it was made by.

    Raises:
        BadRequest: the bundle was not made by measurement.
        WrongHash: one of the files is not what the manifest says.
    """
    from edgekit.errors import BadRequest
    from edgekit.quant.mixed import PLAN_FILE, STUDY_FILE
    from edgekit.quant.plan import parse_plan
    from edgekit.quant.study import decode_study

    if not {STUDY_FILE, PLAN_FILE} <= {file.path for file in bundle.manifest.files}:
        made = bundle.manifest.precision.requested
        raise BadRequest(
            f"{bundle.root.name} was exported in {made}; export with --precision mixed to have something to plan from"
        )
    study = decode_study(_checked(bundle, STUDY_FILE), f"{bundle.root.name}/{STUDY_FILE}")
    return study, parse_plan(_checked(bundle, PLAN_FILE), f"{bundle.root.name}/{PLAN_FILE}")


def _checked(bundle: Bundle, path: str) -> bytes:
    """A file of the bundle, which is not hashed as a whole: that takes long where weights are large."""
    from hashlib import sha256

    from edgekit.errors import WrongHash

    raw = bundle.path(path).read_bytes()
    if [file.sha256 for file in bundle.manifest.files if file.path == path] != [sha256(raw).hexdigest()]:
        raise WrongHash(f"{bundle.root / path} is not what the manifest says; fetch or export the bundle again")
    return raw


def current(study: Study, own: PrecisionPlan) -> Allocation:
    """What the study predicts of the plan that the bundle has."""
    return study.whole(study.problem(), study.pick_of({part: each.units for part, each in own.parts.items()}))


def planned(own: PrecisionPlan, study: Study, found: Allocation, asked: Budget) -> PrecisionPlan:
    """The bundle's own plan with other choices.

    Nothing of the new ones has been measured together, so no measured error is kept. Ranges are those of the layers
    that run on integers now; an export with this plan measures all it needs itself.
    """
    import msgspec

    from edgekit.quant.plan import Error, PartChoices

    parts = dict(own.parts)
    for name, units in study.choices_of(found.pick).items():
        parts[name] = msgspec.structs.replace(parts.get(name, PartChoices({})), units=units)
    limits = {name: getattr(asked, name) for name in ("bytes", "bits", "milliseconds", "times")}
    return msgspec.structs.replace(
        own,
        parts=parts,
        budgets={name: limit for name, limit in limits.items() if limit is not None},
        caps=dict(asked.caps),
        bytes=int(found.bytes),
        milliseconds=found.milliseconds,
        errors=tuple(Error(name, predicted=value) for name, value in found.errors.items()),
    )


def summary(study: Study, found: Allocation) -> dict[str, Any]:
    """One plan in figures: bytes of the bundle, bits of a planned weight, milliseconds, errors, units by choice."""
    from edgekit.quant.choices import CHOICES

    names = [
        study.choices[column]
        for row, column in zip(study.rows, found.pick.tolist(), strict=True)
        for _ in range(len(row.units))
    ]
    return {
        "bytes": int(found.bytes),
        "bits": 8 * (found.bytes - study.fixed_bytes) / max(study.params, 1),
        "milliseconds": found.milliseconds,
        "errors": found.errors,
        "counts": {name: names.count(name) for name in CHOICES if name in names},
    }


def _show(bundle: Path, study: Study, found: Mapping[str, Any], output: Path | None) -> None:
    rows = [("", each) for each in found["front"]] + [("this bundle", found["current"])]
    rows += [("chosen", found["chosen"])] if found["chosen"] else []
    rows.sort(key=lambda row: row[1]["bytes"])
    columns = ("", "bundle", "bits a weight", "ms", *(f"{name} error" for name in study.errors))
    title = f"{bundle} for {study.target}: the least error at each size, as predicted"
    terminal.table(title, columns, [(name, *_figures(each)) for name, each in rows])
    names = [name for name in study.choices if any(name in each["counts"] for _, each in rows)]
    counts = [(each["bytes"], each["counts"]) for _, each in rows]
    counted = [(terminal.size(count), *(str(each.get(name, "")) for name in names)) for count, each in counts]
    terminal.table("layers by choice", ("bundle", *names), counted)
    if found["chosen"]:
        click.echo(f"chosen: {_line(found['chosen'])}")
    if output is not None:
        terminal.note(f"{output} written; make it with: edgekit export SOURCE --precision mixed --plan {output}")


def _figures(plan: Mapping[str, Any]) -> tuple[str, ...]:
    time = "" if plan["milliseconds"] is None else f"{plan['milliseconds']:.3g}"
    errors = (f"{value:.3g}" for value in plan["errors"].values())
    return (terminal.size(plan["bytes"]), f"{plan['bits']:.2f}", time, *errors)


def _line(plan: Mapping[str, Any]) -> str:
    time = "" if plan["milliseconds"] is None else f"{plan['milliseconds']:.3g} ms, "
    errors = ", ".join(f"{name} error {value:.3g}" for name, value in plan["errors"].items())
    layers = ", ".join(f"{count} x {name}" for name, count in plan["counts"].items())
    return f"{terminal.size(plan['bytes'])}, {plan['bits']:.2f} bits a weight, {time}{errors} ({layers})"
