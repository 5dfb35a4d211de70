"""Each rewriting on a graph of a few nodes: what it changes, what it leaves, and the numbers before and after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from edgekit.bundle.graphfile import read_graph
from edgekit.bundle.manifest import TensorSpec
from edgekit.errors import BadSource, UnsupportedModel
from edgekit.export.onnx_folder import surgery
from edgekit.runtime.backends import open_session
from tests.bundle.tiny import model

ELEMENT = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "float64": TensorProto.DOUBLE}
TIMES = np.array([7, 3], "float32")
SHAPES = {"timestep": ("batch",), "sample": ("batch", 2), "y": ("batch", 2)}


def quiet(_what: str, _share: float) -> None:
    """Progress nobody looks at."""


def timed(dtype: str, shape: tuple, nodes: list, extra: dict | None = None) -> ir.Model:
    """sample + a time that `nodes` make a `t` of."""
    weights = {"zero": np.array([0]), "one": np.array([1]), **(extra or {})}
    last = [
        helper.make_node("Unsqueeze", ["t", "one"], ["column"]),
        helper.make_node("Add", ["sample", "column"], ["y"]),
    ]
    made = model([*nodes, *last], [("sample", "float32", ("b", 2))], [("y", "float32", ("b", 2))], weights, 18)
    made.graph.input.insert(1, helper.make_tensor_value_info("timestep", ELEMENT[dtype], shape))
    return ir.from_proto(made)


def expand(source: str) -> list:
    """`source`, a vector of one, expanded to the batch as `t`."""
    return [
        helper.make_node("Shape", ["sample"], ["size"], start=0, end=1),
        helper.make_node("Expand", [source, "size"], ["t"]),
    ]


def cast(source: str, to: str) -> list:
    return [helper.make_node("Cast", [source], [to], to=TensorProto.FLOAT)]


def unsqueeze(source: str, to: str) -> list:
    return [helper.make_node("Unsqueeze", [source, "zero"], [to])]


def written(made: ir.Model, folder: Path, shapes=SHAPES) -> Path:
    """The model as a file."""
    graph = folder / "g.onnx"
    surgery.write(made, shapes, graph, quiet)
    return graph


# (element type, shape, nodes from `timestep` to `t`) -> whether each row keeps its own time
SCALARS = {
    "scalar": ("float32", (), [*unsqueeze("timestep", "v"), *expand("v")], "each"),
    "scalar, cast after": ("float32", (), [*unsqueeze("timestep", "u"), *cast("u", "v"), *expand("v")], "each"),
    "integer scalar": ("int64", (), [*unsqueeze("timestep", "u"), *cast("u", "v"), *expand("v")], "each"),
    "double scalar": ("float64", (), [*unsqueeze("timestep", "u"), *cast("u", "v"), *expand("v")], "each"),
    "scalar used otherwise": (
        "float32",
        (),
        [helper.make_node("Mul", ["timestep", "half"], ["m"]), *unsqueeze("m", "v"), *expand("v")],
        "one",
    ),
    "scalar used twice": (
        "float32",
        (),
        [
            *unsqueeze("timestep", "v"),
            helper.make_node("Shape", ["sample"], ["size"], start=0, end=1),
            helper.make_node("Expand", ["v", "size"], ["e"]),
            helper.make_node("Add", ["e", "timestep"], ["s"]),
            helper.make_node("Mul", ["s", "half"], ["t"]),
        ],
        "one",
    ),
    "vector of one": ("float32", (1,), expand("timestep"), "one"),
    "vector": ("float32", ("steps",), expand("timestep"), "each"),
    "integer vector": ("int64", ("steps",), [*cast("timestep", "v"), *expand("v")], "each"),
}


@pytest.mark.parametrize("case", SCALARS)
def test_times_become_a_vector(tmp_path: Path, case: str) -> None:
    """float32 (batch,) whatever it was; each row's own time where the graph only spread it, else the first row's."""
    dtype, shape, nodes, kind = SCALARS[case]
    half = np.float32(0.5 if "twice" in case else 1.0)
    made = timed(dtype, shape, nodes, {"half": half})
    assert surgery.vector_timestep(made) == kind
    session = open_session(written(made, tmp_path))
    assert [(spec.name, spec.dtype, spec.shape) for spec in session.inputs] == [
        ("sample", "float32", ("batch", 2)),
        ("timestep", "float32", ("batch",)),
    ]
    sample = np.arange(4, dtype=np.float32).reshape(2, 2)
    right = sample + (TIMES if kind == "each" else TIMES[:1])[:, None]
    np.testing.assert_array_equal(session.run({"sample": sample, "timestep": TIMES})["y"], right)
    alone = session.run({"sample": sample[1:], "timestep": TIMES[1:]})["y"]
    np.testing.assert_array_equal(alone, sample[1:] + 3)


def test_two_inputs_take_the_place_of_one(tmp_path: Path) -> None:
    """Joined along the last axis inside, in the order given, where the one stood among the inputs."""
    square = helper.make_node("Mul", ["states", "states"], ["y"])
    rows = [("a", "float32", ("b", 1)), ("states", "float32", ("b", "n", 5)), ("z", "float32", ("b", 1))]
    made = ir.from_proto(model([square], rows, [("y", "float32", ("b", "n", 5))], {}, 18))
    surgery.join_inputs(made, "states", {"states": 2, "states_2": 3}, axis=2)
    shapes = {"a": ("b", 1), "z": ("b", 1), "states": ("b", "n", 2), "states_2": ("b", "n", 3), "y": ("b", "n", 5)}
    session = open_session(written(made, tmp_path, shapes))
    assert [spec.name for spec in session.inputs] == ["a", "states", "states_2", "z"]
    left, right = np.ones((1, 4, 2), "float32"), np.full((1, 4, 3), 2, "float32")
    one = np.zeros((1, 1), "float32")
    out = session.run({"a": one, "states": left, "states_2": right, "z": one})["y"]
    np.testing.assert_array_equal(out, np.concatenate([left, right * 2], axis=2))


def test_the_first_channels_keep_the_name(tmp_path: Path) -> None:
    """Of mean and log-variance the mean is left, under the output's name."""
    made = ir.from_proto(
        model(
            [helper.make_node("Neg", ["x"], ["z"])],
            [("x", "float32", ("b", 4, 3))],
            [("z", "float32", ("b", 4, 3))],
            {},
            18,
        )
    )
    surgery.first_channels(made, "z", 2)
    session = open_session(written(made, tmp_path, {"x": ("b", 4, 3), "z": ("b", 2, 3)}))
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype("float32")
    np.testing.assert_array_equal(session.run({"x": x})["z"], -x[:, :2])


HEADS = {  # how the logits are made of `x` -> whether rows are taken before the product
    "product": ([helper.make_node("MatMul", ["x", "w"], ["logits"])], True),
    "product with a transposed weight": (
        [
            helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "wt"], ["logits"]),
        ],
        True,
    ),
    "soft cap": (
        [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Tanh", ["m"], ["logits"])],
        False,
    ),
    "no weight": (
        [helper.make_node("Identity", ["x"], ["i"]), helper.make_node("MatMul", ["x", "i"], ["logits"])],
        False,
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_rows_are_selected_before_the_last_product(tmp_path: Path, case: str) -> None:
    """Any rows in any order; before the product with a weight, else from what is made."""
    nodes, before = HEADS[case]
    weights = {"w": np.random.default_rng(1).normal(size=(3, 3)).astype("float32")}
    proto = model(nodes, [("x", "float32", ("b", 3, 3))], [("logits", "float32", ("b", 3, 3))], weights, 18)
    x = np.random.default_rng(2).normal(size=(1, 3, 3)).astype("float32")
    onnx.save(proto, tmp_path / "before.onnx")
    right = open_session(tmp_path / "before.onnx").run({"x": x})["logits"]
    made = ir.from_proto(proto)
    surgery.select_rows(made)
    graph = written(made, tmp_path, {"x": ("b", 3, 3), "rows": ("rows",), "logits": ("b", "rows", 3)})
    given = open_session(graph).run({"x": x, "rows": np.array([2, 0])})["logits"]
    np.testing.assert_allclose(given, right[:, [2, 0]], atol=1e-6)
    gather = next(node for node in onnx.load(graph).graph.node if node.op_type == "Gather")
    assert (gather.input[0] == "x") == before


def test_half_precision_logits_become_float(tmp_path: Path) -> None:
    """The contract's logits are float32; those that are so already get no Cast."""
    proto = model(
        [helper.make_node("Neg", ["x"], ["logits"])], [("x", "float32", (2,))], [("logits", "float32", (2,))], {}, 18
    )
    made = ir.from_proto(proto)
    surgery.output_as_float(made, "logits")
    assert len(list(made.graph)) == 1
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    made = ir.from_proto(proto)
    surgery.output_as_float(made, "logits")
    session = open_session(written(made, tmp_path, {"x": (2,), "logits": (2,)}))
    assert session.outputs == (TensorSpec("logits", "float32", (2,)),)
    assert session.run({"x": np.array([1, 2], "float16")})["logits"].tolist() == [-1, -2]


def test_what_only_dropped_outputs_needed_goes_too(tmp_path: Path) -> None:
    """An exporter's other outputs cost nothing, and neither do their weights."""
    nodes = [helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Add", ["x", "w"], ["z"])]
    weights = {"w": np.arange(2, dtype=np.float32)}
    outputs = [("y", "float32", (2,)), ("z", "float32", (2,))]
    made = ir.from_proto(model(nodes, [("x", "float32", (2,))], outputs, weights, 18))
    assert surgery.parameters(made) == 2
    surgery.keep_outputs(made, ["y"])
    assert surgery.parameters(made) == 0
    assert [node.op_type for node in made.graph] == ["Neg"]


def test_a_name_that_is_taken_inside_gives_way(tmp_path: Path) -> None:
    """Renaming an output to the name of an inner value leaves both, apart."""
    nodes = [helper.make_node("Neg", ["x"], ["hidden"]), helper.make_node("Neg", ["hidden"], ["out.1"])]
    made = ir.from_proto(model(nodes, [("x", "float32", (2,))], [("out.1", "float32", (2,))], {}, 18))
    surgery.rename(made, surgery.value_named(made.graph.outputs, "out.1"), "hidden")
    session = open_session(written(made, tmp_path, {"x": (2,), "hidden": (2,)}))
    x = np.array([1, 2], "float32")
    np.testing.assert_array_equal(session.run({"x": x})["hidden"], x)


def test_weights_that_are_listed_as_inputs_are_weights(tmp_path: Path) -> None:
    """Graphs of the first IR versions list every initializer among the inputs; nobody has to feed them."""
    proto = model(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        [("x", "float32", (2,))],
        [("y", "float32", (2,))],
        {"w": np.ones(2, "float32")},
        18,
    )
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, (2,)))
    onnx.save(proto, tmp_path / "old.onnx")
    made = surgery.load(tmp_path / "old.onnx")
    assert [value.name for value in made.graph.inputs] == ["x"]


def test_writing_moves_weights_into_one_file(tmp_path: Path) -> None:
    """From several data files, or links to them, to the bundle's own; small tensors stay in the graph."""
    source = tmp_path / "source"
    source.mkdir()
    weights = {"w": np.random.default_rng(0).normal(size=(64, 64)).astype("float32"), "b": np.ones(2, "float32")}
    proto = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [("x", "float32", ("n", 64))],
        [("y", "float32", ("n", 64))],
        weights,
        18,
    )
    onnx.save(proto, source / "model.onnx", save_as_external_data=True, location="model.onnx_data")
    (source / "model.onnx_data").rename(tmp_path / "blob")
    (source / "model.onnx_data").symlink_to(tmp_path / "blob")
    target = tmp_path / "target"
    target.mkdir()
    graph = written(surgery.load(source / "model.onnx"), target, {"x": ("n", 64), "y": ("n", 64)})
    assert {external.location for external in read_graph(graph).external} == {"g.onnx.data"}
    assert (target / "g.onnx.data").stat().st_size == 4 * 64 * 64
    x = np.eye(64, dtype=np.float32)
    np.testing.assert_allclose(open_session(graph).run({"x": x})["y"], weights["w"], atol=1e-6)


def test_what_is_no_valid_onnx_is_not_written_as_good(tmp_path: Path) -> None:
    """An operator with too few inputs passes every reader but the checker; a file that is none fails the reader."""
    made = ir.from_proto(
        model([helper.make_node("Add", ["x"], ["y"])], [("x", "float32", (2,))], [("y", "float32", (2,))], {}, 18)
    )
    with pytest.raises(UnsupportedModel, match="not valid ONNX"):
        written(made, tmp_path, {"x": (2,), "y": (2,)})
    (tmp_path / "bad.onnx").write_bytes(b"\x0a\xff\xff")
    with pytest.raises(BadSource, match="cannot be read"):
        surgery.load(tmp_path / "bad.onnx")


def test_an_input_nobody_reads_is_an_input_all_the_same(tmp_path: Path) -> None:
    """What the contract feeds can be fed."""
    made = ir.from_proto(
        model([helper.make_node("Neg", ["x"], ["y"])], [("x", "float32", (2,))], [("y", "float32", (2,))], {}, 18)
    )
    surgery.add_unused_input(made, TensorSpec("ids", "int64", ("n",)))
    session = open_session(written(made, tmp_path, {"x": (2,), "y": (2,), "ids": ("n",)}))
    assert session.run({"x": np.ones(2, "float32"), "ids": np.arange(3)})["y"].tolist() == [-1, -1]
