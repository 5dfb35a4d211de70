"""Tables of codes on a CPU: GatherBlockQuantized against the numbers that its codes mean, and codes that are shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from edgekit.quant.fused import kernels
from edgekit.quant.graph import find_units, normalised
from edgekit.quant.lower.common import stored_name
from edgekit.quant.trial import open_trial
from edgekit.quant.weights import restore, store
from tests.quant.lowering import NBITS, OPEN, STRICT, by_block, close, graph, lowered, stored_of, value

Array = npt.NDArray[Any]

IDS = np.array([[3, 49, 0], [7, 7, 12]])


def table_of(k: int, dtype: int = TensorProto.INT64, **attributes: int) -> ir.Model:
    """ids to rows of 50, each of k."""
    table = np.random.default_rng(12).standard_normal((50, k)).astype(np.float32)
    node = helper.make_node("Gather", ["table", "ids"], ["y"], name="rows", **attributes)
    return graph([node], {"table": table}, [value("ids", ["batch", "tokens"], dtype)], [value("y", None)])


def tied(n: int = 50, k: int = 64) -> ir.Model:
    """A table, and the product with its transpose that reads what was gathered and a shift."""
    rng = np.random.default_rng(13)
    weights = {"table": rng.standard_normal((n, k)).astype(np.float32), "shift": shift(k)}
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["found"], name="rows"),
        helper.make_node("Add", ["found", "shift"], ["x"], name="shift"),
        helper.make_node("Transpose", ["table"], ["turned"], name="turn", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["y"], name="head"),
    ]
    ids = value("ids", ["batch", "tokens"], TensorProto.INT64)
    return graph(nodes, weights, [ids], [value("y", ["batch", "tokens", n])])


def shift(k: int) -> Array:
    """What takes rows off the grid of their codes: on it every rounding is a tie."""
    return np.random.default_rng(16).standard_normal(k).astype(np.float32)


@pytest.mark.parametrize("choice", NBITS)
@pytest.mark.parametrize("k", [16, 128, 200])
def test_a_table_of_codes_gives_the_rows_that_they_mean(tmp_path: Path, k: int, choice: str) -> None:
    """Also where a row is shorter than a block or no multiple of it; the engine runs it as it was written."""
    model = table_of(k)
    made = lowered(tmp_path, model, choice, target=STRICT)
    _, meant = stored_of(model, choice)
    np.testing.assert_allclose(made(ids=IDS), meant[IDS], rtol=1e-6)
    assert kernels(made.path)["GatherBlockQuantized"] == 1
    assert not np.array_equal(meant, model.graph.initializers["table"].const_value.numpy())


def test_two_readers_of_one_table(tmp_path: Path) -> None:
    """What is made of its scales and zero points is made once for both."""
    model = table_of(64)
    node = helper.make_node("Gather", ["table", "more"], ["z"], name="again")
    two = ir.to_proto(model)
    two.graph.node.append(node)
    two.graph.input.append(value("more", ["batch", "tokens"], TensorProto.INT64))
    two.graph.output.append(value("z", None))
    made = lowered(tmp_path, ir.from_proto(two), "w4a16-32", target=STRICT)
    _, meant = stored_of(model, "w4a16-32")
    found = made.session.run({"ids": IDS, "more": IDS.T})
    np.testing.assert_allclose(found["y"], meant[IDS], rtol=1e-6)
    np.testing.assert_allclose(found["z"], meant[IDS.T], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_rows_counted_from_the_end_and_ids_of_both_widths(tmp_path: Path, dtype: Any) -> None:
    """As Gather has them."""
    model = table_of(64, TensorProto.INT32 if dtype == np.int32 else TensorProto.INT64, axis=0)
    _, meant = stored_of(model, "w4a16-32")
    ids = np.array([[-1, 2], [-50, 49]], dtype)
    np.testing.assert_allclose(lowered(tmp_path, model, "w4a16-32")(ids=ids), meant[ids], rtol=1e-6)


def test_only_whole_rows_are_a_unit() -> None:
    """A Gather along another axis takes no rows, which are what codes have scales along."""
    assert [unit.id for unit in find_units(normalised(table_of(64)))] == ["rows"]
    assert find_units(normalised(table_of(64, axis=1))) == ()


@pytest.mark.parametrize("choice", ["w8a16", "w4a16-32", "w2a16-32"])
def test_a_tied_product_reads_the_same_codes(tmp_path: Path, choice: str) -> None:
    """They are stored once, with float16 scales, and both nodes compute with the numbers they mean."""
    model = tied()
    made = lowered(tmp_path, model, choice, target=STRICT)
    table = model.graph.initializers["table"].const_value.numpy()
    stored = store(table, STRICT.choice(choice))
    meant = restore(stored).astype(np.float64)
    x = meant[IDS].astype(np.float32) + shift(64)
    close(made(ids=IDS), by_block(x, STRICT.choice(choice).weight.block) @ meant.T)
    codes = [name for name in made.initializers() if name.endswith(".codes")]
    assert codes == [f"table.{choice}.codes"]
    size = sum(each.nbytes for name, each in made.initializers().items() if name.startswith("table."))
    assert size == STRICT.choice(choice).weight.bytes(50, 64)


def test_units_tied_at_different_choices_store_both(tmp_path: Path) -> None:
    """Nothing is shared that is not the same."""
    made = lowered(tmp_path, tied(), {"rows": "w8a16", "head": "w4a16-32"}, target=STRICT)
    codes = sorted(name for name in made.initializers() if name.endswith(".codes"))
    assert codes == ["table.w4a16-32.codes", "table.w8a16.codes"]


def test_a_square_weight_that_is_turned_for_one_product_alone_is_not_shared(tmp_path: Path) -> None:
    """x W and x W^T have matrices of one shape and one origin, and are two."""
    weight = np.random.default_rng(14).standard_normal((32, 32)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="plain"),
        helper.make_node("Transpose", ["w"], ["t"], name="turn", perm=[1, 0]),
        helper.make_node("MatMul", ["a", "t"], ["y"], name="turned"),
    ]
    model = graph(nodes, {"w": weight}, [value("x", ["rows", 32])], [value("y", ["rows", 32])])
    plain, turned = find_units(normalised(model))
    assert plain.origin == turned.origin
    assert stored_name(plain) != stored_name(turned)
    x = np.random.default_rng(15).standard_normal((4, 32)).astype(np.float32)
    floats = (x @ weight) @ weight.T
    close(lowered(tmp_path, model, "w8a16")(x=x), floats, 0.03)


@pytest.mark.parametrize("form", ["delta", "override"])
def test_a_trial_of_a_table_is_the_lowered_table(tmp_path: Path, form: Any) -> None:
    """What a scan measures is what ships: the table's codes, and no rounding of ids."""
    model = normalised(tied())
    units = find_units(model)
    session = open_trial(model, units, {}, OPEN, tmp_path, form=form, threads=1)
    table = model.graph.initializers["table"].const_value.numpy()
    for choice in ("w8a16", "w4a16-64", "w2a16-32"):
        session.set({"rows": choice})
        meant = restore(store(table, STRICT.choice(choice)))
        np.testing.assert_allclose(
            session.run({"ids": IDS})["y"], (meant[IDS] + shift(64)) @ table.T, rtol=1e-4, atol=1e-4
        )
