"""Every sampler against the reference it stands for: live where diffusers is installed, and frozen everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.runtime.diffusion.tables import SAMPLERS, compile_stage
from tests.runtime.diffusion.cases import BOUND, CANCELLING, GOLDEN, ours, stage
from tests.runtime.diffusion.closed_forms import CLOSED_FORMS, closed_form, exact
from tests.runtime.diffusion.sampler_cases import CASES

CLOSED = [name for name, case in CASES.items() if case.scheduler in CLOSED_FORMS]
SCHEDULED = [name for name in CASES if name not in CLOSED]


def off(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference, of max|b|."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def times(name: str) -> list[float]:
    """What our table tells the network."""
    case = CASES[name]
    return [row[0] for row in compile_stage(stage(case.sampler, case.init), case.steps, case.strength).rows]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    """The frozen samples, by case."""
    with np.load(GOLDEN) as stored:
        return dict(zip(stored["names"].tolist(), stored["samples"], strict=True))


def test_every_sampler_has_cases_and_every_case_is_frozen(golden: dict[str, np.ndarray]) -> None:
    """A sampler cannot enter the table without a reference, nor a case the list without its vector."""
    assert {case.sampler.kind for case in CASES.values()} == set(SAMPLERS)
    assert {CASES[name].scheduler for name in CLOSED} == set(CLOSED_FORMS)
    assert set(golden) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_table_draws_what_the_reference_drew(name: str, golden: dict[str, np.ndarray]) -> None:
    """Against the frozen vectors: this needs neither torch nor diffusers."""
    assert off(ours(CASES[name]), golden[name]) <= CASES[name].bound


@pytest.mark.parametrize("name", CLOSED)
def test_the_closed_form_still_draws_it(name: str, golden: dict[str, np.ndarray]) -> None:
    """Where diffusers has no class, the authors' formulas in float64 give the vectors and are told the same times."""
    drawn, told = closed_form(CASES[name])
    assert off(drawn, golden[name]) <= BOUND
    assert times(name) == pytest.approx(told, rel=1e-6)


@pytest.mark.parametrize("name", CANCELLING)
def test_where_a_scheduler_loses_digits_the_table_does_not(name: str) -> None:
    """A wider bound is for the scheduler's own rounding: its formulas in float64 are within the usual bound of ours."""
    assert off(ours(CASES[name]), exact(CASES[name])) <= BOUND


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
@pytest.mark.parametrize("name", SCHEDULED)
def test_the_scheduler_still_draws_it(name: str, golden: dict[str, np.ndarray]) -> None:
    """The installed diffusers gives the frozen vectors, visits our timesteps to the last bit, and agrees with us."""
    pytest.importorskip("diffusers")
    from tests.runtime.diffusion.reference import reference

    case = CASES[name]
    drawn, timesteps = reference(case)
    assert off(drawn, golden[name]) <= case.bound
    assert np.array_equal(np.float32(times(name)), np.float32(timesteps))  # a network is told float32
    assert off(ours(case), drawn) <= case.bound
