"""Mixed precision of a language model, from its bundle to a bundle: what is measured, resumed, rounded and written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.bundle.store import Bundle, new_bundle, read_bundle
from edgekit.export.language.export import export_language
from edgekit.quant.budget import Budget
from edgekit.quant.flow import measure_bundle
from edgekit.quant.graph import Unit, weight_matrix
from edgekit.quant.metrics import kl_mean
from edgekit.quant.mixed import Measured, MixedOptions, quantize
from edgekit.quant.prepare import rounder
from edgekit.quant.targets import get_target
from edgekit.quant.trial import open_trial
from edgekit.quant.trial_graph import input_name
from edgekit.quant.verify import Made, make
from edgekit.quant.weights import Stored, pack_nbits, restore, store
from edgekit.runtime.backends import open_session

ROOT = Path(__file__).resolve().parents[2]
TARGET = get_target("cpu:any")


class Told:
    """Writes down what is reported; gives up after some trials if it is to."""

    def __init__(self, most: float = np.inf) -> None:
        self.trials, self.most = 0, most

    def __call__(self, what: str, share: float) -> None:
        self.trials += "trying" in what
        if self.trials > self.most:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Case:
    """The draft model, a short text, and what was measured in two goes: one that was stopped, one that went on."""

    bundle: Bundle
    text: Path
    work: Path
    measured: Measured
    trials: tuple[int, int]

    def again(self, told: Told) -> Measured:
        return measure_bundle(self.bundle, TARGET, self.text, self.work, told, None, 1)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Everything is measured once, and stopped in between."""
    folder = tmp_path_factory.mktemp("flow-text")
    with new_bundle(folder / "x.bundle") as draft:
        draft.seal(export_language(ROOT / "models" / "pycode-draft", draft.root, dialect="ort", precision="fp32"))
    bundle, text, work = read_bundle(folder / "x.bundle"), folder / "text.py", folder / "work"
    text.write_text((ROOT / "edgekit" / "quant" / "texts.py").read_text()[:5000])
    first, second = Told(most=20), Told()
    with pytest.raises(KeyboardInterrupt):
        measure_bundle(bundle, TARGET, text, work, first, None, 1)
    measured = measure_bundle(bundle, TARGET, text, work, second, None, 1)
    return Case(bundle, text, work, measured, (first.trials, second.trials))


def unit_of(case: Case, role: str) -> Unit:
    return next(unit for unit in case.measured.parts[0].units if unit.role == role)


def test_a_stopped_measurement_goes_on(case: Case) -> None:
    """What was tried before the stop is not tried again, but for the unit that it was in; then nothing is."""
    (part,) = case.measured.parts
    wanted = sum(
        len([name for name in TARGET.allowed(unit) if name in case.measured.study.choices]) - 1 for unit in part.units
    )
    each = max(len(TARGET.allowed(unit)) for unit in part.units)
    assert wanted <= sum(case.trials) <= wanted + each
    told = Told()
    again = case.again(told)
    assert told.trials == 0
    np.testing.assert_array_equal(again.study.errors["kl"], case.measured.study.errors["kl"])


def test_activations_of_a_decoder_are_not_quantized_by_choice(case: Case) -> None:
    """What stands beside a token may not change its numbers; weights alone have choices."""
    assert case.measured.study.choices == ("fp32", "fp16", "w8a16", "w4a16-32", "w4a16-64", "w4a16-128", "w2a16-32")


def test_a_table_and_the_head_that_is_tied_to_it_are_one_row(case: Case) -> None:
    """One choice for both, and its bytes are those of one matrix."""
    study, table, head = case.measured.study, unit_of(case, "embedding"), unit_of(case, "lm_head")
    (row,) = [at for at, row in enumerate(study.rows) if head.id in row.units]
    assert study.rows[row].units == (table.id, head.id)
    assert len(study.rows) == len(case.measured.parts[0].units) - 1
    for column, name in enumerate(study.choices):
        assert study.bytes[row, column] == TARGET.choice(name).weight.bytes(4096, 128)
    stored = sum(file.bytes for file in case.bundle.manifest.files)
    assert study.fixed_bytes + study.bytes[:, 0].sum() == stored


def test_moments_of_every_product_are_files(case: Case) -> None:
    """Symmetric matrices, whose diagonals are the mean squares."""
    (part,) = case.measured.parts
    data = {unit.data: unit.k for unit in part.units if unit.op == "MatMul"}
    assert set(part.grams) == set(data)
    for name, file in part.grams.items():
        gram = np.load(file)
        assert gram.shape == (data[name], data[name])
        np.testing.assert_allclose(gram, gram.T, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(part.found.moments[name], gram.diagonal())


@pytest.mark.parametrize("role", ["attn_out", "ff_out", "lm_head", "embedding"])
def test_what_ships_is_what_was_tried(case: Case, role: str, tmp_path: Path) -> None:
    """GPTQ on the product's own inputs, in the trial as in the lowered graph; a tied table has the head's codes."""
    (part,) = case.measured.parts
    unit = unit_of(case, role)
    product = unit_of(case, "lm_head") if role == "embedding" else unit
    choice, matrix = TARGET.choice("w4a16-32"), weight_matrix(part.model(), unit)
    gram = np.load(part.grams[product.data])
    wanted = store(matrix, choice, importance=gram, rounding="gptq")
    assert not np.array_equal(wanted.codes, store(matrix, choice, importance=gram, rounding="search").codes)
    rounded = rounder(part)(matrix, choice, TARGET.code_bits, unit)
    np.testing.assert_array_equal(rounded.codes, wanted.codes)
    trial = open_trial(part.model(), part.units, {}, TARGET, tmp_path, threads=1, store=rounder(part))
    trial.set({unit.id: "w4a16-32"})
    fed = trial._feeds[unit.id][input_name(part.units.index(unit), "weight")]
    change = fed.T if unit.op == "MatMul" else fed
    np.testing.assert_array_equal(change, restore(wanted) - matrix)
    assert_stored(make(part, {unit.id: "w4a16-32"}, TARGET, tmp_path), wanted)


def assert_stored(made: Made, wanted: Stored) -> None:
    """The one matrix of codes in a graph."""
    initializers = ir.load(made.path).graph.initializers
    (codes,) = [value.const_value for name, value in initializers.items() if name.endswith(".codes")]
    assert codes is not None
    np.testing.assert_array_equal(codes.numpy(), pack_nbits(wanted))


def test_a_plan_fits_and_does_what_it_says(case: Case, tmp_path: Path) -> None:
    """At 5 bits a weight: within its bytes, codes of table and head stored once, its divergence near the prediction."""
    outcome = quantize(case.bundle, case.measured, MixedOptions(Budget(bits=5.0)), tmp_path, lambda what, share: None)
    study = case.measured.study
    (made,) = outcome.made
    pick = study.pick_of({"decoder": outcome.plan.parts["decoder"].units})
    assert study.bytes[np.arange(len(pick)), pick].sum() <= 5.0 / 8 * study.params
    chosen = set(outcome.plan.parts["decoder"].units.values())
    assert len(chosen) > 1
    graph = ir.load(made.path).graph
    assert sum(node.op_type == "GatherBlockQuantized" for node in graph) == 1
    products = sum(node.op_type == "MatMulNBits" for node in graph)
    assert sum(name.endswith(".codes") for name in graph.initializers) == products
    (error,) = outcome.plan.errors
    assert error.predicted is not None
    assert error.measured is not None
    assert 0.4 < error.measured / error.predicted < 2.5


def test_mixed_is_better_than_one_choice_of_its_size(case: Case, tmp_path: Path) -> None:
    """On text that nothing was chosen on."""
    study, held = case.measured.study, case.measured.held_out
    outcome = quantize(case.bundle, case.measured, MixedOptions(Budget(bits=5.2)), tmp_path, lambda what, share: None)
    (part,) = case.measured.parts
    uniform = make(part, {unit.id: "w4a16-32" for unit in part.units}, TARGET, tmp_path / "uniform")
    reference = held.run({})
    found = [
        np.mean([kl_mean(one, other) for one, other in zip(reference, held.run({"decoder": session}), strict=True)])
        for session in (open_session(each.path, threads=1) for each in (outcome.made[0], uniform))
    ]
    assert found[0] < 0.9 * found[1]
    assert study.target == "cpu:any"
