"""What every builder writes, and how a network's output gives the clean sample and the noise."""

from __future__ import annotations

from typing import NamedTuple

from edgekit.errors import BadManifest

Level = tuple[float, float]  # (keep, add): a sample at this noise level is keep * x_0 + add * noise


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
    """All rows of a grid, and the noise level of the sample each of them is given.

    `scale` is what unit noise is multiplied with where a sample starts from noise alone. `rows_per_point` is 2 for
    solvers that ask the network twice from point to point.
    """

    rows: list[Row]
    levels: list[Level]
    scale: float = 1.0
    rows_per_point: int = 1


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


def insist(kind: str, prediction: str, *known: str) -> None:
    """Refuse a prediction type that a sampler is not written for. Raises BadManifest."""
    if prediction not in known:
        names = " or ".join(f"`{name}`" for name in known)
        raise BadManifest(f"sampler {kind!r} needs prediction {names}, not {prediction!r}")
