"""Trials in the shipped denoiser: both forms give what a rebuilt graph and the lowered graph give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.quant.choices import Choice, get_choice
from edgekit.quant.graph import Unit, find_units, load_graph, normalised
from edgekit.quant.lower import lower
from edgekit.quant.targets import TARGETS
from edgekit.quant.trial import TrialSession, open_trial
from edgekit.quant.weights import Stored, store
from tests.quant.trial_graphs import opened, ranges_on, rebuilt

pytestmark = [pytest.mark.torch, pytest.mark.slow]

CPU = TARGETS["cpu:any"]
Forms = dict[str, TrialSession]


def four_bits(matrix: np.ndarray, choice: Choice, code_bits: int, unit: Unit) -> Stored:
    """Whatever is asked for, four bits in blocks: a choice that every unit has, made one that every unit feels."""
    return store(matrix, get_choice("w4a16-32"))


@pytest.fixture
def model(emoji_bundle: Path) -> ir.Model:
    """The trained UNet's graph."""
    return normalised(load_graph(emoji_bundle / "graphs" / "unet.onnx"))


@pytest.fixture(scope="module")
def given() -> dict[str, np.ndarray]:
    """One request's inputs."""
    rng = np.random.default_rng(0)
    return {
        "sample": rng.standard_normal((1, 12, 32, 32), dtype=np.float32),
        "timestep": np.full(1, 500, np.float32),
        "encoder_hidden_states": rng.standard_normal((1, 16, 160), dtype=np.float32),
        "timestep_cond": rng.standard_normal((1, 64), dtype=np.float32),
    }


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def test_both_forms_are_the_rebuilt_unet(model: ir.Model, given: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Four-bit weights in one convolution, in one projection, in a random half and in all: equal to 1e-5."""
    units = find_units(model)
    assert len(units) > 90
    rng = np.random.default_rng(0)
    sets = [
        [next(unit for unit in units if unit.role == "conv" and unit.params > 100_000)],
        [next(unit for unit in units if unit.role == "ff_in")],
        [unit for unit in units if rng.random() < 0.5],
        list(units),
    ]
    plain = opened(model).run(given)["out_sample"]
    forms = [
        open_trial(model, units, {}, CPU, tmp_path, form=form, threads=1, store=four_bits)
        for form in ("override", "delta")
    ]
    for chosen in sets:
        mix = {unit.id: "fp16" for unit in chosen}
        wanted = rebuilt(model, units, mix, CPU, four_bits).run(given)["out_sample"]
        assert distance(wanted, plain) > 1e-4
        for session in forms:
            session.set(mix)
            assert distance(session.run(given)["out_sample"], wanted) < 1e-5


def test_both_forms_predict_the_lowered_unet(model: ir.Model, given: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Integers in one convolution or projection: the engine's operators differ by 2% of the effect at most."""
    units = find_units(model)
    ranges = ranges_on(model, units, [given])
    plain = opened(model).run(given)["out_sample"]
    forms = [open_trial(model, units, ranges, CPU, tmp_path, form=form, threads=1) for form in ("override", "delta")]
    conv = next(unit for unit in units if unit.role == "shortcut")
    query = next(unit for unit in units if unit.role == "attn_q")
    for unit, choice in ((conv, "w8a8"), (query, "w8a8"), (query, "w8a8-row"), (query, "w4a16-32")):
        lowered = model.clone()
        lower(lowered, find_units(lowered), {unit.id: choice}, ranges, CPU)
        wanted = opened(lowered).run(given)["out_sample"]
        for session in forms:
            session.set({unit.id: choice})
            missed = np.square(session.run(given)["out_sample"] - wanted).sum()
            assert missed < 0.02 * np.square(wanted - plain).sum(), (unit.id, choice)
