"""The wire-format reader sees what the reference parser sees."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgekit.bundle.graphfile import ELEMENT_TYPES, ExternalData, GraphTensor, read_graph
from edgekit.errors import BadGraph
from tests.bundle import tiny

ZOO = sorted(Path(onnx.__file__).parent.glob("backend/test/data/*/**/*.onnx"))
GRAPHS = {
    "text_encoder": tiny.text_encoder,
    "unet": tiny.unet,
    "vae_decoder": tiny.vae_decoder,
    "decoder": tiny.decoder,
}


def shape_of(info: onnx.ValueInfoProto) -> tuple[int | str | None, ...] | None:
    """A shape as the reference parser has it."""
    dense = info.type.tensor_type
    if not dense.HasField("shape"):
        return None
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dense.shape.dim)


def tensors_of(rows: list[onnx.ValueInfoProto]) -> tuple[GraphTensor, ...]:
    """Inputs or outputs as the reference parser has them."""
    return tuple(GraphTensor(r.name, ELEMENT_TYPES[r.type.tensor_type.elem_type], shape_of(r)) for r in rows)


def test_every_graph_of_the_reference_package_reads_alike() -> None:
    """Names, types, shapes and operators of the models that `onnx` ships for its own tests."""
    assert len(ZOO) > 50
    for file in ZOO:
        graph, reference = read_graph(file), onnx.load(file, load_external_data=False).graph
        backed = {tensor.name for tensor in reference.initializer}
        assert graph.inputs == tensors_of([row for row in reference.input if row.name not in backed]), file
        assert graph.outputs == tensors_of(list(reference.output)), file
        assert {f"{node.domain or 'ai.onnx'}::{node.op_type}" for node in reference.node} <= graph.operators, file
        assert graph.external == ()


@pytest.mark.parametrize("name", GRAPHS)
def test_external_data_is_found(tmp_path: Path, name: str) -> None:
    """Every weight of a saved graph is reported with its file, offset and length."""
    tiny.save(GRAPHS[name](), tmp_path / "g.onnx")
    reference = onnx.load(tmp_path / "g.onnx", load_external_data=False)
    expected = []
    for tensor in reference.graph.initializer:
        place = {row.key: row.value for row in tensor.external_data}
        expected.append(ExternalData(tensor.name, place["location"], int(place["offset"]), int(place["length"])))
    assert expected
    assert sorted(read_graph(tmp_path / "g.onnx").external, key=str) == sorted(expected, key=str)


dims = st.one_of(st.integers(0, 2**40), st.sampled_from(["batch", "seq", "past + seq"]), st.none())
specs = st.tuples(
    st.sampled_from([number for number in ELEMENT_TYPES if number != TensorProto.STRING]),
    st.one_of(st.none(), st.lists(dims, max_size=4)),
)


@settings(max_examples=60, deadline=None)
@given(inputs=st.lists(specs, max_size=4), outputs=st.lists(specs, max_size=4))
def test_any_signature_comes_back(tmp_path_factory: pytest.TempPathFactory, inputs: list, outputs: list) -> None:  # type: ignore[type-arg]
    """Types, sizes, axis names, unnamed axes and unknown ranks survive the round through the reference writer."""
    sides = [
        [helper.make_tensor_value_info(f"{side}{i}", kind, shape) for i, (kind, shape) in enumerate(rows)]
        for side, rows in (("in", inputs), ("out", outputs))
    ]
    file = tmp_path_factory.getbasetemp() / "signature.onnx"
    file.write_bytes(helper.make_model(helper.make_graph([], "g", *sides)).SerializeToString())
    graph = read_graph(file)
    assert (graph.inputs, graph.outputs) == (tensors_of(sides[0]), tensors_of(sides[1]))


def test_an_input_with_an_initializer_needs_no_feed(tmp_path: Path) -> None:
    """Old graphs list their weights as inputs; those, dense or sparse, are not inputs to feed."""
    proto = tiny.unet()
    proto.graph.input.extend(tiny.infos([("gain", "float32", (1, 4, 1, 1)), ("sparse", "float32", (4,))]))
    indices = helper.make_tensor("indices", TensorProto.INT64, [1], [0])
    proto.graph.sparse_initializer.add(
        values=helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0]), indices=indices, dims=[4]
    )
    (tmp_path / "g.onnx").write_bytes(proto.SerializeToString())
    assert [tensor.name for tensor in read_graph(tmp_path / "g.onnx").inputs] == [
        row.name for row in tiny.unet().graph.input
    ]


def test_operators_inside_functions_and_subgraphs_count(tmp_path: Path) -> None:
    """What a graph may call is all that stands anywhere in its file."""
    proto = tiny.unet()
    inner = helper.make_graph([helper.make_node("Hidden", [], ["h"], domain="com.other")], "inner", [], [])
    body = [helper.make_node("If", ["c"], ["o"], then_branch=inner, else_branch=inner)]
    proto.functions.append(helper.make_function("own", "F", [], [], body, [helper.make_opsetid("", 21)]))
    (tmp_path / "g.onnx").write_bytes(proto.SerializeToString())
    assert {"com.other::Hidden", "ai.onnx::If", "ai.onnx::Mul"} <= read_graph(tmp_path / "g.onnx").operators


def test_the_number_of_messages_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of nothing but tiny nodes is given up, not collected."""
    proto = tiny.unet()
    proto.graph.node.extend([onnx.NodeProto()] * 1000)
    (tmp_path / "g.onnx").write_bytes(proto.SerializeToString())
    monkeypatch.setattr("edgekit.bundle.graphfile.MAX_MESSAGES", 500)
    with pytest.raises(BadGraph, match="more than 500"):
        read_graph(tmp_path / "g.onnx")
