"""Second moments of what each product of a language model is fed, over all tokens of a workload.

The diagonal, mean x^2, weighs single weights; the whole matrix, mean x x^T, is what GPTQ needs. Those of a large model
do not fit in memory together, so a few are taken in each pass over the texts, and they lie in files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgekit.errors import BadRequest
from edgekit.quant.graph import Unit
from edgekit.quant.texts import TextWorkload
from edgekit.runtime.backends import open_session

F32 = npt.NDArray[np.float32]

GPTQ_WIDEST = (
    8192  # inputs of a product; the factors of a wider one's moments take gigabytes, and minutes for each choice
)
AT_ONCE = 1 << 30  # bytes of moments that one pass over the texts holds
_PER_NUMBER = 12  # bytes: the sum so far in float64, and what the engine gives in float32


def gathered_moments(
    workload: TextWorkload, model: ir.Model, units: Sequence[Unit], folder: Path, *, threads: int = 0
) -> tuple[dict[str, F32], dict[str, Path]]:
    """Mean squares (k,), and files of whole second moments (k, k) of inputs no wider than GPTQ_WIDEST, by value name.

    Args:
        workload: its texts are run.
        model: a normalised graph that `units` were found in.
        units: those that are to be rounded; tables read no activations.
        folder: where the files stay; those of the same texts are not made again.
        threads: of the inference engine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    products = {unit.data: unit for unit in units if unit.op == "MatMul"}
    files = {
        data: folder / f"{hashlib.sha256(f'{workload.digest} {data}'.encode()).hexdigest()[:32]}.npy"
        for data, unit in products.items()
        if unit.k <= GPTQ_WIDEST
    }
    missing = [products[data] for data, file in files.items() if not file.is_file()]
    for some in _fitting(missing):
        found = second_moments(workload, model, some, gram=True, threads=threads)
        for unit in some:
            _write(files[unit.data], found[unit.id])
    squares = {data: np.array(np.load(file, mmap_mode="r").diagonal()) for data, file in files.items()}
    wide = [unit for data, unit in products.items() if data not in files]
    found = second_moments(workload, model, wide, threads=threads) if wide else {}
    return squares | {unit.data: found[unit.id] for unit in wide}, files


def _fitting(units: Sequence[Unit]) -> Iterator[list[Unit]]:
    """Runs of units whose moments fit in AT_ONCE bytes together; at least one in each."""
    some: list[Unit] = []
    for unit in units:
        if some and _PER_NUMBER * (sum(each.k**2 for each in some) + unit.k**2) > AT_ONCE:
            yield some
            some = []
        some.append(unit)
    if some:
        yield some


def _write(file: Path, array: F32) -> None:
    beside = file.with_suffix(".new")
    with beside.open("wb") as stream:
        np.save(stream, array)
    beside.replace(file)


def second_moments(
    workload: TextWorkload, model: ir.Model, units: Sequence[Unit], *, gram: bool = False, threads: int = 0
) -> dict[str, F32]:
    """What each product is fed: the mean over all tokens of x^2 (k,), or with `gram` of x x^T (k, k), by unit id.

    Both are reduced within a copy of the graph, so that no activation leaves it. Gather units read no activations and
    are left out. With `gram` give as many units at a time as memory has room for; those that read the same value share
    an array.

    Args:
        workload: its texts are run.
        model: a normalised graph that `units` were found in.
        units: those wanted.
        gram: the whole second moment, which GPTQ needs (Frantar et al. 2022, arXiv:2210.17323: H = 2 X X^T).
        threads: of the inference engine.
    """
    wanted = {unit.data: unit.k for unit in units if unit.op == "MatMul"}
    watched = model.clone()
    names = {data: _reduce(watched.graph, data, k, gram) for data, k in wanted.items()}
    sums: dict[str, npt.NDArray[np.float64]] = {}
    counts = dict.fromkeys(wanted, 0)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "moments.onnx"
        ir.save(watched, path, external_data=f"{path.name}.data")
        session = open_session(path, threads=threads)
        for feeds in workload.feeds:
            outputs = session.run(feeds)
            for data, (total, shape) in names.items():
                sums[data] = sums.get(data, 0) + outputs[total].astype(np.float64)
                counts[data] += int(outputs[shape][0])
    means = {data: (sums[data] / counts[data]).astype(np.float32) for data in wanted}
    return {unit.id: means[unit.data] for unit in units if unit.op == "MatMul"}


def _reduce(graph: ir.Graph, data: str, k: int, gram: bool) -> tuple[str, str]:
    """Add outputs to a graph: the second moment of a value, summed over all but its last axis, and how many rows."""
    value = _value(graph, data)
    shape = ir.Value(name=f"{data}.rows_k", const_value=ir.tensor([-1, k], dtype=ir.DataType.INT64))
    graph.initializers[str(shape.name)] = shape
    # Casts come first: the sums of a float16 graph would overflow.
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT.value})
    flat = ir.node("Reshape", [cast.outputs[0], shape])
    total = ir.node("Einsum", [flat.outputs[0]] * 2, {"equation": "ni,nj->ij" if gram else "ni,ni->i"})
    rows = ir.node("Shape", [flat.outputs[0]])
    for node, name, dtype, dims in (
        (total, f"{data}.moment", ir.DataType.FLOAT, [k, k] if gram else [k]),
        (rows, f"{data}.count", ir.DataType.INT64, [2]),
    ):
        output = node.outputs[0]
        output.name, output.type, output.shape = name, ir.TensorType(dtype), ir.Shape(dims)
        graph.outputs.append(output)
    made: list[Any] = [cast, flat, total, rows]
    graph.extend(made)
    return str(total.outputs[0].name), str(rows.outputs[0].name)


def _value(graph: ir.Graph, name: str) -> ir.Value:
    values = (*graph.inputs, *(output for node in graph for output in node.outputs))
    found = next((value for value in values if value.name == name), None)
    if found is None:
        raise BadRequest(f"the graph has no value {name!r}: the units are those of another graph")
    return found
