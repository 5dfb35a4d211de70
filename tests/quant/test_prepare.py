"""Parts as they are measured: rewritten exactly, calibrated, and each with its way into the account of the sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from edgekit.bundle.store import Bundle, read_bundle
from edgekit.quant.choices import CHOICES, get_choice
from edgekit.quant.graph import load_graph, weight_matrix
from edgekit.quant.metrics import NSR, errors
from edgekit.quant.mixed import Measured
from edgekit.quant.pictures import CallsWorkload, PictureWorkload
from edgekit.quant.prepare import Prepared, prepare_pictures, rounder
from edgekit.quant.requests import picture_requests
from edgekit.quant.scores import Scores
from edgekit.quant.targets import TARGETS
from edgekit.quant.verify import make
from edgekit.quant.weights import restore, store
from edgekit.runtime.backends import open_session
from tests.quant.small_bundle import text_encoder, write_bundle
from tests.quant.tiny_graphs import relative

CPU = TARGETS["cpu:any"]
LOUD = 40.0  # times the others, what one channel behind the norm is


def called(measured: Measured, name: str) -> Prepared:
    return next(part for part in measured.parts if part.part == name)


def with_a_loud_channel() -> onnx.ModelProto:
    """The text encoder with one channel LOUD times larger behind its norm, and read LOUD times weaker."""
    model = text_encoder()
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    product = next(node for node in model.graph.node if node.output[0] == "fc1")
    for tensor in model.graph.initializer:
        if tensor.name in (norm.input[1], product.input[1]):
            value = numpy_helper.to_array(tensor).copy()
            value[3] *= LOUD if tensor.name == norm.input[1] else 1 / LOUD
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return model


def encoder_of(bundle: Bundle, prompts: Path, work: Path) -> Prepared:
    """The bundle's text encoder, prepared on four requests."""
    requests = picture_requests(bundle, prompts)[0][:4]
    workload = PictureWorkload(bundle, requests, threads=1)
    parts = prepare_pictures(bundle, requests, workload, workload, CPU, work, lambda what, share: None)
    return next(part for part in parts if part.part == "text_encoder")


def test_rewrites_are_exact(small_measured: Measured, small_bundle: Bundle) -> None:
    """Every recorded run of every part, by the graph that is quantized and by the bundle's own."""
    for part in small_measured.parts:
        before, after = (open_session(path, threads=1) for path in (small_bundle.graph(part.part), part.path))
        for call in part.calls:
            wanted, got = before.run(call.feeds), after.run(call.feeds)
            assert all(relative(got[name], value) < 1e-4 for name, value in wanted.items())


def test_what_is_rewritten(small_measured: Measured) -> None:
    """Text projections set the first token aside, the raw skip is split, and the rows are those the encoder gives."""
    unet = called(small_measured, "unet")
    assert {(each.kind, each.node, each.input) for each in unet.rewrites} == {
        ("bos", "node.to_k", "encoder_hidden_states"),
        ("bos", "node.to_v", "encoder_hidden_states"),
        ("shortcut", "node.shortcut", ""),
    }
    rows = unet.constants.rows["encoder_hidden_states"]
    first = unet.calls[0].feeds["encoder_hidden_states"][0, 0]
    np.testing.assert_allclose(rows.values[0], first, rtol=1e-4, atol=1e-4)
    assert {unit.id for unit in unet.units} >= {"node.shortcut.0", "node.shortcut.1"}
    assert called(small_measured, "text_encoder").rewrites == ()


def test_a_loud_channel_is_smoothed(small_bundle: Bundle, prompts: Path, tmp_path: Path) -> None:
    """Where it pays alone, and exactly: then 8 bits on both sides lose several times less."""
    loud = read_bundle(write_bundle(tmp_path / "loud.bundle", with_a_loud_channel()))
    smoothed = encoder_of(loud, prompts, tmp_path / "work")
    assert [(each.kind, each.node) for each in smoothed.rewrites] == [("smooth", "node.fc1")]
    plain = encoder_of(small_bundle, prompts, tmp_path / "plain")
    assert plain.rewrites == ()
    session = open_session(smoothed.path, threads=1)
    for call in smoothed.calls:
        answer = session.run(call.feeds)["last_hidden_state"]
        assert relative(answer, call.outputs["last_hidden_state"]) < 1e-4
    (unit,) = (unit for unit in smoothed.units if unit.id == "node.fc1")
    low, high = smoothed.found.ranges[unit.data]
    peak = max(abs(low), abs(high))
    assert 0.3 * peak < float(smoothed.found.channel_max[unit.data].max()) < 3 * peak, "calibrated again, smoothed"
    assert peak < LOUD


def test_smoothing_keeps_accuracy_in_the_lowered_graph(small_bundle: Bundle, prompts: Path, tmp_path: Path) -> None:
    """The twin is the same part, lowered without it: its first product loses more, by the part's own answers."""
    loud = read_bundle(write_bundle(tmp_path / "loud.bundle", with_a_loud_channel()))
    smoothed = encoder_of(loud, prompts, tmp_path / "work")
    requests = picture_requests(loud, prompts)[0][:4]
    workload = PictureWorkload(loud, requests, threads=1)
    floats = TARGETS["cuda"]  # has no 8-bit activations, so nothing is smoothed for it
    parts = prepare_pictures(loud, requests, workload, workload, floats, tmp_path / "not", lambda what, share: None)
    rough = next(part for part in parts if part.part == "text_encoder")
    assert rough.rewrites == ()
    lost = []
    for part in (smoothed, rough):
        made = make(part, {"node.fc1": "w8a8"}, CPU, tmp_path / "made" / str(len(lost)))
        own = CallsWorkload(part.part, part.calls, ["nsr"])
        answers = own.run({part.part: open_session(made.path, threads=1)})
        lost.append(errors((NSR,), own.reference, answers)["nsr"])
    assert 0 < lost[0] < 0.5 * lost[1]


def test_the_account_of_a_part(small_measured: Measured, tmp_path: Path) -> None:
    """A denoiser's errors are the sample's, a decoder's count as they are, an encoder's by what is left of them."""
    unet, encoder, decoder = (called(small_measured, name) for name in ("unet", "text_encoder", "vae_decoder"))
    assert unet.account("content") == ("content", 1.0)
    assert decoder.account("quality") == ("quality", 1.0)
    own, scale = encoder.account("content")
    assert own == "nsr"
    made = make(encoder, {unit.id: "w4a16-32" for unit in encoder.units}, CPU, tmp_path)
    replaced = {encoder.part: open_session(made.path, threads=1)}
    workload, alone = small_measured.workload, CallsWorkload(encoder.part, encoder.calls, ["nsr"])
    there = errors(workload.metrics, workload.run({}), workload.run(replaced))["content"]
    here = errors((NSR,), alone.reference, alone.run(replaced))["nsr"]
    assert 0.2 < scale * here / there < 5
    scores = Scores(("a",), ("fp32", "fp16"), {"nsr": np.array([[[0.0, 0.0], [3.0, 4.0]]], np.float32)}, "scan")
    np.testing.assert_allclose(encoder.entered("content", scores), [[0.0, 25 * scale]])


def test_runs_and_gains_of_calls(small_measured: Measured) -> None:
    """How often a request runs a part, gains of the denoiser's runs alone, and a deployed run of one picture."""
    parts = small_measured.parts
    assert {part.part: part.runs for part in parts} == {"text_encoder": 1.0, "unet": 2.0, "vae_decoder": 1.0}
    for part in parts:
        has_gain = [bool(call.gain) for call in part.calls]
        assert all(has_gain) if part.part == "unet" else not any(has_gain)
        batches = {len(value) for value in part.deployed.feeds.values()}
        assert batches == {1}


def test_weights_that_meet_floats_are_rounded_with_their_inputs_in_mind(small_measured: Measured) -> None:
    """No worse than to nearest, weighed by how large each input is; what meets integers is rounded to nearest."""
    unet = called(small_measured, "unet")
    model, rounded = load_graph(unet.path), rounder(unet)
    for unit in unet.units:
        if unit.op != "MatMul":
            continue
        matrix = weight_matrix(model, unit)
        moments = unet.found.moments[unit.data]
        for name in ("w4a16-32", "w8a8"):
            choice = get_choice(name)
            ours, nearest = (
                restore(each) for each in (rounded(matrix, choice, 7, unit), store(matrix, choice, code_bits=7))
            )
            lost, usual = (float((np.square(each - matrix) * moments).sum()) for each in (ours, nearest))
            assert lost <= usual * (1 + 1e-6), (unit.id, name)
            if CHOICES[name].activation != "float":
                np.testing.assert_array_equal(ours, nearest)
            else:
                assert lost < 0.95 * usual, unit.id
