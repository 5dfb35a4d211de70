"""Shortcuts taken apart, and a plan's rewrites done again: exact in float, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.errors import BadRequest
from edgekit.quant.graph import find_units, initializer
from edgekit.quant.plan import PartChoices, PrecisionPlan, Rewrite, encode_plan, parse_plan
from edgekit.quant.rewrite import (
    ConstantRows,
    Constants,
    apply_rewrites,
    find_constant_rows,
    smooth,
    smoothing_factors,
    split_bos,
    split_rows,
    split_shortcuts,
)
from tests.quant.tiny_graphs import (
    CHANNELS,
    WIDTH,
    Graph,
    normal_form,
    prompts,
    relative,
    run,
    tiny_unet,
    two_texts,
    unet_feeds,
)

TEXT = "encoder_hidden_states"
PEAKS = {name: np.linspace(0.5, 8, CHANNELS) for name in ("norm1", "norm2")}


def concatenated(channels: tuple[int, ...], infer: bool = True, **attributes: Any) -> ir.Model:
    """A 3x3 convolution of the concatenation of as many convolutions, with a bias."""
    make, total = Graph(1), sum(channels)
    group = attributes.pop("group", 1)
    first = make("Conv", "x", make.normal(16, 4, 1, 1))
    parts = [make("Conv", make("Tanh", first), make.normal(count, 16, 1, 1), name=f"part{count}") for count in channels]
    joined = make("Concat", *parts, axis=attributes.pop("axis", 1), name="joined")
    weight, bias = make.normal(12, total // group, 3, 3), make.normal(12, 1)[:, 0]
    inner = make("Conv", joined, weight, bias, name="wide", group=group, **attributes)
    make("Conv", make("Tanh", inner), make.normal(4, 12, 3, 3), name="y", pads=[1] * 4)
    return normal_form(make.done({"x": ("b", 4, "h", "w")}, {"y": ("b", 4, "h2", "w2")}, infer=infer))


def picture(seed: int = 0) -> dict[str, np.ndarray]:
    """What `concatenated` takes."""
    return {"x": np.random.default_rng(seed).standard_normal((2, 4, 7, 9)).astype(np.float32)}


@pytest.mark.parametrize("infer", [True, False], ids=["shapes", "no-shapes"])
def test_a_shortcut_becomes_a_sum(infer: bool) -> None:
    """The 1x1 convolution of the raw concatenation is two, of the same role, to 1e-5; one on its activation is not."""
    model, feeds = normal_form(tiny_unet(infer=infer)), unet_feeds(prompts(2))
    for value in (output for node in model.graph for output in node.outputs if output.name == "hidden"):
        value.shape = None  # its channels follow from the weights and the other half
    before, units = run(model, feeds)["out_sample"], {unit.id: unit for unit in find_units(model)}
    done = split_shortcuts(model, find_units(model))
    if not infer:
        assert done == ()  # of neither half is it known
        return
    assert done == (Rewrite("shortcut", "node.shortcut"),)
    assert relative(run(model, feeds)["out_sample"], before) < 1e-5
    after = {unit.id: unit for unit in find_units(model)}
    assert set(units) - set(after) == {"node.shortcut"}
    assert set(after) - set(units) == {"node.shortcut.0", "node.shortcut.1"}
    assert [after[f"node.shortcut.{i}"].role for i in (0, 1)] == ["shortcut"] * 2
    assert [after[f"node.shortcut.{i}"].data for i in (0, 1)] == ["hidden", "conv_in"]
    assert sum(after[f"node.shortcut.{i}"].k for i in (0, 1)) == units["node.shortcut"].k
    assert "shortcut.1" not in model.graph.initializers  # the whole weight is not kept beside its halves


@pytest.mark.parametrize(
    "attributes",
    [{}, {"pads": [1, 1, 1, 1], "strides": [2, 2]}, {"dilations": [2, 2]}, {"axis": -3}],
    ids=["plain", "strided", "dilated", "axis"],
)
@pytest.mark.parametrize("channels", [(8, 24), (8, 16, 40)], ids=["two", "three"])
def test_any_convolution_of_a_concatenation(channels: tuple[int, ...], attributes: dict[str, Any]) -> None:
    """Of two or three values, with whatever kernel, stride and padding: the weights side by side are the whole."""
    model = concatenated(channels, **attributes)
    before, whole = run(model, picture())["y"], initializer(model, "wide.1").numpy()
    bias = initializer(model, "wide.2").numpy()
    assert split_shortcuts(model, find_units(model)) == (Rewrite("shortcut", "node.wide"),)
    assert relative(run(model, picture())["y"], before) < 1e-5
    parts = [node for node in model.graph if str(node.name).startswith("node.wide.") and node.op_type == "Conv"]
    assert [node.name for node in parts] == [f"node.wide.{index}" for index in range(len(channels))]
    halves = [node.inputs[1].const_value.numpy() for node in parts]
    assert [half.shape[1] for half in halves] == list(channels)
    assert np.array_equal(np.concatenate(halves, axis=1), whole)
    assert [len(node.inputs) for node in parts] == [3] + [2] * (len(channels) - 1)
    assert np.array_equal(parts[0].inputs[2].const_value.numpy(), bias)
    assert all([str(dim) for dim in node.outputs[0].shape][1] == "12" for node in parts)


def test_what_cannot_be_taken_apart_stays() -> None:
    """Groups, a concatenation of rows, inputs of the graph side by side: not a byte changes."""
    make = Graph()
    make("Conv", make("Concat", "x", "m", axis=1), make.normal(16, 8, 3, 3), name="in", pads=[1] * 4)
    make("Conv", make("Tanh", "in"), make.normal(4, 16, 3, 3), name="y", pads=[1] * 4)
    shape = ("b", 4, "h", "w")
    inputs = normal_form(make.done({"x": shape, "m": shape}, {"y": shape}))
    for model in (concatenated((8, 24), group=2), _rows_joined(), inputs):
        before = ir.to_proto(model).SerializeToString()
        assert split_shortcuts(model, find_units(model)) == ()
        assert ir.to_proto(model).SerializeToString() == before


def _rows_joined() -> ir.Model:
    make = Graph()
    a, b = (make("Conv", make("Tanh", "x"), make.normal(16, 4, 1, 1), name=name) for name in "ab")
    make("Conv", make("Concat", a, b, axis=2), make.normal(16, 16, 1, 1), name="in")
    make("Conv", make("Tanh", "in"), make.normal(4, 16, 3, 3), name="y")
    return normal_form(make.done({"x": ("b", 4, "h", "w")}, {"y": ("b", 4, "h2", "w2")}))


def test_a_half_with_its_own_scale_rounds_better() -> None:
    """Where one half is 20 times larger, two scales of eight bits lose less than half of what one does."""
    random = np.random.default_rng(0)
    halves = [20 * random.standard_normal((1000, 16)), random.standard_normal((1000, 16))]
    weight = random.standard_normal((32, 16))
    rounded = [np.rint(half / (scale := np.abs(half).max() / 127)) * scale for half in halves]
    scale = np.abs(np.concatenate(halves)).max() / 127
    joint = [np.rint(half / scale) * scale for half in halves]
    errors = [
        np.linalg.norm((np.concatenate(each, 1) - np.concatenate(halves, 1))[:, 16:] @ weight[16:])
        for each in (joint, rounded)
    ]
    assert errors[1] < errors[0] / 2


def all_passes(model: ir.Model, rows: ConstantRows) -> tuple[tuple[Rewrite, ...], Constants]:
    """Every rewrite there is, and the numbers to do it again."""
    done = split_bos(model, find_units(model), TEXT, rows)
    done += split_shortcuts(model, find_units(model))
    factors = smoothing_factors(model, find_units(model), PEAKS)
    done += smooth(model, find_units(model), PEAKS)
    return done, Constants({TEXT: rows}, factors)


def test_a_plan_repeats_what_was_done(tmp_path: Path) -> None:
    """Rewrites through the plan's JSON and constants through their file make the same graph, bit for bit."""
    model, again = normal_form(tiny_unet()), normal_form(tiny_unet())
    done, constants = all_passes(model, find_constant_rows([prompts(3)]))
    assert [each.kind for each in done] == ["bos", "bos", "shortcut", "smooth", "smooth"]
    constants.save(tmp_path / "plan.npz")
    plan = PrecisionPlan("cpu", {"unet": PartChoices({}, rewrites=done)})
    read = parse_plan(encode_plan(plan), "plan.json")
    apply_rewrites(again, read.parts["unet"].rewrites, Constants.load(tmp_path / "plan.npz"))
    assert ir.to_proto(again).SerializeToString() == ir.to_proto(model).SerializeToString()
    feeds = unet_feeds(prompts(2))
    assert relative(run(again, feeds)["out_sample"], run(normal_form(tiny_unet()), feeds)["out_sample"]) < 1e-5


def test_the_order_of_rewrites_does_not_matter() -> None:
    """They touch different products: any order gives the same answers."""
    model = normal_form(tiny_unet())
    done, constants = all_passes(model, find_constant_rows([prompts(3)]))
    other = normal_form(tiny_unet())
    apply_rewrites(other, done[::-1], constants)
    feeds = unet_feeds(prompts(2))
    assert np.array_equal(run(other, feeds)["out_sample"], run(model, feeds)["out_sample"])
    assert [unit.id for unit in find_units(other)] == [unit.id for unit in find_units(model)]


def test_products_of_two_texts_are_repeated() -> None:
    """Both constants are looked up by the names that the rewrite joins."""
    text, second = prompts(3, width=16), prompts(3, width=24)
    rows = {"text": find_constant_rows([text]), "text_2": find_constant_rows([second])}
    model, again = two_texts(), two_texts()
    done = split_rows(model, find_units(model), rows)
    apply_rewrites(again, done, Constants(rows))
    assert ir.to_proto(again).SerializeToString() == ir.to_proto(model).SerializeToString()
    with pytest.raises(BadRequest, match="'text_2' has no constants"):
        apply_rewrites(two_texts(), done, Constants({"text": rows["text"]}))


def test_part_of_a_plan_can_be_repeated() -> None:
    """A person took one key out of the plan: the other products are as they were."""
    model, rows = normal_form(tiny_unet()), find_constant_rows([prompts(3)])
    apply_rewrites(model, (Rewrite("bos", "node.to_k", TEXT),), Constants({TEXT: rows}))
    data = {unit.id: unit.data for unit in find_units(model)}
    assert (data["node.to_k"], data["node.to_v"]) == (f"{TEXT}.rest", TEXT)


@pytest.mark.parametrize(
    ("rewrite", "told"),
    [
        (Rewrite("bos", "node.to_k", "sample"), "nothing of the kind"),
        (Rewrite("bos", "node.to_q", TEXT), "nothing of the kind"),
        (Rewrite("bos", "node.to_k", "elsewhere"), "no constants"),
        (Rewrite("shortcut", "node.conv1"), "nothing of the kind"),
        (Rewrite("shortcut", "node.missing"), "node.missing"),
        (Rewrite("smooth", "node.to_out"), "no constants"),
        (Rewrite("smooth", "node.missing"), "node.missing"),
    ],
)
def test_a_plan_of_another_graph_is_refused(rewrite: Rewrite, told: str) -> None:
    """A product that is not there, one that the rewrite does not fit, and constants nobody gave."""
    rows = find_constant_rows([prompts(3)])
    with pytest.raises(BadRequest, match=told):
        apply_rewrites(normal_form(tiny_unet()), (rewrite,), Constants({TEXT: rows, "sample": rows}))


def test_no_rewrites_change_nothing() -> None:
    """An empty plan needs no constants."""
    model = normal_form(tiny_unet())
    before = ir.to_proto(model).SerializeToString()
    apply_rewrites(model, ())
    assert ir.to_proto(model).SerializeToString() == before


def test_constants_come_back_as_they_were(tmp_path: Path) -> None:
    """Names with slashes and dots too; rows that no pass can use are not kept."""
    rows = ConstantRows((0, 1), np.random.default_rng(0).standard_normal((2, WIDTH)).astype(np.float32))
    middle = ConstantRows((3,), np.ones((1, WIDTH), np.float32))
    constants = Constants({"/text/a.b": rows, "middle": middle}, {"/norm/x": np.linspace(1, 2, 5)})
    constants.save(tmp_path / "c.npz")
    back = Constants.load(tmp_path / "c.npz")
    assert list(back.rows) == ["/text/a.b"]
    assert back.rows["/text/a.b"].rows == (0, 1)
    assert np.array_equal(back.rows["/text/a.b"].values, rows.values)
    assert np.array_equal(back.factors["/norm/x"], constants.factors["/norm/x"])


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 no zip", b"text"])
def test_a_file_that_holds_no_constants_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """Missing, empty, truncated, or something else; arrays of another purpose too."""
    path = tmp_path / "c.npz"
    np.savez(path, weights=np.ones(3))
    with pytest.raises(BadRequest, match="'weights' is none of theirs"):
        Constants.load(path)
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(BadRequest, match="no constants"):
        Constants.load(path)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadRequest, match=r"c\.npz holds no constants"):
        Constants.load(path)
