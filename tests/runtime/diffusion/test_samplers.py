"""Every sampler against the scheduler it stands for: live where diffusers is installed, and frozen everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.runtime.diffusion.tables import SAMPLERS, compile_stage
from tests.runtime.diffusion.cases import BOUND, CASES, GOLDEN, ours, stage


def off(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference, of max|b|."""
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    """The frozen samples, by case."""
    with np.load(GOLDEN) as stored:
        return dict(zip(stored["names"].tolist(), stored["samples"], strict=True))


def test_every_sampler_has_cases_and_every_case_is_frozen(golden: dict[str, np.ndarray]) -> None:
    """A sampler cannot enter the table without a reference, nor a case the list without its vector."""
    assert {case.sampler.kind for case in CASES.values()} == set(SAMPLERS)
    assert set(golden) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_table_draws_what_the_scheduler_drew(name: str, golden: dict[str, np.ndarray]) -> None:
    """Against the frozen vectors: this needs neither torch nor diffusers."""
    assert off(ours(CASES[name]), golden[name]) <= CASES[name].bound


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
@pytest.mark.parametrize("name", CASES)
def test_the_scheduler_still_draws_it(name: str, golden: dict[str, np.ndarray]) -> None:
    """The installed diffusers gives the frozen vectors, visits our timesteps to the last bit, and agrees with us."""
    pytest.importorskip("diffusers")
    from tests.runtime.diffusion.reference import reference

    case = CASES[name]
    drawn, timesteps = reference(case)
    table = compile_stage(stage(case.sampler), case.steps, case.strength)
    assert off(drawn, golden[name]) <= min(BOUND, case.bound)
    assert [row[0] for row in table.rows] == timesteps
    assert off(ours(case), drawn) <= case.bound
