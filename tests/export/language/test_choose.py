"""`--precision auto`: what is measured, what is taken, and what the bundle says of it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.bundle.store import read_bundle
from edgekit.cli.export import command
from edgekit.errors import BadRequest, DeviceMissing, MemoryLimit, SessionFailed
from edgekit.export import build
from edgekit.export.build import DIALECTS, ExportRequest
from edgekit.export.language import choose
from edgekit.export.language.choose import CANDIDATES, NOISE, ROWS, Curve, choose_precision, decide, expected_tokens
from edgekit.export.language.config import Config
from edgekit.export.language.export import compile_language, export_language, plan_language
from edgekit.export.language.families import read_spec
from edgekit.export.language.spec import Spec
from edgekit.export.language.store import stored_bytes
from edgekit.export.language.weights import Checkpoint
from edgekit.quant.precision import AUTO, PRECISIONS, get_precision
from edgekit.runtime.backends import open_session
from tests.export.language.runner import Runner

ROOT = Path(__file__).resolve().parents[3]
DRAFT = ROOT / "models" / "pycode-draft"
Model = tuple[Spec, Checkpoint]


def quiet(_what: str, _fraction: float) -> None:
    """Progress nobody looks at."""


def curve(name: str, *milliseconds: float) -> Curve:
    """A curve over ROWS."""
    return Curve(name, {n: ms / 1e3 for n, ms in zip(ROWS, milliseconds, strict=True)})


def fake_curves(monkeypatch: pytest.MonkeyPatch, fastest: str) -> list[str]:
    """Nothing is timed, `fastest` comes out first; the list fills with the names of what would have been measured."""
    asked: list[str] = []

    def measure(graph: Path, spec: Spec, layers: int) -> dict[int, float]:
        assert graph.is_file()
        asked.append(graph.stem)
        return {n: (0.5e-3 if graph.stem == fastest else 1e-3) * n for n in ROWS}

    monkeypatch.setattr(choose, "_measure", measure)
    return asked


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """One run of each: what it says of speed is noise."""
    for name, value in {"ROUNDS": 1, "RUNS": 1, "WARM_UP": 0}.items():
        monkeypatch.setattr(choose, name, value)


@pytest.fixture(scope="module")
def model() -> Model:
    """The shipped draft model, understood."""
    return read_spec(Config.load(DRAFT)), Checkpoint(DRAFT)


def test_expected_tokens_are_the_geometric_sum() -> None:
    """A step of n rows yields its own token and each draft that all those before it let through."""
    for rows in ROWS:
        assert expected_tokens(rows) == pytest.approx(sum(choose.ACCEPTANCE**i for i in range(rows)))


def test_the_fastest_at_its_own_best_number_of_rows_wins() -> None:
    """A format that is slow alone and hardly slower in company beats one that is fast alone."""
    alone, company = curve("int8", 10, 20, 40, 80), curve("int4", 14, 15, 16, 17)
    assert (alone.best, company.best) == (1, 8)
    choice = decide((alone, company))
    assert choice.precision == "int4"
    assert choice.curves == (alone, company)


def test_within_noise_the_more_accurate_wins() -> None:
    """The first of the list is taken as long as the fastest leads by no more than the noise of a measurement."""
    times = (10.0, 20.0, 40.0, 80.0)
    slower = curve("int8", *times)
    for lead, taken in ((1 - NOISE / 2, "int8"), (1 - 2 * NOISE, "int4")):
        faster = curve("int4", *(lead * ms for ms in times))
        assert decide((slower, faster)).precision == taken
        assert decide((faster, slower)).precision == "int4"


def test_the_reason_names_what_was_measured() -> None:
    """The words hold the format taken, its rates, and every format's milliseconds in a line of its own."""
    reason = decide((curve("int8", 10, 20, 40, 80), curve("int4-128", 5, 6.25, 12.5, 25))).reason
    first, header, *table = reason.splitlines()
    assert first.startswith("int4-128: 272 tokens/s expected with 1 free drafts a step")
    assert "200 without drafts" in first
    assert "1, 2, 4, 8 rows" in header
    assert table == [
        "int8: 10.00 20.00 40.00 80.00; 100 at 1 rows",
        "int4-128: 5.00 6.25 12.50 25.00; 272 at 2 rows",
    ]


def test_candidates_are_known_and_ordered_by_bits() -> None:
    """Every candidate is a row of PRECISIONS that stores codes, eight bits before four."""
    bits = [PRECISIONS[name].code_bits or 99 for name in CANDIDATES]
    assert bits == sorted(bits, reverse=True)
    assert set(CANDIDATES) == {name for name, row in PRECISIONS.items() if row.code_bits}


def test_the_whole_model_is_extrapolated_from_its_layers(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Head once, layers by their number: two of three layers measured say what three and the head cost."""
    spec, checkpoint = model
    monkeypatch.setattr(choose, "beyond_cache", lambda: 1)
    layers = choose._write(spec, checkpoint, "int4", tmp_path)
    assert (layers, spec.layers) == (2, 3)
    seen = []

    def fake(_binding: Any, feeds: dict[str, Any], rows: int, vocab: int) -> float:
        count = feeds["input_ids"].shape[1]
        seen.append((count, rows))
        assert vocab == spec.vocab
        assert len(feeds["rows"]) == rows
        return 100.0 * rows + layers * (1 + 2.0 * count)

    monkeypatch.setattr(choose, "_time", fake)
    seconds = choose._measure(tmp_path / "int4.onnx", spec, layers)
    assert seconds == pytest.approx({n: 100 * n + spec.layers * (1 + 2.0 * n) for n in ROWS})
    assert seen == [(n, rows) for n in ROWS for rows in (n, 0)]


def test_a_model_measured_whole_is_not_extrapolated(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all layers fit in the graph, the time of a step is what was measured and no run goes without a head."""
    spec, checkpoint = model
    layers = choose._write(spec, checkpoint, "int8", tmp_path)
    assert layers == spec.layers
    monkeypatch.setattr(choose, "_time", lambda binding, feeds, rows, vocab: float(rows or pytest.fail("no rows")))
    assert choose._measure(tmp_path / "int8.onnx", spec, layers) == {n: float(n) for n in ROWS}


def test_the_largest_cache_is_what_must_be_exceeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system tells; 64 MB where it tells of smaller ones, of none, or nonsense."""
    monkeypatch.setattr(choose, "CACHES", tmp_path)
    assert choose.beyond_cache() == choose.LEAST_LAYERS
    for index, size in enumerate(("48K", "nonsense", "2048K", "491520K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
        assert choose.beyond_cache() == (491520 << 10 if size == "491520K" else choose.LEAST_LAYERS)


@pytest.mark.parametrize("name", CANDIDATES)
def test_the_measured_layers_are_beyond_the_cache(name: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many layers as make up so many bytes, at least two and at most all."""
    spec, checkpoint = model
    deep = replace(spec, windows=spec.windows * 20, ropes=spec.ropes * 20)
    shorts = [choose._build(spec, checkpoint, name, layers) for layers in (2, 3)]
    layer = stored_bytes(shorts[1][1], shorts[1][0].views) - stored_bytes(shorts[0][1], shorts[0][0].views)
    for limit, wanted in ((1, 2), (2 * layer, 2), (2 * layer + 1, 3), (10 * layer, 10), (1000 * layer, 60)):
        monkeypatch.setattr(choose, "beyond_cache", lambda limit=limit: limit)
        assert choose._depth(deep, checkpoint, name) == wanted


@pytest.mark.parametrize("name", CANDIDATES)
def test_no_two_layers_are_alike(name: str, model: Model, tmp_path: Path) -> None:
    """The engine would keep equal weights once, and the caches with it."""
    spec, checkpoint = model
    choose._write(spec, checkpoint, name, tmp_path)
    graph = ir.load(tmp_path / f"{name}.onnx").graph
    large = [tensor for value in graph.initializers.values() if (tensor := value.const_value).nbytes > 1024]
    seen: dict[bytes, str] = {}
    for tensor in large:
        twin = seen.setdefault(tensor.tobytes(), tensor.name)
        assert twin == tensor.name or "embedding" in (twin + tensor.name), (twin, tensor.name)
    assert len(seen) > spec.layers


@pytest.mark.parametrize("name", CANDIDATES)
def test_what_is_measured_is_the_graph_that_is_exported(name: str, model: Model, tmp_path: Path) -> None:
    """With all layers the measured graph has the export's nodes, inputs and bytes, and its numbers stay finite."""
    spec, checkpoint = model
    layers = choose._write(spec, checkpoint, name, tmp_path)
    decoder, graph = choose._build(spec, checkpoint, name, layers)
    real = compile_language(DRAFT, get_precision(name), "ort")
    assert [node.op_type for node in graph.graph] == [node.op_type for node in real.model.graph]
    assert [value.name for value in graph.graph.inputs] == [value.name for value in real.model.graph.inputs]
    assert stored_bytes(graph, decoder.views) == stored_bytes(real.model, real.decoder.views)
    binding = open_session(tmp_path / f"{name}.onnx").bind()
    for layer in range(layers):
        for half in ("key", "value"):
            shape = 1, spec.kv_heads, choose.CONTEXT + max(ROWS), spec.head_dim
            binding.share(f"past.{layer}.{half}", f"present.{layer}.{half}", shape, np.float32)
    logits = binding.run(choose._feeds(spec, layers, 4, 2))["logits"]
    assert logits.shape == (1, 2, spec.vocab)
    assert np.isfinite(logits).all()
    assert np.abs(logits).max() > 0


def test_a_choice_is_really_measured_and_leaves_nothing(tmp_path: Path, hurry: None) -> None:
    """Every candidate runs on this machine, one is taken, shares rise to 1, and the folder is empty again."""
    seen: list[tuple[str, float]] = []
    choice = choose_precision(DRAFT, tmp_path, lambda *told: seen.append(told))
    assert [curve.precision for curve in choice.curves] == list(CANDIDATES)
    assert choice.precision in CANDIDATES
    assert all(set(curve.seconds) == set(ROWS) and min(curve.seconds.values()) > 0 for curve in choice.curves)
    assert list(tmp_path.iterdir()) == []
    shares = [share for _, share in seen]
    assert {what for what, _ in seen} == {"measuring"}
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_the_best_of_all_rounds_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds are interleaved over the candidates, and a format keeps its least time for each number of rows."""
    order: list[str] = []

    def measure(graph: Path, spec: Spec, layers: int) -> dict[int, float]:
        order.append(graph.stem)
        later = order.count(graph.stem) > 1
        return {n: float(n * (3 if later == (n > 2) else 2)) for n in ROWS}

    monkeypatch.setattr(choose, "_measure", measure)
    choice = choose_precision(DRAFT, tmp_path, quiet)
    assert order == list(CANDIDATES) * choose.ROUNDS
    assert [dict(curve.seconds) for curve in choice.curves] == [{n: 2.0 * n for n in ROWS}] * len(CANDIDATES)


def test_a_failed_measurement_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that refuses a graph, or is not there, ends the export: neither bundle nor measured graphs stay."""

    def refuse(*_: object) -> None:
        raise SessionFailed("no")

    def missing() -> None:
        raise DeviceMissing("onnxruntime is not installed")

    request = ExportRequest(DRAFT, tmp_path / "x.bundle", precision=AUTO)
    for name, fake, error in (("_measure", refuse, SessionFailed), ("engine", missing, DeviceMissing)):
        with monkeypatch.context() as patch:
            patch.setattr(choose, name, fake)
            with pytest.raises(error):
                build.export(request, quiet)
        assert list(tmp_path.iterdir()) == []


def test_the_bundle_is_that_of_the_format_taken_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked, taken and why are in the manifest; the graph is the named format's, byte for byte, and runs like it."""
    fake_curves(monkeypatch, "int4-128")
    target = tmp_path / "auto.bundle"
    manifest = build.export(ExportRequest(DRAFT, target, precision=AUTO), quiet)
    assert read_bundle(target).manifest == manifest
    assert manifest.precision.requested == AUTO
    assert manifest.parts["decoder"].precision == "int4-128"
    reason = manifest.notes[build.PRECISION_NOTE]
    assert reason.startswith("int4-128: 2000 tokens/s")
    assert all(f"\n{name}: " in reason for name in CANDIDATES)
    named = export_language(DRAFT, tmp_path / "named", precision="int4-128")
    assert named.parts == manifest.parts
    for path in ("graphs/decoder.onnx", "graphs/decoder.onnx.data"):
        assert (target / path).read_bytes() == (tmp_path / "named" / path).read_bytes()
    tokens = [5, 80, 300, 7, 9]
    one, other = (Runner(folder, named).forward(tokens) for folder in (target, tmp_path / "named"))
    np.testing.assert_array_equal(one, other)


def test_the_same_request_finds_its_work_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second export with auto measures nothing; one that names the format taken is another request."""
    asked = fake_curves(monkeypatch, "int8-row")
    request = ExportRequest(DRAFT, tmp_path / "x.bundle", precision=AUTO)
    made = build.export(request, quiet)
    assert len(asked) == choose.ROUNDS * len(CANDIDATES)
    assert build.export(request, quiet) == made
    assert len(asked) == choose.ROUNDS * len(CANDIDATES)
    assert build.current(replace(request, precision="int8-row")) is None


def test_a_named_precision_is_not_explained(tmp_path: Path) -> None:
    """Where nothing was measured, the manifest has no note about it."""
    manifest = build.export(ExportRequest(DRAFT, tmp_path / "x.bundle", precision="int8"), quiet)
    assert build.PRECISION_NOTE not in manifest.notes
    assert manifest.precision.requested == manifest.parts["decoder"].precision == "int8"


def test_measuring_stands_on_one_scale_with_the_rest(tmp_path: Path, hurry: None) -> None:
    """Measuring, reading and writing follow each other on a bar that never jumps back and ends full."""
    seen: list[tuple[str, float]] = []
    build.export(ExportRequest(DRAFT, tmp_path / "x.bundle", precision=AUTO), lambda *told: seen.append(told))
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    assert list(dict.fromkeys(what for what, _ in seen)) == ["measuring", "reading", "writing", "done"]


def test_a_dry_run_measures_nothing_and_plans_for_the_largest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The plan covers every candidate's size and memory and the measurement's, and its note says what it is."""
    monkeypatch.setattr(choose, "_write", lambda *_: pytest.fail("measured"))
    planned = build.plan(ExportRequest(DRAFT, tmp_path / "x.bundle", precision=AUTO))
    each = {name: plan_language(DRAFT, name) for name in CANDIDATES}
    assert planned.precision == AUTO
    assert planned.disk_bytes == max(plan.disk_bytes for plan in each.values())
    spec, checkpoint = read_spec(Config.load(DRAFT)), Checkpoint(DRAFT)
    needs = [choose.peak_bytes(spec, checkpoint), *(plan.peak_bytes for plan in each.values())]
    assert planned.peak_bytes == max(needs)
    assert "measures int8, int8-128, int8-row, int4, int4-128 when it exports" in planned.notes[-1]
    with pytest.raises(MemoryLimit):
        build.export(ExportRequest(DRAFT, tmp_path / "x", precision=AUTO, max_memory=planned.peak_bytes - 1), quiet)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is counted per process on Linux alone")
def test_the_planned_memory_is_enough(tmp_path: Path) -> None:
    """An export under a cap of exactly what the plan says measures, writes and prints its choice."""
    target = tmp_path / "x.bundle"
    cap = build.plan(ExportRequest(DRAFT, target, precision=AUTO)).peak_bytes
    args = [sys.executable, "-m", "edgekit.cli", "export", DRAFT, "-o", target, "--precision", AUTO]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*args, "--max-memory", str(cap)], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    taken = read_bundle(target).manifest.parts["decoder"].precision
    assert f"\n{taken}: " in done.stderr
    assert "Milliseconds of a step" in done.stderr


@pytest.mark.parametrize("device", [device for device in DIALECTS if device != "cpu"])
def test_auto_is_refused_where_it_cannot_measure(device: str, tmp_path: Path) -> None:
    """Another target than the CPU is named with what to type instead, by plan and export alike."""
    request = ExportRequest(DRAFT, tmp_path / "x.bundle", device=device, precision=AUTO)
    for verb in (build.plan, lambda asked: build.export(asked, quiet)):
        with pytest.raises(BadRequest, match=f"--device {device}; name one of fp32, .*int4-128"):
            verb(request)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.torch
def test_auto_is_refused_for_image_models(tmp_path: Path) -> None:
    """Image models have one precision, and the message says which."""
    request = ExportRequest(ROOT / "models" / "emoji", tmp_path / "x.bundle", precision=AUTO)
    with pytest.raises(BadRequest, match=r"--precision auto for an image model.*Export fp32"):
        build.plan(request)


def test_the_help_names_every_precision() -> None:
    """What `--precision` takes is what PRECISIONS holds, and auto."""
    (option,) = (option for option in command.params if option.name == "precision")
    words = str(getattr(option, "help", "")).replace(":", ",").replace(";", ",").split(", ")
    assert {word.removeprefix("or ") for word in words} >= {*PRECISIONS, AUTO}
