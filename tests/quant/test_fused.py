"""Kernels are read from the engine's own optimised graph, and one that is missing is named."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from edgekit.errors import DeviceMissing, GateFailed, KernelsMissing, SessionFailed, UnknownDevice
from edgekit.quant.fused import check_fused, kernels
from edgekit.quant.graph import Unit, find_units, load_graph, normalised
from edgekit.quant.lower import lower
from edgekit.runtime.backends import open_session
from edgekit.runtime.backends.devices import engine
from tests.quant.lowering import (
    STRICT,
    attention_graph,
    best_integers,
    convolution,
    graph,
    linear,
    lowered,
    table_graph,
    value,
    wide_ranges,
)


def units_of(model: ir.Model) -> tuple[Unit, ...]:
    return find_units(normalised(model))


def written(folder: Path, model: ir.Model) -> Path:
    """A graph as it is, in a file."""
    path = folder / "plain.onnx"
    ir.save(model, path, external_data="plain.onnx.data")
    return path


def test_a_float_graph_has_float_kernels(tmp_path: Path):
    """Counts are of the graph that runs: here a product and its bias, nothing of integers."""
    found = kernels(written(tmp_path, linear(16, 32)))
    assert found == Counter({"MatMul": 1, "Add": 1})


def test_layout_changes_are_seen(tmp_path: Path):
    """The graph is the one after every optimisation, also those for this processor alone."""
    found = kernels(written(tmp_path, convolution(16, 16, 3)))
    assert found["Conv"] == 1
    assert sum(found.values()) > 1


def test_a_lowered_graph_has_what_was_planned(tmp_path: Path):
    """Every family is counted as planned and as found."""
    units = units_of(attention_graph())
    choices = best_integers(units) | {"up": "w4a16-32", "down": "w8a8-row"}
    made = lowered(tmp_path, attention_graph(), choices, wide_ranges(units), STRICT)
    result = check_fused(made.path, units, choices)
    assert result.planned == {"QLinearConv": 2, "integer MatMul": 5, "MatMulNBits": 1}
    assert result.found == result.planned


@pytest.mark.parametrize("choices", [{}, {"first": "fp32"}, {"first": "fp16", "conv1": "fp16", "up": "fp16"}])
def test_floats_plan_no_kernels(choices: dict[str, str], tmp_path: Path):
    """Nothing planned, nothing missing."""
    units = units_of(attention_graph())
    made = lowered(tmp_path, attention_graph(), choices)
    result = check_fused(made.path, units, choices)
    assert result.planned == result.found == {}


def test_a_table_plans_no_kernel(tmp_path: Path):
    """A Gather's choice is storage alone."""
    units = units_of(table_graph())
    made = lowered(tmp_path, table_graph(), "fp16")
    assert check_fused(made.path, units, {"rows": "fp16"}).planned == {}


def test_a_graph_that_was_not_lowered_fails_the_gate(tmp_path: Path):
    """Planned and absent: how many of how many, and whose, of each family."""
    path = written(tmp_path, attention_graph())
    units = units_of(attention_graph())
    choices = best_integers(units) | {"up": "w4a16-32"}
    with pytest.raises(KernelsMissing) as why:
        check_fused(path, units, choices)
    message = str(why.value)
    assert "0 of 2 planned QLinearConv nodes (not conv1, conv2)" in message
    assert "0 of 5 planned integer MatMul" in message
    assert "0 of 1 planned MatMulNBits nodes (not up)" in message
    assert "plain.onnx on cpu" in message
    assert isinstance(why.value, GateFailed)
    assert why.value.exit_code == 3


def test_the_one_unit_that_is_missing_is_named(tmp_path: Path):
    """The engine keeps node names, so of many units the one that stayed float is told apart."""
    units = units_of(attention_graph())
    made = lowered(tmp_path, attention_graph(), best_integers(units) | {"conv2": "fp16"}, wide_ranges(units), STRICT)
    with pytest.raises(KernelsMissing, match=r"1 of 2 planned QLinearConv nodes \(not conv2\)"):
        check_fused(made.path, units, best_integers(units))


def test_many_units_are_counted_and_a_few_named(tmp_path: Path):
    """A message stays a line."""
    rng = np.random.default_rng(0)
    weights = {f"w{i}": rng.standard_normal((16, 16)).astype(np.float32) for i in range(9)}
    nodes = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"], name=f"layer{i}") for i in range(9)]
    model = graph(nodes, weights, [value("x0", ["n", 16])], [value("x9", ["n", 16])])
    units = units_of(model)
    with pytest.raises(KernelsMissing, match=r"0 of 9 .*layer0.*layer5 and 3 more"):
        check_fused(written(tmp_path, model), units, {unit.id: "w4a16-32" for unit in units})


def test_a_convolution_whose_output_is_not_rounded_is_not_fused(tmp_path: Path):
    """What a wrong spelling looks like: every operator is there, and no QLinearConv comes of it."""
    made = lowered(tmp_path, convolution(16, 8, 3), "w8a8", {"x": (-4, 4), "y": (-9, 9)})
    units = units_of(convolution(16, 8, 3))
    assert check_fused(made.path, units, {"product": "w8a8"}).found == {"QLinearConv": 1}
    model = ir.load(made.path)
    output = next(node for node in model.graph if node.op_type == "Conv").outputs[0]
    last = model.graph.outputs[0]
    narrow, widen = output.uses()[0].node, last.producer()
    output.type, output.shape = last.type, last.shape
    output.name, last.name = "y", "unread"
    model.graph.outputs[0] = output
    model.graph.remove([widen])
    model.graph.remove([narrow])
    with pytest.raises(KernelsMissing, match=r"0 of 1 planned QLinearConv nodes \(not product\)"):
        check_fused(written(tmp_path, model), units, {"product": "w8a8"})


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The engine's graph and its weights go to a temporary folder that is gone afterwards."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    path = written(tmp_path, linear(128, 256))
    before = sorted(os.listdir(tmp_path))
    kernels(path)
    assert sorted(os.listdir(tmp_path)) == before
    assert os.listdir(tmp_path / "scratch") == []


def test_devices_and_graphs_that_do_not_open_are_told_apart(tmp_path: Path):
    """No such device, a device this wheel is not built for, a graph that is none."""
    path = written(tmp_path, linear(16, 32))
    with pytest.raises(UnknownDevice, match="tpu"):
        kernels(path, "tpu")
    if "cuda" not in engine().devices:
        with pytest.raises(DeviceMissing, match="cuda"):
            kernels(path, "cuda:0")
    path.write_bytes(b"no graph")
    with pytest.raises(SessionFailed, match=r"plain\.onnx"):
        kernels(path)


@pytest.fixture
def emoji_unet(emoji_bundle: Path) -> Path:
    """The denoiser of the shipped emoji model."""
    return emoji_bundle / "graphs" / "unet.onnx"


def emoji_feed(seed: int) -> dict[str, np.ndarray]:
    """Inputs of the size the model draws at."""
    rng = np.random.default_rng(seed)
    shapes = {"sample": (1, 12, 16, 16), "encoder_hidden_states": (1, 16, 160), "timestep_cond": (1, 64)}
    feed = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return feed | {"timestep": np.full(1, 999, np.float32)}


def observed(path: Path, folder: Path) -> dict[str, tuple[float, float]]:
    """Lowest and highest of every unit's input and output, by listing all of them as outputs."""
    model = normalised(load_graph(path))
    units = find_units(model)
    values = {each.name: each for node in model.graph for each in node.outputs}
    names = dict.fromkeys(name for unit in units for name in (unit.data, unit.output) if name in values)
    model.graph.outputs.extend(values[name] for name in names if not values[name].is_graph_output())
    ir.save(model, folder / "observed.onnx", external_data="observed.onnx.data")
    session = open_session(folder / "observed.onnx")
    feeds = [emoji_feed(seed) for seed in range(2)]
    runs = [feed | session.run(feed) for feed in feeds]
    return {
        name: (min(float(run[name].min()) for run in runs), max(float(run[name].max()) for run in runs))
        for name in dict.fromkeys(name for unit in units for name in (unit.data, unit.output))
    }


@pytest.mark.slow
@pytest.mark.torch
def test_the_emoji_unet_fuses_as_a_whole(emoji_unet: Path, tmp_path: Path):
    """Of a real denoiser every allowed Conv is QLinearConv and every MatMul an integer one, and it still draws."""
    model = normalised(load_graph(emoji_unet))
    units = find_units(model)
    choices = best_integers(units)
    plain_bytes = emoji_unet.with_name("unet.onnx.data").stat().st_size
    lower(model, units, choices, observed(emoji_unet, tmp_path), STRICT)
    path = tmp_path / "unet.onnx"
    ir.save(model, path, external_data="unet.onnx.data")
    result = check_fused(path, units, choices)
    assert result.found == result.planned == {"QLinearConv": 42, "integer MatMul": 43}
    assert path.with_name("unet.onnx.data").stat().st_size < 0.4 * plain_bytes
    feed = emoji_feed(9)
    got, plain = (open_session(each).run(feed)["out_sample"] for each in (path, emoji_unet))
    # One Conv carries half of the error and ten nearly all: to leave them out is what a plan is for.
    assert np.square(got - plain).sum() < 0.05 * np.square(plain).sum()
