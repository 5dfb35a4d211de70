"""Trials: any unit at any choice in one session gives what a rebuilt graph gives, in both forms."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from edgekit.errors import BadRequest, SessionFailed
from edgekit.quant.choices import CHOICES
from edgekit.quant.graph import Unit, weight_matrix
from edgekit.quant.lower import lower
from edgekit.quant.targets import TARGETS, Target
from edgekit.quant.trial import TrialSession, open_trial
from edgekit.quant.trial_graph import Form, activation_code, input_name, ranges_of, rounding_of, trial_model
from edgekit.quant.weights import restore, store
from tests.quant.trial_graphs import built, feeds, linear, opened, ranges_on, rebuilt, tiny, units_of

FORMS: tuple[Form, ...] = ("override", "delta")
CPU, TRT = TARGETS["cpu:any"], TARGETS["trt"]
CLOSE = 1e-5
WEIGHTS_ALONE = "fp16"  # the one choice that rounds no activations on any target


@cache
def denoiser() -> tuple[ir.Model, tuple[Unit, ...], dict[str, tuple[float, float]]]:
    model = tiny()
    units = units_of(model)
    return model, units, ranges_on(model, units, feeds())


@pytest.fixture(scope="module", params=FORMS)
def opened_trial(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TrialSession:
    model, units, ranges = denoiser()
    folder = tmp_path_factory.mktemp("trial")
    return open_trial(model, units, ranges, CPU, folder, form=request.param, threads=1)


@pytest.fixture
def trial(opened_trial: TrialSession) -> TrialSession:
    opened_trial.set(None)
    return opened_trial


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference, in units of the second's largest number."""
    return float(np.abs(a - b).max() / np.abs(b).max())


def meant(matrix: np.ndarray, choice: str, target: Target) -> np.ndarray:
    return restore(store(matrix, target.choice(choice), code_bits=target.code_bits))


def by_ends(x: np.ndarray, ends: tuple[float, float], symmetric: bool) -> np.ndarray:
    scale, zero = activation_code(ends, symmetric)
    low, high = (-128, 127) if symmetric else (0, 255)
    return ((np.clip(np.rint(x / scale) + float(zero), low, high) - float(zero)) * scale).astype(np.float32)


def by_block(x: np.ndarray, size: int) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % size))).reshape(len(x), -1, size)
    scale = np.maximum(np.abs(padded).max(-1, keepdims=True) / 127, 1e-30)
    return (np.rint(padded / scale) * scale).reshape(len(x), -1)[:, : x.shape[1]]


def by_e4m3(x: np.ndarray, ends: tuple[float, float]) -> np.ndarray:
    scale = max(-ends[0], ends[1]) / 448
    return np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(scale)


def by_e2m1(x: np.ndarray, ends: tuple[float, float]) -> np.ndarray:
    whole = max(-ends[0], ends[1]) / (448 * 6)
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % 16))).reshape(len(x), -1, 16)
    relative = np.abs(padded).max(-1, keepdims=True) / whole / 6
    scale = np.minimum(relative, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * whole
    codes = np.clip(padded / np.maximum(scale, 1e-30), -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    return (codes * scale).reshape(len(x), -1)[:, : x.shape[1]]


ROUNDED: dict[str, Callable[[np.ndarray, tuple[float, float], Target], np.ndarray]] = {
    "": lambda x, ends, target: x,
    "static": lambda x, ends, target: by_ends(x, ends, target.symmetric),
    "row": lambda x, ends, target: by_block(x, x.shape[1]),
    "block32": lambda x, ends, target: by_block(x, 32),
    "block64": lambda x, ends, target: by_block(x, 64),
    "block128": lambda x, ends, target: by_block(x, 128),
    "fp8": lambda x, ends, target: by_e4m3(x, ends),
    "fp4": lambda x, ends, target: by_e2m1(x, ends),
}


def linear_case() -> tuple[np.ndarray, np.ndarray]:
    """A weight (k, n) and inputs (rows, k), k no multiple of any block, one row of zeros."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((9, 72), dtype=np.float32)
    x[4] = 0
    return rng.standard_normal((72, 24)).astype(np.float32) / 8, x


def test_nothing_set_is_the_plain_graph(trial: TrialSession) -> None:
    """A trial session with nothing set gives the outputs of the graph it was made from."""
    given = feeds(1)[0]
    assert distance(trial.run(given)["out"], opened(denoiser()[0]).run(given)["out"]) < CLOSE
    assert trial.overrides == {}


def test_trial_inputs_need_not_be_fed(trial: TrialSession) -> None:
    """The session shows the inputs and outputs of the plain graph and none of the trial's own."""
    assert [spec.name for spec in trial.inputs] == ["sample", "text"]
    assert [spec.name for spec in trial.outputs] == ["out"]


def test_every_unit_is_the_rebuilt_graph(trial: TrialSession) -> None:
    """Rounding the weights of one unit in the trial session equals a graph rebuilt with those weights."""
    model, units, _ = denoiser()
    given = feeds(1)[0]
    plain = opened(model).run(given)["out"]
    for unit in units:
        choices = {unit.id: WEIGHTS_ALONE}
        trial.set(choices)
        wanted = rebuilt(model, units, choices, CPU).run(given)["out"]
        assert distance(trial.run(given)["out"], wanted) < CLOSE, unit.id
        assert distance(wanted, plain) > CLOSE


@pytest.mark.parametrize("choice", ["w8a16", "w4a16-32", "w2a16-32"])
def test_coarse_weights_are_the_rebuilt_graph(choice: str, tmp_path: Path) -> None:
    """Low-bit weights of several units equal the rebuilt graph where the engine rounds nothing else."""
    model, units, _ = denoiser()
    given, target = feeds(1)[0], TARGETS["cuda"]
    choices = {unit.id: choice for unit in units if unit.op == "MatMul"}
    wanted = rebuilt(model, units, choices, target).run(given)["out"]
    assert distance(wanted, opened(model).run(given)["out"]) > 100 * CLOSE
    for form in FORMS:
        session = open_trial(model, units, {}, target, tmp_path, form=form, threads=1)
        session.set(choices)
        assert distance(session.run(given)["out"], wanted) < CLOSE


@pytest.mark.parametrize(
    "target", [CPU, TARGETS["cpu:vnni"], TRT, TARGETS["cuda"], TARGETS["openvino"]], ids=lambda target: target.name
)
@pytest.mark.parametrize("form", FORMS)
def test_every_choice_of_a_product_is_its_arithmetic(form: Form, target: Target, tmp_path: Path) -> None:
    """Each allowed choice of y = x @ w is rounded(x) @ rounded(w), with both roundings written out in numpy."""
    weight, x = linear_case()
    body = """<ir_version: 10, opset_import: ["" : 20]> g (float[1,N,72] x) => (float[1,N,24] z)
    { y = MatMul(x, w) m = MatMul(y, v) z = Add(m, x0) }"""
    square = np.eye(24, dtype=np.float32)
    model = built(body, {"w": weight, "v": square, "x0": np.zeros(1, np.float32)})
    unit, units = units_of(model)[0], units_of(model)
    ends = {"x": (-2.5, 3.0), "y": (-4.0, 4.0)}
    session = open_trial(model, units, ends, target, tmp_path, form=form, threads=1)
    for choice in target.allowed(unit):
        session.set({unit.id: choice})
        given = ROUNDED[rounding_of(CHOICES[choice], target)](x, ends["x"], target)
        wanted = given @ meant(weight.T, choice, target).T
        assert distance(session.run({"x": x[None]})["z"][0], wanted) < CLOSE, choice


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("target", [CPU, TRT], ids=lambda target: target.name)
def test_convolutions_are_rounded_as_the_engine_does(form: Form, target: Target, tmp_path: Path) -> None:
    """At w8a8 a Conv reads rounded values; ONNX Runtime on a CPU rounds its result as well, TensorRT does not."""
    model, units, ranges = denoiser()
    unit = next(unit for unit in units if unit.id == "beside")
    given = feeds(1)[0]
    session = open_trial(model, units, ranges, target, tmp_path, form=form, threads=1)
    session.set({unit.id: "w8a8"})
    copy = model.clone()
    node = next(node for node in copy.graph if node.name == unit.id)
    copy.graph.outputs.clear()
    copy.graph.outputs.append(node.inputs[0])
    entry = opened(copy).run(given)["entry"]
    kernel = meant(weight_matrix(model, unit), "w8a8", target)
    wanted = np.einsum("nk,bkhw->bnhw", kernel, by_ends(entry, ranges["entry"], target.symmetric))
    if target.engine == "ort-cpu":
        wanted = by_ends(wanted, ranges["beside"], symmetric=False)
    shown = trial_model(model, units, ranges, target, form)
    shown.graph.outputs.append(next(v for n in shown.graph for v in n.outputs if v.name == unit.output))
    named = {spec: value for fed in [session._fed(unit.id, "w8a8")] for spec, value in fed.items()}
    got = opened(shown).run({**given, **named})[unit.output]
    step = float(activation_code(ranges["beside"], False)[0])
    wrong = np.abs(got - wanted) > CLOSE * np.abs(wanted).max()
    assert wrong.mean() < 1e-3  # numbers half way between two codes may fall to either side
    assert np.abs(got - wanted).max() < 1.01 * step


def test_several_units_at_once_are_the_rebuilt_graph(trial: TrialSession) -> None:
    """Any set of units, up to all, equals the rebuilt graph; setting anew leaves nothing of the set before."""
    model, units, _ = denoiser()
    rng, given = np.random.default_rng(1), feeds(1)[0]
    for share in (0.3, 1.0, 0.6, 0.0):
        choices = {unit.id: WEIGHTS_ALONE for unit in units if rng.random() < share}
        trial.set(choices)
        assert trial.overrides == choices
        assert distance(trial.run(given)["out"], rebuilt(model, units, choices, CPU).run(given)["out"]) < CLOSE


def test_forms_agree_on_random_mixes(tmp_path: Path) -> None:
    """Override and delta give the same outputs for mixes of every allowed choice, activations included."""
    model, units, ranges = denoiser()
    rng, given = np.random.default_rng(2), feeds(1)[0]
    both = [open_trial(model, units, ranges, CPU, tmp_path, form=form, threads=1) for form in FORMS]
    for _ in range(12):
        mix = {unit.id: str(rng.choice(CPU.allowed(unit))) for unit in units}
        for session in both:
            session.set(mix)
        one, other = (session.run(given)["out"] for session in both)
        # A sum that rounds differently may move a number to the next of 255 codes.
        assert np.quantile(np.abs(one - other), 0.9) < 20 * CLOSE
        assert distance(one, other) < 0.02


@pytest.mark.parametrize("choice", ["w8a8", "w8a8-row", "w8a16", "w4a16-32", "w2a16-32"])
def test_trials_predict_the_lowered_graph(trial: TrialSession, choice: str) -> None:
    """A trial gives what the engine's own operators give once the choice is lowered, to a part of its effect."""
    model, units, ranges = denoiser()
    given = feeds(1)[0]
    plain = opened(model).run(given)["out"]
    for unit in units:
        if choice not in CPU.allowed(unit):
            continue
        lowered = model.clone()
        lower(lowered, units_of(lowered), {unit.id: choice}, ranges, CPU)
        wanted = opened(lowered).run(given)["out"]
        trial.set({unit.id: choice})
        missed = np.square(trial.run(given)["out"] - wanted).sum()
        assert missed < 0.01 * np.square(wanted - plain).sum(), unit.id


def test_tied_weights_are_tried_apart(tmp_path: Path) -> None:
    """Two units that share a weight can be at different choices, in both forms, also where one is a table."""
    text = """<ir_version: 10, opset_import: ["" : 20]> g (int64[B,N] ids) => (float[B,N,40] y) {
        x = Gather(w, ids) t = Transpose<perm=[1,0]>(w) y = MatMul(x, t) }"""
    weight = np.random.default_rng(0).standard_normal((40, 32)).astype(np.float32)
    model = built(text, {"w": weight})
    units = units_of(model)
    assert {unit.op for unit in units} == {"Gather", "MatMul"}
    ids = np.arange(40)[None]
    half = weight.astype(np.float16).astype(np.float32)
    for form in FORMS:
        session = open_trial(model, units, {}, CPU, tmp_path, form=form, threads=1)
        for table, head in ((half, weight), (weight, half), (half, half)):
            pick = {"Gather": table is half, "MatMul": head is half}
            session.set({unit.id: "fp16" for unit in units if pick[unit.op]})
            np.testing.assert_allclose(session.run({"ids": ids})["y"][0], table @ head.T, atol=1e-4)


@pytest.mark.parametrize("opset", [13, 17, 18, 20])
def test_old_opsets_are_served(opset: int, tmp_path: Path) -> None:
    """Rounding by row and by block works before and after ReduceMax took its axes as an input."""
    weight, x = linear_case()
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]> g (float[1,N,72] x) => (float[1,N,24] z)
    {{ y = MatMul(x, w) m = MatMul(y, v) z = Add(m, x0) }}"""
    model = built(text, {"w": weight, "v": np.eye(24, dtype=np.float32), "x0": np.zeros(1, np.float32)})
    units = units_of(model)
    session = open_trial(model, units, {"x": (-3.0, 3.0)}, CPU, tmp_path, threads=1)
    for choice in ("w8a8-row", "w8a16"):
        session.set({units[0].id: choice})
        wanted = ROUNDED[rounding_of(CHOICES[choice], CPU)](x, (0, 0), CPU) @ meant(weight.T, choice, CPU).T
        assert distance(session.run({"x": x[None]})["z"][0], wanted) < CLOSE


def test_half_precision_graphs_are_tried_in_their_type(tmp_path: Path) -> None:
    """A float16 graph is fed float16 weights, and its activations are rounded in float32 between casts."""
    weight, x = linear_case()
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float16[1,N,72] x) => (float16[1,N,24] z)
    { y = MatMul(x, w) m = MatMul(y, v) z = Add(m, x0) }"""
    half = {"w": weight, "v": np.eye(24), "x0": np.zeros(1)}
    model = built(text, {name: array.astype(np.float16) for name, array in half.items()})
    units = units_of(model)
    ends = {"x": (-3.0, 3.0)}
    for form in FORMS:
        session = open_trial(model, units, ends, CPU, tmp_path, form=form, threads=1)
        session.set({units[0].id: "w8a8"})
        wanted = by_ends(x, ends["x"], False) @ meant(weight.astype(np.float16).T.astype("f"), "w8a8", CPU).T
        assert distance(session.run({"x": x[None].astype(np.float16)})["z"][0].astype("f"), wanted) < 5e-3


def test_unchanged_units_are_not_rounded_again(tmp_path: Path) -> None:
    """Setting a mix stores the matrices of the units that changed, and of no others."""
    model, units, ranges = denoiser()
    stored: list[str] = []

    def watching(matrix, choice, code_bits, unit):  # type: ignore[no-untyped-def]
        stored.append(unit.id)
        return store(matrix, choice, code_bits=code_bits)

    session = open_trial(model, units, ranges, CPU, tmp_path, store=watching, threads=1)
    mix = {unit.id: "fp16" for unit in units}
    session.set(mix)
    session.set({**mix, "query": "w8a8"})
    session.set({**mix, "query": "fp32"})
    session.set(None)
    assert stored == [*mix, "query"]
    assert session.overrides == {}


def test_a_graph_is_not_changed_by_its_trials(tmp_path: Path) -> None:
    """Making trial graphs leaves the model's nodes, inputs and initializers as they were."""
    model = tiny()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    for form in FORMS:
        trial_model(model, units_of(model), {}, CPU, form)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_without_ranges_only_measured_roundings_are_refused(tmp_path: Path) -> None:
    """A trial without calibration offers what needs no range, and names the value whose range is missing."""
    model, units, _ = denoiser()
    session = open_trial(model, units, {}, CPU, tmp_path, threads=1)
    session.set({"query": "w8a8-row"})
    with pytest.raises(BadRequest, match="no range of entry, inner"):
        session.set({"inner": "w8a8"})


def test_wrong_requests_are_named(trial: TrialSession) -> None:
    """An unknown unit, a choice the target does not allow it, a form that is not there, and bind are refused."""
    model, units, ranges = denoiser()
    with pytest.raises(BadRequest, match="no unit 'nobody'"):
        trial.set({"nobody": "fp16"})
    with pytest.raises(BadRequest, match="entry cannot be 'w4a16-32'"):
        trial.set({"entry": "w4a16-32"})
    with pytest.raises(BadRequest, match="no trial form 'swap'"):
        trial_model(model, units, ranges, CPU, "swap")  # type: ignore[arg-type]
    with pytest.raises(SessionFailed, match="call run"):
        trial.bind()


def test_float8_needs_its_opset() -> None:
    """A graph of an opset without 8-bit floats is refused on a target that would try them."""
    weight, _ = linear_case()
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[1,N,72] x) => (float[1,N,24] z)
    { y = MatMul(x, w) m = MatMul(y, v) z = Add(m, x0) }"""
    model = built(text, {"w": weight, "v": np.eye(24, dtype=np.float32), "x0": np.zeros(1, np.float32)})
    with pytest.raises(BadRequest, match="opset 19"):
        trial_model(model, units_of(model), {"x": (-1, 1)}, TRT)


def test_inputs_have_names_that_say_what_they_are() -> None:
    """Names of trial inputs hold the unit's place, and what a rounding needs is listed per target."""
    conv = next(unit for unit in denoiser()[1] if unit.id == "inner")
    assert input_name(3, "weight") == "trial.3.weight"
    assert ranges_of(conv, "static", CPU) == ("entry", "inner")
    assert ranges_of(conv, "static", TRT) == ("entry",)
    assert ranges_of(conv, "row", CPU) == ()
    assert rounding_of(CHOICES["w4a16-64"], CPU) == "block64"
    assert rounding_of(CHOICES["w4a16-64"], TRT) == ""


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 2.0), (0.5, 2.0), (-3.0, -1.0), (0.0, 0.0)])
def test_activation_codes_hold_zero_and_the_ends(low: float, high: float) -> None:
    """Zero has a code of its own, and both ends are met to half a step."""
    for symmetric in (False, True):
        got = by_ends(np.array([0.0, low, high], np.float32), (low, high), symmetric)
        scale, _ = activation_code((low, high), symmetric)
        assert got[0] == 0
        np.testing.assert_allclose(got, [0, low, high], atol=0.51 * scale)


def test_a_plain_linear_graph_ends_in_its_product(tmp_path: Path) -> None:
    """A product that is the graph's output keeps the output's name in both forms."""
    weight, x = linear_case()
    model = linear(weight)
    units = units_of(model)
    for form in FORMS:
        session = open_trial(model, units, {}, CPU, tmp_path, form=form, threads=1)
        session.set({units[0].id: "fp16"})
        half = weight.astype(np.float16).astype(np.float32)
        np.testing.assert_allclose(session.run({"x": x})["y"], x @ half, atol=1e-4)
