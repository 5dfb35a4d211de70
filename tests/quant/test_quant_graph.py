"""Normal form: every product with weights is a Conv or a MatMul of an initializer, and computes what it did before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from edgekit.errors import BadGraph
from edgekit.quant.graph import (
    SMALLEST,
    Unit,
    find_units,
    from_matrix,
    initializer,
    lazy_initializer,
    load_graph,
    normalised,
    weight_matrix,
)
from tests.quant.lowering import table_graph
from tests.quant.tiny_graphs import Graph, run

ROWS, K, N = 3, 24, 16


def plain(proto: onnx.ModelProto) -> ir.Model:
    """The graph as an exporter left it."""
    return ir.serde.deserialize_model(proto)


def data(shape: tuple[int, ...], seed: int = 5) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}


def same(before: ir.Model, feeds: dict[str, np.ndarray]) -> ir.Model:
    """The normal form, after the engine said that both compute the same."""
    after = normalised(before)
    for wanted, got in zip(run(before, feeds).values(), run(after, feeds).values(), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
    return after


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def gemm(bias: Any = None, *, last: bool = True, **attributes: Any) -> ir.Model:
    """x (3, 24) through one Gemm, the graph's output or not."""
    make = Graph()
    weight = make.normal(K, N)
    weight = weight.T.copy() if attributes.get("transB") else weight
    more = () if bias is None else (np.asarray(bias, np.float32),)
    made = make("Gemm", "x", weight, *more, name="fc", **attributes)
    out = made if last else make("Relu", made, name="relu")
    return plain(make.done({"x": (ROWS, K)}, {out: (ROWS, N)}))


# --------------------------------------------------------------------------------------------------- Gemm


@pytest.mark.parametrize("last", [True, False], ids=["output", "inner"])
@pytest.mark.parametrize("turned", [0, 1], ids=["straight", "transB"])
@pytest.mark.parametrize(
    "bias",
    [None, np.arange(N), np.arange(N)[None], np.arange(ROWS)[:, None], np.arange(ROWS * N).reshape(ROWS, N), 2.5],
)
def test_a_gemm_is_a_product_and_a_sum(bias: Any, turned: int, last: bool) -> None:
    """Of every kind of bias that a Gemm has, with the same value under the same name."""
    before = gemm(bias, last=last, transB=turned)
    after = same(before, data((ROWS, K)))
    expected = ["MatMul"] if bias is None else ["MatMul", "Add"]
    assert ops(after) == (expected if last else [*expected, "Relu"])
    assert [value.name for value in after.graph.outputs] == [value.name for value in before.graph.outputs]
    (unit,) = find_units(after)
    assert (unit.id, unit.op, unit.n, unit.k, unit.origin) == ("node.fc", "MatMul", N, K, "fc.1")
    np.testing.assert_array_equal(weight_matrix(after, unit), Graph().normal(K, N).T)


@pytest.mark.parametrize("attributes", [{"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}])
def test_another_gemm_is_left_alone(attributes: dict[str, Any]) -> None:
    """Scaled or turned data would need more than a product and a sum; it stays, and is no unit."""
    make = Graph()
    x = (K, ROWS) if "transA" in attributes else (ROWS, K)
    make("Gemm", "x", make.normal(K, N), make.normal(N, 1)[:, 0], name="fc", **attributes)
    after = same(plain(make.done({"x": x}, {"fc": (ROWS, N)})), data(x))
    assert ops(after) == ["Gemm"]
    assert find_units(after) == ()


def test_a_sum_takes_no_other_nodes_name() -> None:
    """A product may be called as the sum of another one would be; names stay unique, and units keep theirs."""
    make = Graph()
    first = make("Gemm", "x", make.normal(K, N), make.normal(N, 1)[:, 0], name="fc")
    make("MatMul", first, make.normal(N, N), name="out")
    proto = make.done({"x": (ROWS, K)}, {"out": (ROWS, N)})
    proto.graph.node[1].name = "node.fc.bias"
    after = same(plain(proto), data((ROWS, K)))
    names = [node.name for node in after.graph]
    assert len(set(names)) == len(names) == 3
    for unit in find_units(after):
        assert [node.op_type for node in after.graph if node.name == unit.id] == ["MatMul"]


# --------------------------------------------------------------------------------------------------- folding

FOLDS = {
    "turned": [("Transpose", {"perm": [1, 0]})],
    "turned by default": [("Transpose", {})],
    "widened": [("Cast", {"to": TensorProto.FLOAT})],
    "widened, then turned": [("Cast", {"to": TensorProto.FLOAT}), ("Transpose", {"perm": [1, 0]})],
    "turned, then widened": [("Transpose", {"perm": [1, 0]}), ("Cast", {"to": TensorProto.FLOAT})],
    "turned twice": [("Transpose", {"perm": [1, 0]}), ("Transpose", {"perm": [1, 0]})],
}


@pytest.mark.parametrize("chain", FOLDS.values(), ids=FOLDS)
@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_what_stands_between_a_weight_and_its_product_is_done_once(op: str, chain: list[tuple[str, Any]]) -> None:
    """Transposes and casts go, the function stays, and the origin is the initializer that is stored."""
    make = Graph()
    turns = sum(kind == "Transpose" for kind, _ in chain) % 2
    stored = make.normal(K, N).T if turns else make.normal(K, N)
    stored = stored.astype(np.float16 if any(kind == "Cast" for kind, _ in chain) else np.float32)
    value = make.constant("stored", stored)
    for kind, attributes in chain:
        value = make(kind, value, **attributes)
    make(op, "x", value, name="y")
    after = same(plain(make.done({"x": (ROWS, K)}, {"y": (ROWS, N)})), data((ROWS, K)))
    assert ops(after) == ["MatMul"]
    (unit,) = find_units(after)
    assert unit.origin == "stored"
    assert set(after.graph.initializers) == {unit.weight}
    np.testing.assert_array_equal(weight_matrix(after, unit), (stored if turns else stored.T).astype(np.float32))


def test_a_convolutions_weight_is_widened() -> None:
    """A cast before a Conv is folded alike; its kernel, group and attributes are untouched."""
    make = Graph()
    wide = make("Cast", make.normal(8, 4, 3, 3).astype(np.float16), to=TensorProto.FLOAT)
    make("Conv", "x", wide, name="y", pads=[1] * 4, group=2)
    after = same(plain(make.done({"x": (1, 8, 6, 5)}, {"y": (1, 8, 6, 5)})), data((1, 8, 6, 5)))
    (unit,) = find_units(after)
    assert ops(after) == ["Conv"]
    assert (unit.n, unit.k, unit.kernel, unit.group) == (8, 36, (3, 3), 2)


def test_what_is_computed_is_not_folded() -> None:
    """A product of two activations has no weights, turned or not."""
    make = Graph()
    make("MatMul", "x", make("Transpose", "x", perm=[1, 0]), name="y")
    after = same(plain(make.done({"x": (ROWS, K)}, {"y": (ROWS, ROWS)})), data((ROWS, K)))
    assert ops(after) == ["Transpose", "MatMul"]
    assert find_units(after) == ()


# --------------------------------------------------------------------------------------------------- tied weights


def test_tied_weights_have_one_origin() -> None:
    """A table that is gathered from and multiplied by, turned: two units, one origin, one matrix."""
    make = Graph()
    table = make.constant("table", make.normal(90, 16))
    rows = make("Gather", table, "ids", name="rows")
    make("MatMul", rows, make("Transpose", table, perm=[1, 0]), name="logits")
    proto = make.done({"ids": ("batch", "tokens")}, {"logits": ("batch", "tokens", 90)}, infer=False)
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    proto = onnx.shape_inference.infer_shapes(proto)
    after = same(plain(proto), {"ids": np.array([[3, 0, 89]])})
    first, last = find_units(after)
    assert (first.op, first.role, first.n, first.k) == ("Gather", "embedding", 90, 16)
    assert (last.op, last.role, last.n, last.k) == ("MatMul", "lm_head", 90, 16)
    assert first.origin == last.origin == first.weight == "table"
    assert last.weight != "table"
    np.testing.assert_array_equal(weight_matrix(after, first), weight_matrix(after, last))


def test_two_products_of_one_weight_have_one_origin() -> None:
    """However each of them turns it; another weight has another origin."""
    make = Graph()
    weight = make.constant("shared", make.normal(N, N))
    first = make("Gemm", "x", weight, name="one", transB=1)
    second = make("Gemm", first, weight, name="two", transB=1)
    third = make("MatMul", second, weight, name="three")
    make("MatMul", third, make.normal(N, N), name="four")
    after = same(plain(make.done({"x": (ROWS, N)}, {"four": (ROWS, N)})), data((ROWS, N)))
    assert [unit.origin for unit in find_units(after)] == ["shared", "shared", "shared", "four.1"]
    assert len({unit.weight for unit in find_units(after)}) == 4


# --------------------------------------------------------------------------------------------------- copies, names


def test_the_given_graph_is_not_changed() -> None:
    """Normalising works on a copy; doing it again changes nothing more."""
    before = gemm(np.arange(N), transB=1)
    bytes_before = ir.serde.serialize_model(before).SerializeToString()
    once = normalised(before)
    assert ir.serde.serialize_model(before).SerializeToString() == bytes_before
    twice = normalised(once)
    assert ops(twice) == ops(once)
    assert find_units(twice) == find_units(once)


def test_every_node_gets_a_name_of_its_own() -> None:
    """Also where an exporter gave none, or one to several."""
    make = Graph()
    value = "x"
    for number in range(6):
        value = make("MatMul", value, make.normal(N, N), name=f"m{number}")
    proto = make.done({"x": (ROWS, N)}, {value: (ROWS, N)})
    for node, name in zip(proto.graph.node, ["", "a", "a", "a_2", "", "MatMul_0"], strict=True):
        node.name = name
    after = normalised(plain(proto))
    assert run(after, data((ROWS, N)))[value].shape == (ROWS, N)  # which the engine refuses where two have one name
    names = [unit.id for unit in find_units(after)]
    assert len(set(names)) == 6
    assert names[1] == "a"
    assert [unit.id for unit in find_units(normalised(plain(proto)))] == names


def test_weights_stay_unread() -> None:
    """Finding units reads no number: a graph of gigabytes is looked at in a moment."""
    before = gemm(np.arange(N), transB=1)

    def read() -> np.ndarray:
        raise AssertionError("a weight was read")

    value = lazy_initializer(before.graph, "unread", read, ir.DataType.FLOAT, [N, K])
    before.graph[0].replace_input_with(1, value)
    (unit,) = find_units(normalised(before))
    assert unit.origin == "unread"


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    """Neither other bytes nor a missing file; the path is told."""
    path = tmp_path / "graph.onnx"
    for _ in range(2):
        with pytest.raises(BadGraph, match="no ONNX graph") as caught:
            load_graph(path)
        assert str(path) in str(caught.value)
        path.write_bytes(b"\x00not a graph")


# --------------------------------------------------------------------------------------------------- units


def units_of(weight: np.ndarray, *, first: bool = False, infer: bool = False) -> tuple[Unit, ...]:
    """Units of a product of x with one weight."""
    make = Graph()
    stored = make.constant("w", weight)
    make("MatMul", *((stored, "x") if first else ("x", stored)), name="y")
    return find_units(normalised(plain(make.done({"x": ("a", "b", "c")}, {"y": ("d", "e", "f")}, infer=infer))))


def test_a_small_weight_is_no_unit() -> None:
    """Where a scale costs as much as it saves there is nothing to choose."""
    assert len(units_of(np.ones((16, SMALLEST // 16), np.float32))) == 1
    assert units_of(np.ones((SMALLEST - 1, 1), np.float32)) == ()


def test_a_unit_has_a_matrix_on_its_right() -> None:
    """A stack of matrices, or a weight on the left, is another product."""
    assert units_of(np.ones((2, 16, 16), np.float32)) == ()
    assert units_of(np.ones((16, 16), np.float32), first=True) == ()


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (16, 20), (6, 4, 15)], ids=["conv", "linear", "conv1d"])
def test_a_matrix_has_a_row_for_every_output(shape: tuple[int, ...]) -> None:
    """`weight_matrix` is (n, k), each row what one output is made of; `from_matrix` undoes it."""
    make = Graph()
    weight = make.normal(*shape)
    op, wide = ("MatMul", (1, 5, 16)) if len(shape) == 2 else ("Conv", (1, 4, *[19] * (len(shape) - 2)))
    make(op, "x", weight, name="y")
    model = plain(make.done({"x": wide}, {"y": tuple("abcd"[: len(wide)])}))
    (unit,) = find_units(normalised(model))
    matrix = weight_matrix(model, unit)
    assert matrix.shape == (unit.n, unit.k)
    assert unit.params == weight.size
    row = weight[:, 1] if op == "MatMul" else weight[1].ravel()
    np.testing.assert_array_equal(matrix[1], row)
    np.testing.assert_array_equal(from_matrix(matrix, unit, shape), weight)


def test_a_table_is_a_unit_of_its_rows() -> None:
    """n rows of k; its data are the indices."""
    model = table_graph()
    (unit,) = find_units(normalised(model))
    assert (unit.op, unit.n, unit.k, unit.data, unit.output) == ("Gather", 50, 16, "ids", "y")
    np.testing.assert_array_equal(weight_matrix(model, unit), initializer(model, "table").numpy())


def test_an_initializer_that_is_not_there_is_refused() -> None:
    """By name; an input is none."""
    for name in ("nothing", "ids"):
        with pytest.raises(BadGraph, match=repr(name)):
            initializer(table_graph(), name)
