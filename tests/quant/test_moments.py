"""What products are fed, summed inside the graph: the same as the activations taken out of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.bundle.store import Bundle, new_bundle, read_bundle
from edgekit.errors import BadRequest
from edgekit.export.language.export import export_language
from edgekit.quant.graph import find_units, load_graph, normalised
from edgekit.quant.moments import second_moments
from edgekit.quant.texts import TextWorkload
from edgekit.runtime.backends import Array, open_session

DRAFT = Path(__file__).resolve().parents[2] / "models" / "pycode-draft"
REQUESTS = ((0, 303, 292, 8, 88, 317, 199, 258), (5, 17, 3, 42, 8, 77, 30, 1000))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shipped draft model in fp32."""
    target = tmp_path_factory.mktemp("moments") / "x.bundle"
    with new_bundle(target) as draft:
        draft.seal(export_language(DRAFT, draft.root, dialect="ort", precision="fp32"))
    return read_bundle(target)


def inputs_of(bundle: Bundle, workload: TextWorkload, folder: Path) -> dict[str, list[Array]]:
    """The slow twin's raw material: every product's whole input, out of the graph, by unit id."""
    model = normalised(load_graph(bundle.graph("decoder")))
    units = [unit for unit in find_units(model) if unit.op == "MatMul"]
    values = {output.name: output for node in model.graph for output in node.outputs}
    for name in dict.fromkeys(unit.data for unit in units):
        values[name].type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.append(values[name])
    ir.save(model, folder / "whole.onnx", external_data="whole.data")
    session = open_session(folder / "whole.onnx", threads=1)
    runs = [session.run(feeds) for feeds in workload.feeds]
    return {unit.id: [run[unit.data].reshape(-1, unit.k) for run in runs] for unit in units}


@pytest.mark.parametrize("rows", [0, 3])
def test_second_moments_are_those_of_the_whole_inputs(bundle: Bundle, tmp_path: Path, rows: int) -> None:
    """Sums made inside the graph are the sums of the activations taken out of it, vectors and matrices alike."""
    workload = TextWorkload(bundle, REQUESTS, rows=rows, threads=1)
    model = normalised(load_graph(bundle.graph("decoder")))
    units = find_units(model)
    before = [node.name for node in model.graph], [value.name for value in model.graph.outputs]
    moments = second_moments(workload, model, units, threads=1)
    grams = second_moments(workload, model, units, gram=True, threads=1)
    assert before == ([node.name for node in model.graph], [value.name for value in model.graph.outputs])
    slow = inputs_of(bundle, workload, tmp_path)
    assert set(moments) == set(grams) == set(slow)
    for unit in units:
        if unit.op == "Gather":
            continue
        x = np.concatenate(slow[unit.id]).astype(np.float64)
        assert len(x) == (2 * rows if rows and unit.role == "lm_head" else 16)
        assert moments[unit.id].dtype == grams[unit.id].dtype == np.float32
        np.testing.assert_allclose(moments[unit.id], (x * x).mean(0), rtol=1e-4)
        whole = x.T @ x / len(x)
        np.testing.assert_allclose(grams[unit.id], whole, atol=1e-5 * np.abs(whole).max())


def test_second_moments_want_the_units_of_the_graph(bundle: Bundle) -> None:
    """Units of another graph are refused, not guessed; none at all give nothing."""
    model = normalised(load_graph(bundle.graph("decoder")))
    workload = TextWorkload(bundle, REQUESTS, threads=1)
    stranger = replace(find_units(model)[1], data="elsewhere")
    with pytest.raises(BadRequest, match="'elsewhere'"):
        second_moments(workload, model, [stranger], threads=1)
    assert second_moments(workload, model, [], threads=1) == {}
