"""Frames and poses: the geodesic law, exact solutions of the flow, invariants of a molecule, slow twins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import BadRequest
from edgekit.runtime.diffusion.rigid import (
    Frames,
    Pull,
    euler_rigid,
    lay_on,
    move_pose,
    random_frames,
    score_pose,
    slerp,
    turning,
)
from edgekit.runtime.random import PhiloxNoise
from tests.runtime.diffusion.cases import LAW

BATCH, COUNT = 3, 7


def quaternions(seed: int, shape: tuple[int, ...] = (BATCH, COUNT)) -> np.ndarray:
    q = np.random.default_rng(seed).standard_normal((*shape, 4))
    return q / np.linalg.norm(q, axis=-1, keepdims=True)


def angle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The angle of the rotation between two quaternions, accurate near 0 and near pi."""
    sign = np.where((a * b).sum(-1, keepdims=True) < 0, -1, 1)
    return 4 * np.arctan2(np.linalg.norm(a - sign * b, axis=-1), np.linalg.norm(a + sign * b, axis=-1))


def matrices(q: np.ndarray) -> np.ndarray:
    """Rotation matrices by turning the three axes, q v q*, one by one."""
    w, v = q[..., :1], q[..., 1:]
    turned = [e + 2 * w * np.cross(v, e) + 2 * np.cross(v, np.cross(v, e)) for e in np.eye(3)]
    return np.stack(turned, -1)


# ------------------------------------------------------------------------------------------------------- slerp


@LAW
@given(
    st.integers(0, 10**6), st.floats(0, 1), st.sampled_from([1.0, 1e-2, 3e-4, 1e-5, 1e-8, 1e-12, 0.0]), st.booleans()
)
def test_slerp_goes_a_share_of_the_geodesic(seed: int, share: float, near: float, flipped: bool) -> None:
    """It turns by the share of the angle, leaves the rest of it, and stays of unit length, however near the target."""
    a, b = quaternions(seed, (5,)), quaternions(seed + 1, (5,))
    b = a + near * b if near < 1 else b
    b = (-1 if flipped else 1) * b / np.linalg.norm(b, axis=-1, keepdims=True)
    between = slerp(a, b, share)
    whole = angle(a, b)
    assert np.abs(angle(a, between) - share * whole).max() < 1e-14
    assert np.abs(angle(between, b) - (1 - share) * whole).max() < 1e-14
    assert np.abs(np.linalg.norm(between, axis=-1) - 1).max() < 1e-15


@LAW
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_slerp_turns_about_one_axis(seed: int, share: float) -> None:
    """It is the rotation by a share of the angle about the axis from one to the other, as matrices compute it."""
    a, b = quaternions(seed, ()), quaternions(seed + 1, ())
    relative = matrices(b) @ matrices(a).T
    whole = angle(a, b)
    axis = np.array([relative[2, 1] - relative[1, 2], relative[0, 2] - relative[2, 0], relative[1, 0] - relative[0, 1]])
    axis /= np.linalg.norm(axis)
    wanted = turning(share * whole * axis) @ matrices(a)
    assert np.abs(matrices(slerp(a, b, share)) - wanted).max() < 1e-9  # the axis loses digits near a half turn


def test_slerp_reaches_both_ends() -> None:
    """Share 0 is where it starts and share 1 the target, as rotations."""
    a, b = quaternions(1), quaternions(2)
    assert angle(slerp(a, b, 0), a).max() < 1e-15
    assert angle(slerp(a, b, 1), b).max() < 1e-15


# ------------------------------------------------------------------------------------------------------ frames


def drift(frames: Frames, t: float) -> Frames:
    """A network whose clean frames move with time and state; its quaternions are not of unit length."""
    q = 2.0 * frames.quaternions + np.array([1, t, 0, 0.5])
    return Frames((np.sin(frames.translations) + t).astype(np.float32), q.astype(np.float32))


@pytest.mark.parametrize(("rotation", "steps"), [("exponential", 4), ("exponential", 21), ("linear", 8), ("linear", 1)])
def test_frames_move_as_the_rule_says(rotation: Any, steps: int) -> None:
    """Row by row against the formulas with matrices and rotation vectors, in float64."""
    start = random_frames(PhiloxNoise(3), BATCH, COUNT, 10.0)
    x, r = start.translations.astype(np.float64), matrices(start.quaternions.astype(np.float64))
    times = np.linspace(0.01, 1, steps)
    rows = list(euler_rigid(start, drift, steps=steps, rotation=rotation, rate=8.0))
    assert len(rows) == steps
    state = start
    for i, (after, clean) in enumerate(rows):
        target = drift(state, float(times[i]))
        assert np.abs(clean.translations - target.translations).max() == 0
        unit = target.quaternions / np.linalg.norm(target.quaternions, axis=-1, keepdims=True)
        assert np.abs(clean.quaternions - unit).max() < 1e-6
        if i + 1 == steps:
            assert after is clean
            break
        dt = times[i + 1] - times[i]
        x = x + (target.translations - x) / (1 - times[i]) * dt
        share = min(1, 8.0 * dt) if rotation == "exponential" else dt / (1 - times[i])
        relative = matrices(unit.astype(np.float64)) @ r.swapaxes(-1, -2)
        half = 0.5 * angle(state.quaternions.astype(np.float64), unit.astype(np.float64))[..., None]
        skew = np.stack([relative[..., a, b] - relative[..., b, a] for a, b in ((2, 1), (0, 2), (1, 0))], -1)
        r = turning(share * 2 * half * skew / np.linalg.norm(skew, axis=-1, keepdims=True)) @ r
        assert np.abs(after.translations - x).max() < 1e-4
        assert np.abs(matrices(after.quaternions.astype(np.float64)) - r).max() < 1e-4
        state = after


@pytest.mark.parametrize("steps", [2, 3, 10, 50])
def test_a_straight_flow_arrives_for_any_step_count(steps: int) -> None:
    """With a network that knows the answer, the path is the straight line and the geodesic at every time."""
    start = random_frames(PhiloxNoise(3), BATCH, COUNT, 10.0)
    goal = Frames(np.ones((BATCH, COUNT, 3), np.float32), quaternions(5).astype(np.float32))
    rows = list(euler_rigid(start, lambda frames, t: goal, steps=steps, min_t=0.0, rotation="linear"))
    whole = angle(start.quaternions.astype(np.float64), goal.quaternions.astype(np.float64))
    for t, (state, _) in zip(np.linspace(0, 1, steps)[1:], rows, strict=False):
        assert np.abs(state.translations - (1 - t) * start.translations - t).max() < 1e-5
        turned = angle(start.quaternions.astype(np.float64), state.quaternions.astype(np.float64))
        assert np.abs(turned - t * whole).max() < 1e-5
    assert np.array_equal(rows[-1][0].translations, goal.translations)


def test_the_exponential_schedule_decays() -> None:
    """The angle left shrinks by 1 - rate dt a row, and a share above 1 ends on the target, not behind it."""
    start = random_frames(PhiloxNoise(3), BATCH, COUNT, 10.0)
    goal = Frames(start.translations, quaternions(5).astype(np.float32))

    def left(steps: int, rate: float) -> list[float]:
        rows = euler_rigid(start, lambda frames, t: goal, steps=steps, min_t=0.0, rate=rate)
        return [float(angle(f.quaternions.astype(np.float64), goal.quaternions).max()) for f, _ in rows]

    whole = angle(start.quaternions.astype(np.float64), goal.quaternions).max()
    assert left(21, 10.0)[:5] == pytest.approx([whole * 0.5 ** (i + 1) for i in range(5)], abs=1e-6)
    assert left(4, 10.0)[0] < 1e-6


def test_random_frames_are_centred_and_evenly_turned() -> None:
    """Translations are centred and spread by the scale; rotation matrices have the first two moments of even ones."""
    frames = random_frames(PhiloxNoise(1), 4, 5000, 10.0)
    assert np.abs(frames.translations.mean(1)).max() < 1e-4
    assert frames.translations.std() == pytest.approx(10, rel=0.02)
    r = matrices(frames.quaternions.reshape(-1, 4).astype(np.float64))
    assert np.abs(r.mean(0)).max() < 5 * np.sqrt(1 / 3 / len(r))
    assert np.abs((r**2).mean(0) - 1 / 3).max() < 5 * np.sqrt(4 / 45 / len(r))


def test_a_chain_is_the_same_alone_and_in_a_batch() -> None:
    """Start and every row of chain 2 are those of the batch of one that starts at 2."""
    together, alone = (random_frames(PhiloxNoise(8, first), n, COUNT, 10.0) for n, first in ((3, 0), (1, 2)))
    assert np.array_equal(together.translations[2:], alone.translations)
    rows = zip(euler_rigid(together, drift, steps=5), euler_rigid(alone, drift, steps=5), strict=True)
    for (state, _), (one, _) in rows:
        assert np.array_equal(state.translations[2:], one.translations)
        assert np.array_equal(state.quaternions[2:], one.quaternions)
    assert not np.array_equal(state.translations[0], state.translations[2])


# ------------------------------------------------------------------------------------------------------- poses

# A zigzag of six atoms with a branch: bonds 1-2 and 2-3 turn what stands behind them.
ATOMS = np.array([[0, 0, 0], [1.5, 0, 0.1], [2, 1.4, 0], [3.5, 1.5, 0.4], [4, 2.9, 0], [3.9, 0.4, 1.2]], np.float32)
BONDS = np.array([[1, 2], [2, 3]])
TURNED = np.array([[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]], np.bool_)
SIGMAS = {"sigma_min": (0.1, 0.03, 0.0314), "sigma_max": (19.0, 1.55, 3.14)}
Z = np.random.default_rng(0).standard_normal


def sides() -> list[tuple[int, int, np.ndarray]]:
    return [(1, 2, TURNED[0]), (2, 3, TURNED[1])]


def distances(x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(x[:, :, None] - x[:, None], axis=-1)


def dihedral(x: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """The torsion angle of four atoms (IUPAC sign), by the two-argument arctangent."""
    p, q, r = x[:, b] - x[:, a], x[:, c] - x[:, b], x[:, d] - x[:, c]
    n, m = np.cross(p, q), np.cross(q, r)
    return np.arctan2((np.cross(n, m) * q).sum(-1) / np.linalg.norm(q, axis=-1), (n * m).sum(-1))


def test_turning_is_the_matrix_exponential() -> None:
    """Rodrigues' formula against the power series of the exponential of a cross product, tiny angles included."""
    for size in (3.0, 1e-3, 1e-9, 0.0):
        v = size * np.array([0.36, -0.48, 0.8])
        cross, series, term = np.cross(v, np.eye(3)).T, np.eye(3), np.eye(3)
        for k in range(1, 40):
            term = term @ cross / k
            series = series + term
        assert np.abs(turning(v) - series).max() < 1e-14


@LAW
@given(st.integers(0, 10**6), st.floats(-3, 3), st.floats(-3, 3))
def test_torsions_turn_their_angles_and_nothing_else(seed: int, first: float, second: float) -> None:
    """Bonded distances stay, each dihedral changes by its angle, and the molecule is laid back where it was."""
    move = Pull(np.zeros((1, 3)), np.zeros((1, 3)), np.array([[first, second]]))
    x = ATOMS[None] + 0.2 * np.random.default_rng(seed).standard_normal((1, 6, 3))
    y = move_pose(x, move, sides())
    for a, b in ((0, 1), (1, 2), (2, 3), (3, 4), (3, 5), (0, 2), (1, 3), (4, 5)):
        assert distances(y)[0, a, b] == pytest.approx(distances(x)[0, a, b], abs=1e-10)
    for atoms, given_ in (((0, 1, 2, 3), first), ((1, 2, 3, 4), second)):
        change = dihedral(y, *atoms) - dihedral(x, *atoms) + given_  # about the axis v -> u: the IUPAC sign is opposite
        assert np.abs(np.sin(change / 2)).max() < 1e-10
    assert np.abs(y.mean(1) - x.mean(1)).max() < 1e-10
    pull = (y - y.mean(1))[0].T @ (x - x.mean(1))[0]  # symmetric where no rotation brings them nearer
    assert np.abs(pull - pull.T).max() < 1e-8


def test_a_rigid_move_is_rigid() -> None:
    """Without bonds a pose turns about its centre and then shifts."""
    shift, turn = Z((4, 3)), Z((4, 3))
    x = np.repeat(ATOMS[None], 4, 0).astype(np.float64)
    y = move_pose(x, Pull(shift, turn, np.zeros((4, 0))), [])
    assert np.abs(distances(y) - distances(x)).max() < 1e-12
    assert np.abs(y.mean(1) - x.mean(1) - shift).max() < 1e-12
    for k in range(4):
        arms = [turning(turn[k]) @ (atom - x[k].mean(0)) for atom in x[k]]
        assert np.abs(y[k] - y[k].mean(0) - np.array(arms)).max() < 1e-12


def test_laying_on_undoes_any_motion_and_never_mirrors() -> None:
    """A moved copy comes back exactly; a mirrored one stays mirrored, at a distance."""
    x = ATOMS[None].astype(np.float64)
    moved = x @ turning(Z((1, 3))).swapaxes(-1, -2) + Z((1, 1, 3))
    assert np.abs(lay_on(moved, x) - x).max() < 1e-12
    assert np.abs(lay_on(x * [1, 1, -1], x) - x).max() > 0.1
    assert np.abs(distances(lay_on(x * [1, 1, -1], x)) - distances(x)).max() < 1e-12


def pulls(positions: np.ndarray, t: float) -> Pull:
    """Scores that depend on the pose and the time."""
    centre = positions.mean(1)
    return Pull(-centre / 9, np.sin(positions[:, 0]) * t, np.cos(positions[:, :2, 0]))


@pytest.mark.parametrize("temperature", [(1.0, 1.0, 1.0), (1.17, 2.06, 7.04)])
def test_poses_move_as_diffdock_says(temperature: tuple[float, float, float]) -> None:
    """Nineteen of twenty rows against the formulas one number at a time; the last row adds no noise."""
    psi = (0.0, 0.0, 0.0) if temperature[0] == 1 else (0.73, 0.9, 0.59)
    share = (0.93, 0.75, 0.69)
    start = ATOMS[None] + np.float32(5)
    settings = {**SIGMAS, "temperature": temperature, "psi": psi, "sigma_data": share}
    rows = list(score_pose(start, pulls, PhiloxNoise(4), bonds=BONDS, turned=TURNED, steps=20, rows=19, **settings))
    assert len(rows) == 19
    x = start
    for i, (after, _) in enumerate(rows):
        t, z, moves = 1 - i / 20, PhiloxNoise(4).normal((1, 8), 1 + i)[0] * (i < 18), []
        units = (z[:3], z[3:6], z[6:])
        for k, score in enumerate(pulls(x, t)):
            low, high = SIGMAS["sigma_min"][k], SIGMAS["sigma_max"][k]
            sigma = low ** (1 - t) * high**t
            g = sigma * np.sqrt(2 * np.log(high / low))
            data = np.exp(share[k] * np.log(high) + (1 - share[k]) * np.log(low))
            colder = (data + sigma) / (data + sigma / temperature[k])
            pull = g**2 / 20 * (colder + temperature[k] * psi[k] / 2) * score[0]
            moves.append((pull + g * np.sqrt((1 + psi[k]) / 20) * units[k])[None])
        x = move_pose(x, Pull(*moves), sides()).astype(np.float32)
        assert np.abs(after - x).max() < 1e-4
        x = after


def test_the_reverse_diffusion_finds_its_data() -> None:
    """With the exact score of a place spread by 1 about a point, two thousand poses end with that mean and spread."""

    def exact(positions: np.ndarray, t: float) -> Pull:
        sigma = 0.1 ** (1 - t) * 19**t
        still = np.zeros((len(positions), 3))
        return Pull((np.array([3, -2, 1]) - positions.mean(1)) / (1 + sigma**2), still, still[:, :0])

    class Plain:
        """numpy's normals, which are faster for thousands of images."""

        def normal(self, shape: Sequence[int], draw: int) -> np.ndarray:
            return np.random.default_rng((1, draw)).standard_normal(shape, np.float32)

    start = ATOMS[None] + 19 * Plain().normal((2000, 1, 3), 0)
    empty: dict[str, Any] = {"bonds": np.zeros((0, 2), np.int64), "turned": np.zeros((0, 6), np.bool_)}
    (*_, (x, _)) = score_pose(start, exact, Plain(), steps=200, **empty, **SIGMAS)
    assert x.mean((0, 1)) == pytest.approx([3, -2, 1], abs=0.12)
    assert x.mean(1).std(0) == pytest.approx([1, 1, 1], rel=0.06)


def test_a_pose_is_the_same_alone_and_in_a_batch() -> None:
    """Pose 2 of a batch is the batch of one that starts at 2, after every row."""
    settings: dict[str, Any] = {"bonds": BONDS, "turned": TURNED, "steps": 4, **SIGMAS}
    start = ATOMS[None] + np.zeros((3, 1, 1), np.float32)
    together, alone = (
        score_pose(start, pulls, PhiloxNoise(6), **settings),
        score_pose(start[2:], pulls, PhiloxNoise(6, 2), **settings),
    )
    for (state, _), (one, _) in zip(together, alone, strict=True):
        assert np.abs(state[2:] - one).max() < 1e-5  # LAPACK and BLAS may round a batch otherwise
    assert np.abs(state[0] - state[2]).max() > 0.1


@pytest.mark.parametrize(
    ("kernel", "change", "words"),
    [
        ("frames", {"steps": 0}, "steps"),
        ("frames", {"min_t": 1.0}, "min_t"),
        ("frames", {"rotation": "wild"}, "rotation"),
        ("frames", {"rate": 0.0}, "rate"),
        ("pose", {"turned": TURNED[:1]}, "turned"),
        ("pose", {"turned": ~TURNED}, "false at its first"),
        ("pose", {"rows": 5}, "rows"),
        ("pose", {"sigma_min": (0.0, 1, 1)}, "sigma_min"),
        ("pose", {"sigma_max": (0.05, 2, 3)}, "sigma_max"),
        ("pose", {"temperature": (1, 0, 1)}, "temperature"),
        ("pose", {"psi": (0, 0, -1)}, "psi"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(kernel: str, change: dict[str, Any], words: str) -> None:
    """At the call, before any row."""
    pose: dict[str, Any] = {"bonds": BONDS, "turned": TURNED, "steps": 4, **SIGMAS, **change}
    frames: dict[str, Any] = {"steps": 4, **change}

    call = {
        "frames": lambda: euler_rigid(random_frames(PhiloxNoise(0), 1, 2, 1.0), drift, **frames),
        "pose": lambda: score_pose(ATOMS[None], pulls, PhiloxNoise(0), **pose),
    }[kernel]
    with pytest.raises(BadRequest, match=words):
        call()
