"""Writing a graph and its data file, one initializer in memory at a time, views onto the bytes of what they view."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

Progress = Callable[[str, float], None]

PAGE = 4096  # large tensors start on a page, so that an engine can map them
LARGE = 1 << 20
CACHE_LINE = 64
INLINE = 256  # bytes up to which a tensor stays in the graph file: shapes and scalars, which engines fold


def stored_bytes(model: ir.Model, views: Mapping[str, str]) -> int:
    """Bytes of all initializers, those that are views of others not counted again."""
    return sum({_owner(name, views): tensor.nbytes for name, tensor in _tensors(model)}.values())


def write_model(model: ir.Model, views: Mapping[str, str], graph: Path, progress: Progress) -> None:
    """Write `graph` and `graph`.data; the model's initializers then point into the file.

    Args:
        model: its initializers may be lazy.
        views: initializer -> the name its bytes are stored under, for those that share theirs.
        graph: where to write; its folder exists.
        progress: called with "writing" and the share of the bytes that is done.
    """
    data = graph.with_name(f"{graph.name}.data")
    total, done = stored_bytes(model, views), 0
    places: dict[str, int] = {}
    with data.open("wb") as file:
        for name, tensor in list(_tensors(model)):
            if tensor.nbytes <= INLINE:
                continue
            owner = _owner(name, views)
            if owner not in places:
                progress("writing", min(done / max(total, 1), 1.0))
                places[owner] = _append(file, tensor)
                done += tensor.nbytes
            model.graph.initializers[name].const_value = ir.ExternalTensor(
                data.name, places[owner], tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape), name=name
            )
    ir.save(model, graph)
    progress("writing", 1.0)


def _owner(name: str, views: Mapping[str, str]) -> str:
    return views.get(name, name)


def _tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            yield name, value.const_value


def _append(file: BinaryIO, tensor: ir.TensorProtocol) -> int:
    """Write a tensor at the next aligned offset, which is returned."""
    step = PAGE if tensor.nbytes >= LARGE else CACHE_LINE
    start = -(-file.tell() // step) * step
    file.seek(start)
    file.write(memoryview(tensor.tobytes()))
    return start
