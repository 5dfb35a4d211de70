"""Recipe to table: a stage compiled for one step count, as the bundle ships it and the runtime runs it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgekit.bundle.manifest import Manifest
from edgekit.bundle.recipe import COLUMNS, TABLE_FREE, Recipe, Sampler, Stage, Table
from edgekit.errors import BadManifest, BadRequest, TableMismatch
from edgekit.runtime.diffusion.samplers import SAMPLERS, Level, Path, Row, SamplerRule

__all__ = ["SAMPLERS", "Path", "Row", "SamplerRule", "check_tables", "compile_stage", "compile_tables", "noise_levels"]

PICTURE_STARTS = ("encode", "input", "previous")  # inits whose sample is a picture, whatever the strength


def compile_stage(stage: Stage, steps: int, strength: float | None = None) -> Table:
    """The table of one stage.

    A stage that always starts from a picture (Init.kind encode, input or previous) keeps it as it is, or brings it to
    the first row's noise level where `init.noised` says so.

    Args:
        stage: any with a table, which those of TABLE_FREE have not.
        steps: points of the whole grid.
        strength: None starts from noise; a number in (0, 1] starts from a picture, that far from it: the rows are the
            tail of the grid that `strength` leaves, and `init_keep` and `init_scale` bring the picture to its level.

    Raises:
        BadManifest: the sampler cannot make this grid. BadRequest: strength out of its range, or a sampler that
            cannot start from a picture. IllegalSteps: strength leaves no step to do.
    """
    path, nets = _walk(stage, steps, strength)
    keep, scale = _start(stage, path, strength)
    rows = tuple(tuple(map(float, row)) for row in path.rows)
    if not all(math.isfinite(value) for row in (*rows, (keep, scale)) for value in row):
        raise BadManifest(f"stage {stage.name!r} compiles to a coefficient that is not finite; check its sampler")
    return Table(stage=stage.name, steps=steps, init_scale=float(scale), rows=rows, init_keep=float(keep), nets=nets)


def noise_levels(stage: Stage, steps: int, strength: float | None = None) -> list[Level]:
    """(keep, add) of the sample each row of `compile_stage`'s table is given, and (1, 0) after the last.

    In-painting brings the known part to them: keep * picture + add * noise. Raises: as compile_stage does.
    """
    path, _ = _walk(stage, steps, strength)
    return [*path.levels, (1.0, 0.0)]


def compile_tables(recipe: Recipe) -> tuple[Table, ...]:
    """What a bundle ships: a table per stage and legal step count, for its own start. Raises BadManifest."""
    return tuple(
        compile_stage(stage, steps)
        for stage in recipe.stages
        if stage.sampler.kind not in TABLE_FREE
        for steps in stage.sampler.legal_steps
    )


def _walk(stage: Stage, steps: int, strength: float | None) -> tuple[Path, tuple[str, ...]]:
    """The rows that are run, with the noise levels they start from, and the part each of them asks."""
    sampler = stage.sampler
    rule = SAMPLERS.get(sampler.kind)
    if rule is None:
        kinds = ", ".join(SAMPLERS)
        raise BadManifest(f"stage {stage.name!r}: sampler {sampler.kind!r} has no table; those with one: {kinds}")
    if strength is not None and not 0 < strength <= 1:
        raise BadRequest(f"strength is {strength}; it must be above 0 and at most 1")
    if strength is not None and not rule.from_image:
        raise BadRequest(f"sampler {sampler.kind!r} cannot start from a picture; leave the image out")
    if strength is not None and stage.init.kind in PICTURE_STARTS and not stage.init.noised:
        raise BadRequest(f"stage {stage.name!r} starts from the picture as it is; leave the strength out")
    points = rule.points(sampler, steps, 1.0 if strength is None else strength)
    try:
        path = rule.build(sampler, points.values)
    except (ArithmeticError, ValueError) as why:  # a square root or quotient that the sampler's numbers do not allow
        raise BadManifest(f"stage {stage.name!r} does not compile for {steps} steps: {why}; check its sampler") from why
    _check_count(stage, "nets", len(sampler.nets), steps, len(path.rows))
    _check_count(stage, "time_tuned", len(sampler.time_tuned), steps, len(path.rows))
    rows = [row._replace(t=t) for row, t in zip(path.rows, _times(sampler, path), strict=True)]
    first = points.first * path.rows_per_point
    rows = rows[first:]
    rows[0] = _without_history(rows[0])
    return path._replace(rows=rows, levels=path.levels[first:]), sampler.nets[first:]


def _check_count(stage: Stage, field: str, given: int, steps: int, rows: int) -> None:
    if given and given != rows:
        raise BadManifest(
            f"stage {stage.name!r}: {field} has {given} entries and the table of {steps} steps {rows} rows; give one "
            f"per row, and make {steps} steps illegal if they are for another count"
        )


def _without_history(row: Row) -> Row:
    """The first row of a run has none before it: what it would take from there it takes from its own sample."""
    return row._replace(kx=row.kx + row.kp, ky=row.ky + row.kq, kp=0.0, kq=0.0)


def _times(sampler: Sampler, path: Path) -> list[float]:
    """What the network is told as time in every row. Raises BadManifest: a `time` that the sampler has not."""
    if sampler.time_tuned:
        return list(sampler.time_tuned)
    is_flow = sampler.prediction == "flow"
    if sampler.time == "index":
        times = [float(place) for place in range(len(path.rows) - 1, -1, -1)]
    elif sampler.time == "t":
        times = [row.t for row in path.rows]
    elif is_flow != (sampler.time == "one_minus_sigma") or sampler.kind in ("residual_shift", "brownian_bridge"):
        raise BadManifest(f"sampler {sampler.kind!r} on prediction {sampler.prediction!r} has no time {sampler.time!r}")
    else:  # signal over its norm: sqrt(abar), in sigma space too; on a flow the signal itself
        times = [keep if is_flow else keep / math.hypot(keep, add) for keep, add in path.levels]
    return [t * sampler.time_scale for t in times]


def _start(stage: Stage, path: Path, strength: float | None) -> Level:
    """init_keep and init_scale."""
    if stage.init.kind in PICTURE_STARTS:
        return path.levels[0] if stage.init.noised else (1.0, 0.0)
    return (0.0, path.scale) if strength is None else path.levels[0]


def check_tables(manifest: Manifest) -> None:
    """Assert that the shipped tables are the recipe's, number by number to 1e-7 relative.

    Raises:
        TableMismatch: a table is missing, extra, or has another number. BadManifest: the recipe does not compile.
    """
    if manifest.recipe is None:
        raise BadManifest(f"task {manifest.task!r} needs a recipe and edgekit.json has none; export the model again")
    wanted = {(table.stage, table.steps): table for table in compile_tables(manifest.recipe)}
    shipped = {(table.stage, table.steps): table for table in manifest.tables}
    if len(shipped) != len(manifest.tables) or wanted.keys() != shipped.keys():
        raise TableMismatch(
            f"tables shipped for (stage, steps) {sorted(shipped)}, the recipe needs {sorted(wanted)}; export again"
        )
    for key, table in wanted.items():
        if table.nets != shipped[key].nets:
            raise TableMismatch(
                f"table of stage {key[0]!r} for {key[1]} steps runs {shipped[key].nets or 'one part'}, the recipe "
                f"{table.nets or 'one part'}; export the model again"
            )
        for place, ours, theirs in _numbers(table, shipped[key]):
            if not math.isclose(ours, theirs, rel_tol=1e-7, abs_tol=1e-12):
                raise TableMismatch(
                    f"table of stage {key[0]!r} for {key[1]} steps: {place} is {theirs!r}, the recipe compiles to "
                    f"{ours!r}; the bundle was edited or made by another version, export the model again"
                )


def _numbers(ours: Table, theirs: Table) -> Sequence[tuple[str, float, float]]:
    """Pairs of numbers that should agree, each with its name."""
    pairs = [
        ("init_scale", ours.init_scale, theirs.init_scale),
        ("init_keep", ours.init_keep, theirs.init_keep),
        ("the number of rows", float(len(ours.rows)), float(len(theirs.rows))),
    ]
    for i, (mine, other) in enumerate(zip(ours.rows, theirs.rows, strict=False)):
        if len(other) != len(COLUMNS):
            return [(f"the length of row {i}", float(len(COLUMNS)), float(len(other)))]
        pairs += [(f"{name} of row {i}", a, b) for name, a, b in zip(COLUMNS, mine, other, strict=True)]
    return pairs
