"""A plan as graphs: lowered, run on held-out requests, timed beside the floats, and judged on every condition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgekit.errors import PlanRefused
from edgekit.quant.choices import CHOICES
from edgekit.quant.mixed import Measured
from edgekit.quant.prepare import Prepared
from edgekit.quant.targets import TARGETS
from edgekit.quant.verify import CAPS, SLOWER, Made, Verified, held_out_error, judge, make, time_parts, whole_time
from edgekit.quant.workload import reference_of

CPU = TARGETS["cpu:any"]
FINE = {"content": 0.001, "quality": 0.01}


def called(measured: Measured, name: str) -> Prepared:
    return next(part for part in measured.parts if part.part == name)


def made_of(measured: Measured, choice: str, folder: Path) -> tuple[Made, ...]:
    """Every part, with this choice or else halves, and what it holds of an earlier one taken from that."""
    made: list[Made] = []
    for part in measured.parts:
        choices = {unit.id: choice if choice in CPU.allowed(unit) else "fp16" for unit in part.units}
        made.append(make(measured.refresh(part, made), choices, CPU, folder))
    return tuple(made)


def test_floats_are_the_part_itself(small_measured: Measured, tmp_path: Path) -> None:
    """No choice, no error: and nothing but rounding of the engine between the two graphs."""
    made = made_of(small_measured, "fp32", tmp_path)
    found = held_out_error(small_measured.held_out, made, reference_of(small_measured.held_out))
    assert found.keys() == {"content", "quality"}
    assert max(found.values()) < 1e-7


def test_fewer_bits_are_smaller_files_and_larger_errors(small_measured: Measured, tmp_path: Path) -> None:
    """Bytes are those of the files, and the errors on requests that no plan was made on rise as weights shrink."""
    references = reference_of(small_measured.held_out)
    sizes, errors = [], []
    for name in ("fp32", "fp16", "w4a16-32", "w2a16-32"):
        made = made_of(small_measured, name, tmp_path / name)
        files = [file.stat().st_size for file in (tmp_path / name).iterdir()]
        assert sum(each.bytes for each in made) == sum(files)
        weights = [
            CHOICES[each.choices.get(unit.id, "fp32")].weight.bytes(unit.n, unit.k)
            for each in made
            for unit in each.part.units
        ]
        sizes.append(sum(weights))
        errors.append(held_out_error(small_measured.held_out, made, references)["content"])
        assert sum(files) > sum(weights)
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert errors[-1] > 100 * errors[1]


def test_the_engine_says_what_it_fused(small_measured: Measured, tmp_path: Path) -> None:
    """As many integer kernels as planned; an engine that is not here is not asked."""
    part = called(small_measured, "unet")
    choices = {"node.to_q": "w4a16-32", "node.to_out": "w8a8", "node.conv1": "w8a8"}
    made = make(part, choices, CPU, tmp_path, "named")
    assert made.path == tmp_path / "named.onnx"
    assert made.kernels is not None
    assert made.kernels.found == made.kernels.planned == {"QLinearConv": 1, "integer MatMul": 1, "MatMulNBits": 1}
    assert make(part, {"node.to_q": "fp16"}, TARGETS["trt"], tmp_path / "trt").kernels is None


def test_times_come_in_pairs(small_measured: Measured, tmp_path: Path) -> None:
    """Unquantized and planned, of every part; a generation is each part as often as it runs."""
    made = made_of(small_measured, "fp16", tmp_path)
    medians, spreads = time_parts(made)
    assert medians.keys() == spreads.keys() == {part.part for part in small_measured.parts}
    assert all(value > 0 for pair in medians.values() for value in pair)
    assert all(value >= 0 for pair in spreads.values() for value in pair)
    before, after = whole_time(Verified({}, {"text_encoder": (1, 2), "unet": (10, 20), "vae_decoder": (5, 6)}), made)
    assert (before, after) == (1 + 2 * 10 + 5, 2 + 2 * 20 + 6)


@pytest.fixture(scope="module")
def made(small_measured: Measured, tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, ...]:
    return made_of(small_measured, "fp16", tmp_path_factory.mktemp("made"))


def verdict(made: tuple[Made, ...], verified: Verified, **changes: object):  # type: ignore[no-untyped-def]
    """`judge` with nothing to object to, but for the changes."""
    given = {"caps": {}, "bytes_now": 100, "bytes_most": None, "may_be_slower": False, "rivals": {}, **changes}
    return judge(verified, made, **given)  # type: ignore[arg-type]


def timed(before: float, after: float) -> dict[str, tuple[float, float]]:
    return {"text_encoder": (1.0, 1.0), "unet": (before, after), "vae_decoder": (1.0, 1.0)}


def test_a_good_plan_passes_with_its_figures(made: tuple[Made, ...]) -> None:
    """Each condition leaves what was measured, and what the limit was."""
    gates = verdict(made, Verified(FINE, timed(10, 9)), caps={"quality": 0.02}, bytes_most=120.0)
    found = {gate.what: (gate.value, gate.limit) for gate in gates}
    assert found == {
        "content: error on held-out requests": (0.001, CAPS["content"]),
        "quality: error on held-out requests": (0.01, 0.02),
        "bytes of the bundle": (100.0, 120.0),
        "milliseconds of one generation against unquantized": (20.0, SLOWER * 22.0),
    }


@pytest.mark.parametrize(
    ("verified", "changes", "words"),
    [
        (Verified({"content": 0.03, "quality": 0.01}), {}, "content error 0.03 .* over the limit of 0.02"),
        (Verified(FINE), {"caps": {"quality": 0.005}}, "quality error 0.01 .* limit of 0.005"),
        (Verified({"content": float("nan")}), {}, "content error nan"),
        (Verified(FINE), {"bytes_most": 99.0, "bytes_now": 2_000_000}, "2.0 MB, over its budget of 0.0 MB"),
        (Verified(FINE, timed(10, 11)), {"may_be_slower": False}, "takes 24.0 ms where .* takes 22.0 ms"),
        (
            Verified(FINE),
            {"rivals": {"w8a8": {"content": 0.0009, "quality": 0.009}}},
            r"w8a8 everywhere .* more exact on every metric \(content 0.0009 against 0.001",
        ),
    ],
    ids=["content", "own cap", "not a number", "bytes", "time", "rival"],
)
def test_each_condition_refuses_alone(
    made: tuple[Made, ...], verified: Verified, changes: dict[str, object], words: str
) -> None:
    """The message names it, with both figures and a way out."""
    with pytest.raises(PlanRefused, match=words) as why:
        verdict(made, verified, **changes)
    assert "--budget" in str(why.value)


def test_what_does_not_refuse(made: tuple[Made, ...]) -> None:
    """Time that was given up knowingly, a pair within what two equal runs differ by, a rival that is worse in one."""
    slow = Verified(FINE, timed(10, 20))
    assert verdict(made, slow, may_be_slower=True)[-1].value > verdict(made, slow, may_be_slower=True)[-1].limit
    verdict(made, Verified(FINE, timed(100, 100 * (1 + 0.9 * (SLOWER - 1)))))
    verdict(made, Verified(FINE), rivals={"w8a8": {"content": 0.0001, "quality": 0.011}})


def test_every_failure_is_named_at_once(made: tuple[Made, ...]) -> None:
    """Not the first alone."""
    bad = replace(Verified({"content": 1.0, "quality": 1.0}), milliseconds=timed(10, 20))
    with pytest.raises(PlanRefused, match=r"content error .*; quality error .*; it takes"):
        verdict(made, bad)
