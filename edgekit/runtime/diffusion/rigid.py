"""Runners of rigid bodies: frames of a chain along a flow, and a flexible molecule along a reverse diffusion.

Quaternions are (w, x, y, z), of unit length; q and -q are the same rotation. Arithmetic is float64, states are float32.
A kernel yields after each row. Settings are checked when a kernel is called, before its first row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from edgekit.runtime.diffusion.tokens import require
from edgekit.runtime.random import NoiseSource

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Triple = tuple[float, float, float]
Ends = tuple[float, float]


class Frames(NamedTuple):
    """Rigid frames: where they are (batch, n, 3), and how they are turned (batch, n, 4)."""

    translations: F32
    quaternions: F32


class Pull(NamedTuple):
    """Scores of a pose: of its place (batch, 3), its orientation as a rotation vector (batch, 3), its torsions."""

    translation: F32
    rotation: F32
    torsion: F32  # (batch, bonds)


FrameNet = Callable[[Frames, float], Frames]
PoseNet = Callable[[F32, float], Pull]


def random_frames(noise: NoiseSource, batch: int, count: int, scale: float) -> Frames:
    """The start of a chain: centred normal translations times `scale`, and evenly random rotations; draw 0."""
    z = noise.normal((batch, count, 7), 0).astype(np.float64)
    places = scale * (z[..., :3] - z[..., :3].mean(1, keepdims=True))
    turns = z[..., 3:] / np.linalg.norm(z[..., 3:], axis=-1, keepdims=True)
    return Frames(places.astype(np.float32), turns.astype(np.float32))


def slerp(q: npt.ArrayLike, target: npt.ArrayLike, share: float) -> F64:
    """The rotation a share of the way along the geodesic from q to target (Shoemake 1985); quaternions (..., 4)."""
    a, b = np.asarray(q, np.float64), np.asarray(target, np.float64)
    b = np.where((a * b).sum(-1, keepdims=True) < 0, -b, b)  # of b and -b the nearer one
    far, near = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (b - a, b + a))
    half = 2 * np.arctan2(far, near)  # the angle between a and b, exact where its cosine is flat
    # sin(s h) / sin(h) goes to s where h goes to 0
    sine = np.where(half < 1e-9, 1.0, np.sin(half))
    back, ahead = (np.where(half < 1e-9, s, np.sin(s * half) / sine) for s in (1 - share, share))
    mixed = back * a + ahead * b
    unit: F64 = mixed / np.linalg.norm(mixed, axis=-1, keepdims=True)
    return unit


def euler_rigid(
    frames: Frames,
    net: FrameNet,
    *,
    steps: int,
    min_t: float = 0.01,
    rotation: Literal["exponential", "linear"] = "exponential",
    rate: float = 10.0,
) -> Iterator[tuple[Frames, Frames]]:
    """Euler steps of flow matching on frames (FrameFlow, Yim et al. 2023, sec. 3; ReQFlow, Yue et al. 2025).

    Time runs from min_t to 1 in steps - 1 rows, x' = x + (x1 - x) dt / (1 - t), and the rotation goes a share of its
    geodesic to the predicted one: rate dt on the exponential schedule, dt / (1 - t) on the linear one. One more call
    at t = 1 (at min_t, if it is the only one) gives the answer. A share above 1 stops at the predicted rotation, where
    the reference code, made for a hundred steps and more, swings past it.

    Args:
        frames: the start (`random_frames`).
        net: (frames, t) to the clean frames, whose quaternions need not be of unit length.
        steps: calls of the network.
        min_t: the first time.
        rotation, rate: schedule of the rotations.

    Raises:
        BadRequest: a setting out of its range.
    """
    require(
        steps=(steps, steps > 0, "at least 1"),
        min_t=(min_t, 0 <= min_t < 1, "at least 0 and below 1"),
        rotation=(rotation, rotation in ("exponential", "linear"), "exponential or linear"),
        rate=(rate, rate > 0, "above 0"),
    )

    def rows() -> Iterator[tuple[Frames, Frames]]:
        state, times = frames, np.linspace(min_t, 1, steps).tolist()
        for t, then in pairwise(times):
            clean = _unit(net(state, t))
            share = (then - t) / (1 - t)
            turn = share if rotation == "linear" else min(1.0, rate * (then - t))
            x = state.translations.astype(np.float64)
            x += (clean.translations - x) * share
            turned = slerp(state.quaternions, clean.quaternions, turn)
            state = Frames(x.astype(np.float32), turned.astype(np.float32))
            yield state, clean
        clean = _unit(net(state, times[-1]))
        yield clean, clean

    return rows()


def _unit(frames: Frames) -> Frames:
    q = frames.quaternions.astype(np.float64)
    return Frames(frames.translations, (q / np.linalg.norm(q, axis=-1, keepdims=True)).astype(np.float32))


def score_pose(
    positions: F32,
    net: PoseNet,
    noise: NoiseSource,
    *,
    bonds: npt.NDArray[np.int64],
    turned: npt.NDArray[np.bool_],
    steps: int,
    sigma_min: Triple,
    sigma_max: Triple,
    temperature: Triple = (1.0, 1.0, 1.0),
    psi: Triple = (0.0, 0.0, 0.0),
    sigma_data: Triple = (0.5, 0.5, 0.5),
    rows: int | None = None,
    last_noise: bool = False,
) -> Iterator[tuple[F32, F32]]:
    """Reverse diffusion of a ligand's pose (DiffDock, Corso et al. 2023, alg. 2): place, orientation, torsions.

    Each part has its own sigma(t) = sigma_min^(1-t) sigma_max^t, with g^2 = 2 sigma^2 ln(sigma_max / sigma_min); time
    falls evenly from 1 to 0. A row moves a part by g^2 dt (lambda + T psi / 2) score + g sqrt(dt (1 + psi)) z, with
    lambda = (D + sigma) / (D + sigma / T) and D = sigma_max^d sigma_min^(1-d): low-temperature sampling (Ketata et
    al. 2023, sec. 4), which at T = 1, psi = 0 is the plain reverse SDE. All triples are (place, orientation, torsion).

    Args:
        positions: atoms (batch, atoms, 3), the start: random in place, orientation and torsions.
        net: (positions, t) to scores.
        noise: asked at draw 1 + row for (batch, 6 + bonds): three for place, three for orientation, the torsions.
        bonds: (bonds, 2) atoms u, v of each rotatable bond; v is on the side that turns.
        turned: (bonds, atoms), whether an atom is on that side.
        steps: rows the time is divided into.
        sigma_min, sigma_max: per part; angles in radians.
        temperature, psi, sigma_data: T, psi and d above, per part.
        rows: stop after so many (DiffDock takes 19 of 20); None: all.
        last_noise: whether the last row adds noise.

    Yields:
        after each row, the positions twice: the network gives scores, no clean estimate.

    Raises:
        BadRequest: a setting out of its range, or bonds and sides that do not fit together.
    """
    count, atoms = len(bonds), positions.shape[1]
    rows = steps if rows is None else rows
    fits = turned.shape == (count, atoms) and all(not turned[i, u] and turned[i, v] for i, (u, v) in enumerate(bonds))
    require(
        turned=(
            turned.shape,
            fits,
            f"({count}, {atoms}) flags, of each bond false at its first atom, true at its last",
        ),
        steps=(steps, steps > 0, "at least 1"),
        rows=(rows, 0 < rows <= steps, f"between 1 and {steps}, the steps"),
        sigma_min=(sigma_min, min(sigma_min) > 0, "above 0"),
        sigma_max=(sigma_max, all(a < b for a, b in zip(sigma_min, sigma_max, strict=True)), "above sigma_min"),
        temperature=(temperature, min(temperature) > 0, "above 0"),
        psi=(psi, min(psi) >= 0, "at least 0"),
    )
    return _poses(
        positions,
        net,
        noise,
        [(bond[0], bond[1], side) for bond, side in zip(bonds.tolist(), turned, strict=True)],
        [_Part(*part) for part in zip(sigma_min, sigma_max, temperature, psi, sigma_data, strict=True)],
        np.linspace(1, 0, steps + 1).tolist()[: rows + 1],
        last_noise,
    )


class _Part(NamedTuple):
    """One part of a pose and how it is moved."""

    sigma_min: float
    sigma_max: float
    temperature: float
    psi: float
    sigma_data: float

    def weights(self, t: float, dt: float) -> tuple[float, float]:
        """What multiplies the score, and the unit noise."""
        low, high = self.sigma_min, self.sigma_max
        sigma, data = low ** (1 - t) * high**t, high**self.sigma_data * low ** (1 - self.sigma_data)
        g2 = 2 * sigma**2 * np.log(high / low)
        colder = (data + sigma) / (data + sigma / self.temperature)
        drift = g2 * dt * (colder + self.temperature * self.psi / 2)
        return float(drift), float(np.sqrt(g2 * dt * (1 + self.psi)))


def _poses(
    positions: F32,
    net: PoseNet,
    noise: NoiseSource,
    bonds: list[tuple[int, int, npt.NDArray[np.bool_]]],
    parts: list[_Part],
    times: list[float],
    last_noise: bool,
) -> Iterator[tuple[F32, F32]]:
    for row, (t, then) in enumerate(pairwise(times)):
        scores = net(positions, t)
        z = noise.normal((len(positions), 6 + len(bonds)), 1 + row)
        keep = 1.0 if last_noise or row + 2 < len(times) else 0.0
        moves = []
        for part, score, unit in zip(parts, scores, (z[:, :3], z[:, 3:6], z[:, 6:]), strict=True):
            pull, spread = part.weights(t, t - then)
            moves.append(pull * score.astype(np.float64) + keep * spread * unit)
        positions = move_pose(positions, Pull(*moves), bonds).astype(np.float32)
        yield positions, positions


def move_pose(positions: npt.ArrayLike, move: Pull, bonds: list[tuple[int, int, npt.NDArray[np.bool_]]]) -> F64:
    """Turn a molecule (batch, atoms, 3) about its centre, shift it, and turn its bonds (DiffDock, sec. 4.1, app. A).

    After the torsions the molecule is laid back (RMSD alignment) on what it was before them, so that they turn nothing
    as a whole. A positive angle turns v's side right-handedly about the axis from v to u.
    """
    x = np.asarray(positions, np.float64)
    centre = x.mean(1, keepdims=True)
    stiff = (x - centre) @ turning(move.rotation).swapaxes(-1, -2) + centre + move.translation[:, None]
    bent = stiff.copy()
    for angle, (u, v, side) in zip(np.asarray(move.torsion, np.float64).T, bonds, strict=True):
        axis = bent[:, u] - bent[:, v]
        axis /= np.linalg.norm(axis, axis=-1, keepdims=True)
        arm = bent[:, side] - bent[:, v, None]
        bent[:, side] = arm @ turning(axis * angle[:, None]).swapaxes(-1, -2) + bent[:, v, None]
    return lay_on(bent, stiff) if bonds else stiff


def turning(vectors: npt.ArrayLike) -> F64:
    """Rotation vectors (..., 3) to matrices (..., 3, 3), by Rodrigues' formula."""
    v = np.asarray(vectors, np.float64)
    angle = np.linalg.norm(v, axis=-1)[..., None, None]
    cross = np.zeros((*v.shape, 3))
    cross[..., (2, 0, 1), (1, 2, 0)], cross[..., (1, 2, 0), (2, 0, 1)] = v, -v
    # sinc, which is 1 at 0: sin(a) / a, and (1 - cos(a)) / a^2 as half the square of that of a / 2
    matrix: F64 = np.eye(3) + np.sinc(angle / np.pi) * cross + 0.5 * np.sinc(angle / (2 * np.pi)) ** 2 * (cross @ cross)
    return matrix


def lay_on(moving: F64, fixed: F64) -> F64:
    """The rigid motion of `moving` (batch, atoms, 3) that comes nearest to `fixed` in RMSD (Kabsch 1976)."""
    here, there = moving.mean(1, keepdims=True), fixed.mean(1, keepdims=True)
    u, _, vt = np.linalg.svd((moving - here).swapaxes(-1, -2) @ (fixed - there))
    vt[:, 2] *= np.sign(np.linalg.det(u @ vt))[:, None]  # a rotation, never a reflection
    laid: F64 = (moving - here) @ u @ vt + there
    return laid
