"""A sampler is a table of numbers: one pure builder per sampler, each written like its paper.

Every row asks the network once and is linear in all it sees:

    m  = net(c_in * x, t)                                            the network, after guidance
    y  = px * x + pm * m                                             its estimate of the clean sample (then clipped)
    x' = kx * x + ky * y + km * m + kz * z + kp * x_prev + kq * y_prev     z: fresh unit noise; _prev: the row before

Notation: x_t = a x_0 + s eps with a^2 = abar_t and s^2 = 1 - abar_t; in sigma space x = x_0 + sigma eps; on a flow
x = (1 - sigma) x_0 + sigma eps and the network predicts eps - x_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from edgekit.bundle.manifest import Manifest
from edgekit.bundle.recipe import COLUMNS, NoiseSchedule, Recipe, Sampler, Stage, Table
from edgekit.errors import BadManifest, BadRequest, TableMismatch
from edgekit.runtime.diffusion.grids import F64, TRAIN_STEPS, Points, alphas_cumprod, flow_points, vp_points

SMALLEST_ALPHA = 2.0**-24  # what k-diffusion samplers put in place of a terminal abar of zero


class Row(NamedTuple):
    """One row of a table, in the order of COLUMNS."""

    t: float
    c_in: float = 1.0
    px: float = 1.0
    pm: float = 0.0
    kx: float = 0.0
    ky: float = 1.0
    km: float = 0.0
    kz: float = 0.0
    kp: float = 0.0
    kq: float = 0.0


class Path(NamedTuple):
    """All rows of a grid; for each, how a clean sample is noised to its level: keep * x_0 + add * noise.

    `scale` is what unit noise is multiplied with where a sample starts from noise alone.
    """

    rows: list[Row]
    levels: list[tuple[float, float]]
    scale: float = 1.0


class Estimate(NamedTuple):
    """x_0 = px x + pm m and eps = ex x + em m for one prediction type at one noise level."""

    px: float
    pm: float
    ex: float
    em: float


def estimate(prediction: str, a: float, s: float) -> Estimate:
    """How the network's output gives the clean sample and the noise, at x = a x_0 + s eps.

    Raises:
        BadManifest: a prediction type these samplers do not know, or epsilon at zero signal.
    """
    if prediction == "epsilon":
        if a == 0:
            raise BadManifest(
                "prediction `epsilon` is undefined at zero signal; a zero-SNR schedule needs v_prediction"
            )
        return Estimate(1 / a, -s / a, 0.0, 1.0)
    if prediction == "sample":
        return Estimate(0.0, 1.0, 1 / s, -a / s)
    if prediction == "v_prediction":  # Salimans & Ho 2022: v = a eps - s x_0
        return Estimate(a, -s, s, a)
    raise BadManifest(f"prediction {prediction!r} is for flow samplers only")


def _signal_and_noise(sampler: Sampler, timesteps: F64) -> tuple[F64, list[int], list[tuple[float, float]]]:
    """abar of the whole schedule, the visited timesteps as integers, and (a, s) at each."""
    abar = alphas_cumprod(sampler.noise_schedule or NoiseSchedule())
    visited = [int(t) for t in np.round(timesteps)]
    return abar, visited, [(math.sqrt(abar[t]), math.sqrt(1 - abar[t])) for t in visited]


def lcm(sampler: Sampler, timesteps: F64) -> Path:
    """Latent consistency (Luo et al. 2023): f = c_skip x + c_out x_0, then renoised to the next timestep."""
    _, visited, levels = _signal_and_noise(sampler, timesteps)
    rows = []
    for t, (a, s), (a_next, s_next) in zip(visited, levels, [*levels[1:], (1.0, 0.0)], strict=True):
        to = estimate(sampler.prediction, a, s)
        scaled, data = t * sampler.timestep_scaling, sampler.sigma_data
        c_skip = data**2 / (scaled**2 + data**2)
        c_out = scaled / math.sqrt(scaled**2 + data**2)
        rows.append(Row(t, px=to.px, pm=to.pm, kx=a_next * c_skip, ky=a_next * c_out, kz=s_next))
    return Path(rows, levels)


def tcd(sampler: Sampler, timesteps: F64) -> Path:
    """Trajectory consistency (Zheng et al. 2024): jump to r = (1 - gamma) t', then renoise from r up to t'."""
    if not 0 <= sampler.gamma <= 1:
        raise BadManifest(f"gamma is {sampler.gamma}; it is a share, from 0 to 1")
    abar, visited, levels = _signal_and_noise(sampler, timesteps)
    rows = []
    for i, (t, (a, s)) in enumerate(zip(visited, levels, strict=True)):
        to = estimate(sampler.prediction, a, s)
        last = i + 1 == len(visited)
        t_next = 0 if last else visited[i + 1]
        r = int(np.floor(np.float32(1 - sampler.gamma) * np.float32(t_next)))  # the product is float32 in the reference
        a_r, s_r = math.sqrt(abar[r]), math.sqrt(1 - abar[r])
        power = 1.0 if last or sampler.gamma == 0 else float(abar[t_next]) / float(abar[r])
        g = math.sqrt(power)
        rows.append(
            Row(t, px=to.px, pm=to.pm, kx=g * s_r * to.ex, ky=g * a_r, km=g * s_r * to.em, kz=math.sqrt(1 - power))
        )
    return Path(rows, levels)


def ddim(sampler: Sampler, timesteps: F64) -> Path:
    """DDIM with eta (Song et al. 2021, eq. 12). Clipping touches x_0 alone; eps is the network's own.

    On a made grid the target lies a constant stride below t, as in diffusers; an explicit list is walked as it stands.
    """
    abar, visited, levels = _signal_and_noise(sampler, timesteps)
    final = 1.0 if sampler.final_alpha_one else float(abar[0])
    stride = len(abar) // len(visited)
    explicit = sampler.timesteps is not None and len(sampler.timesteps) == len(visited)
    targets = [*visited[1:], -1] if explicit else [t - stride for t in visited]
    rows = []
    for t, target, (a, s) in zip(visited, targets, levels, strict=True):
        to = estimate(sampler.prediction, a, s)
        now, then = float(abar[t]), float(abar[target]) if target >= 0 else final
        noise = sampler.eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))
        toward = math.sqrt(max(1 - then - noise**2, 0.0))
        rows.append(Row(t, px=to.px, pm=to.pm, kx=toward * to.ex, ky=math.sqrt(then), km=toward * to.em, kz=noise))
    return Path(rows, levels)


def _sigma_space(sampler: Sampler, timesteps: F64) -> tuple[list[float], list[Row]]:
    """Sigmas down to 0 and, per timestep, a row that only scales its input and estimates x_0 (Karras et al. 2022)."""
    abar = alphas_cumprod(sampler.noise_schedule or NoiseSchedule())
    if abar[-1] == 0:
        abar[-1] = SMALLEST_ALPHA
    levels = np.sqrt((1 - abar) / abar)
    timesteps = timesteps.astype(np.float32).astype(np.float64)
    sigmas = np.interp(timesteps, np.arange(len(levels)), levels).astype(np.float32).astype(float).tolist()
    rows = []
    for t, sigma in zip(timesteps.tolist(), sigmas, strict=True):
        c_in = 1 / math.sqrt(sigma**2 + 1)
        to = estimate(sampler.prediction, c_in, sigma * c_in)  # of the scaled input c_in x = a x_0 + s eps
        rows.append(Row(t, c_in=c_in, px=to.px * c_in, pm=to.pm))
    return [*sigmas, 0.0], rows


def _start_in_sigma_space(sampler: Sampler, sigma: float) -> float:
    """A grid that starts at the last training step starts as pure noise; `leading` starts below it and adds a unit."""
    leading = sampler.grid is not None and sampler.grid.spacing == "leading"
    return math.sqrt(sigma**2 + 1) if leading else sigma


def euler(sampler: Sampler, timesteps: F64) -> Path:
    """Euler steps in sigma space (Karras et al. 2022): x' = y + sigma'/sigma (x - y)."""
    sigmas, rows = _sigma_space(sampler, timesteps)
    steps = [
        row._replace(kx=after / now, ky=1 - after / now)
        for row, now, after in zip(rows, sigmas, sigmas[1:], strict=False)
    ]
    return Path(steps, [(1.0, sigma) for sigma in sigmas[:-1]], _start_in_sigma_space(sampler, sigmas[0]))


def euler_ancestral(sampler: Sampler, timesteps: F64) -> Path:
    """Euler down to sigma_down, then up again by fresh noise sigma_up, so that the two add to the next sigma."""
    sigmas, rows = _sigma_space(sampler, timesteps)
    steps = []
    for row, now, after in zip(rows, sigmas, sigmas[1:], strict=False):
        up = math.sqrt(after**2 * (now**2 - after**2) / now**2)
        down = math.sqrt(after**2 - up**2)
        steps.append(row._replace(kx=down / now, ky=1 - down / now, kz=up))
    return Path(steps, [(1.0, sigma) for sigma in sigmas[:-1]], _start_in_sigma_space(sampler, sigmas[0]))


def _flow(sampler: Sampler, sigmas: F64) -> tuple[list[tuple[float, float, Row]], list[tuple[float, float]]]:
    """(sigma, next sigma, row with its x_0 estimate) along a straight path x = (1 - sigma) x_0 + sigma eps."""
    if sampler.prediction != "flow":
        raise BadManifest(f"sampler {sampler.kind!r} needs prediction `flow`, not {sampler.prediction!r}")
    now = sigmas.tolist()
    times = (sigmas.astype(np.float32) * np.float32(TRAIN_STEPS)).astype(float).tolist()
    rows = [Row(t, px=1.0, pm=-sigma) for t, sigma in zip(times, now, strict=True)]
    return list(zip(now, [*now[1:], 0.0], rows, strict=True)), [(1 - sigma, sigma) for sigma in now]


def flow_euler(sampler: Sampler, sigmas: F64) -> Path:
    """Euler steps along a rectified flow (Liu et al. 2023): x' = x + (sigma' - sigma) m."""
    path, levels = _flow(sampler, sigmas)
    return Path([row._replace(kx=1.0, ky=0.0, km=after - now) for now, after, row in path], levels)


def flow_stochastic(sampler: Sampler, sigmas: F64) -> Path:
    """Consistency steps on a flow: the clean estimate, renoised to the next sigma: x' = (1 - sigma') y + sigma' z."""
    path, levels = _flow(sampler, sigmas)
    return Path([row._replace(ky=1 - after, kz=after) for _, after, row in path], levels)


def one_step(sampler: Sampler, points: F64) -> Path:
    """One call, whose estimate of the clean sample is the answer."""
    if sampler.prediction == "flow":
        path, levels = _flow(sampler, points)
        return Path([row for *_, row in path], levels)
    _, (t,), ((a, s),) = _signal_and_noise(sampler, points)
    to = estimate(sampler.prediction, a, s)
    return Path([Row(t, px=to.px, pm=to.pm)], [(a, s)])


def _last_point(sampler: Sampler, steps: int, strength: float) -> Points:
    """The single point of a one-step model: as given, or the noisiest."""
    if strength != 1:
        raise BadRequest("a one-step model cannot start part of the way; leave the strength out")
    given = sampler.sigmas if sampler.prediction == "flow" else sampler.timesteps
    n = sampler.noise_schedule.n if sampler.noise_schedule else TRAIN_STEPS
    points = given or ((1.0,) if sampler.prediction == "flow" else (float(n - 1),))
    if len(points) != steps or steps != 1:
        raise BadManifest(f"sampler `one_step` takes one step and one point, not {steps} and {len(points)}")
    return Points(np.asarray(points, np.float64))


class SamplerRule(NamedTuple):
    """A row of SAMPLERS: where the points are, what happens at them, and whether a picture may start the path."""

    points: Callable[[Sampler, int, float], Points]
    build: Callable[[Sampler, F64], Path]
    from_image: bool = True


SAMPLERS: dict[str, SamplerRule] = {
    "lcm": SamplerRule(vp_points, lcm),
    "tcd": SamplerRule(vp_points, tcd),
    "ddim": SamplerRule(vp_points, ddim),
    "euler": SamplerRule(vp_points, euler),
    "euler_ancestral": SamplerRule(vp_points, euler_ancestral),
    "flow_euler": SamplerRule(flow_points, flow_euler),
    "flow_stochastic": SamplerRule(flow_points, flow_stochastic),
    "one_step": SamplerRule(_last_point, one_step, from_image=False),
}


def compile_stage(stage: Stage, steps: int, strength: float | None = None) -> Table:
    """The table of one stage.

    Args:
        stage: any but a `direct` one, which has nothing to compile.
        steps: points of the whole grid.
        strength: None starts from noise; a number in (0, 1] starts from a picture, that far from it: the rows are the
            tail of the grid that `strength` leaves, and `init_keep` and `init_scale` bring the picture to its level.

    Raises:
        BadManifest: the sampler cannot make this grid. BadRequest: strength out of its range, or a sampler that
            cannot start from a picture. IllegalSteps: strength leaves no step to do.
    """
    rule = SAMPLERS.get(stage.sampler.kind)
    if rule is None:
        kinds = ", ".join(SAMPLERS)
        raise BadManifest(f"stage {stage.name!r}: sampler {stage.sampler.kind!r} has no table; those with one: {kinds}")
    if strength is not None and not 0 < strength <= 1:
        raise BadRequest(f"strength is {strength}; it must be above 0 and at most 1")
    if strength is not None and not rule.from_image:
        raise BadRequest(f"sampler {stage.sampler.kind!r} cannot start from a picture; leave the image out")
    points = rule.points(stage.sampler, steps, 1.0 if strength is None else strength)
    try:
        path = rule.build(stage.sampler, points.values)
    except (ArithmeticError, ValueError) as why:  # a square root or quotient that the sampler's numbers do not allow
        raise BadManifest(f"stage {stage.name!r} does not compile for {steps} steps: {why}; check its sampler") from why
    keep, scale = (0.0, path.scale) if strength is None else path.levels[points.first]
    rows = tuple(tuple(map(float, row)) for row in path.rows[points.first :])
    if not all(math.isfinite(value) for row in rows for value in row):
        raise BadManifest(f"stage {stage.name!r} compiles to a coefficient that is not finite; check its sampler")
    return Table(stage=stage.name, steps=steps, init_scale=float(scale), rows=rows, init_keep=float(keep))


def compile_tables(recipe: Recipe) -> tuple[Table, ...]:
    """What a bundle ships: a table per stage and legal step count, from noise. Raises BadManifest."""
    return tuple(
        compile_stage(stage, steps)
        for stage in recipe.stages
        if stage.sampler.kind != "direct"
        for steps in stage.sampler.legal_steps
    )


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
