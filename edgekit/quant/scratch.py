"""Graphs that are written to be run for a while, without copies of weights that lie in a file already."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

SMALL = 1 << 16  # bytes of a tensor that is written into the graph itself


@contextmanager
def scratch_graph(model: ir.Model, name: str) -> Iterator[Path]:
    """The path of a written graph, which goes when the block ends.

    An ONNX graph names files beside itself only, so one whose weights all lie in one folder is written there; any other
    goes to a temporary folder, weights and all.

    Args:
        model: what is written.
        name: what its file name begins with.
    """
    home = _home(model)
    if home is None:
        with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
            path = Path(folder) / f"{name}.onnx"
            ir.save(model, path, external_data=f"{path.name}.data")
            yield path
        return
    handle, text = tempfile.mkstemp(prefix=f"{name}-", suffix=".onnx", dir=home)
    os.close(handle)
    path = Path(text)
    try:
        ir.save(model, path)
        yield path
    finally:
        path.unlink()


def _home(model: ir.Model) -> Path | None:
    """The one folder that all large weights lie in as files of their own, if there is one to write into."""
    folders = set()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            if Path(tensor.location).name != str(tensor.location):
                return None
            folders.add(Path(tensor.base_dir).resolve())
        elif tensor is not None and tensor.nbytes > SMALL:
            return None
    if len(folders) != 1:
        return None
    (folder,) = folders
    return folder if os.access(folder, os.W_OK) else None
