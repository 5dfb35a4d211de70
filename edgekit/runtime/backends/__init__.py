"""Inference backends: one module each, one row in BACKENDS, one protocol.

What was asked is what runs: a session that ends up on another device than the one named raises DeviceMissing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from edgekit.bundle.manifest import TensorSpec
from edgekit.errors import UnknownDevice

Array = npt.NDArray[Any]

BACKENDS = {"cpu": "ort", "cuda": "ort"}  # device name, without its index -> module in this folder


class Binding(Protocol):
    """Buffers that stay with a session between runs: the way to keep a KV cache in place.

    `share(input, output, shape, dtype)` makes one zeroed device buffer that is both the input and the output of every
    run; the graph must not read the input after it has written the output. `run` takes the changing inputs and gives
    the outputs that are not shared.
    """

    live: bool  # whether `read` gives the buffer itself, so that rows can be moved from the host

    def share(self, input: str, output: str, shape: Sequence[int], dtype: npt.DTypeLike) -> None:
        """Allocate one zeroed buffer, bound as `input` and as `output` of every later run."""

    def read(self, input: str) -> Array:
        """The shared buffer's content: a live view where `live`, elsewhere a copy."""

    def write(self, input: str, value: Array) -> None:
        """Replace the shared buffer's content."""

    def run(self, feeds: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """One run; the outputs that are not shared, by name.

        Feeding the same array object again is cheap and its present content is what is read, so a caller keeps its
        arrays and changes them in place. `into` names C-contiguous arrays of the right shape, for outputs to land in.

        Raises:
            SessionFailed: with the engine's own words.
        """


class Session(Protocol):
    """One loaded graph on one device."""

    device: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once: arrays in, every output out, by name. Raises SessionFailed."""

    def bind(self) -> Binding:
        """A fresh set of bound buffers."""


def open_session(
    graph: Path,
    device: str = "cpu",
    *,
    threads: int = 0,
    spinning: bool = True,
    planned: bool = True,
    eager: bool = False,
) -> Session:
    """Load one graph.

    Args:
        graph: an ONNX file, its external data beside it.
        device: a name in BACKENDS, with an optional index (`cuda:1`).
        threads: of the inference engine; 0 leaves the choice to it.
        spinning: let waiting threads stay awake; off for a session that takes turns with one that does so.
        planned: lay activations out ahead for shapes seen before; off where they are large and memory counts.
        eager: run nodes as soon as they can, for graphs with very many outputs.

    Raises:
        UnknownDevice: no backend of this name.
        DeviceMissing: the backend is not installed, or gave another device.
        SessionFailed: the engine refused the graph.
    """
    name = device.partition(":")[0]
    if name not in BACKENDS:
        raise UnknownDevice(f"no backend for {device!r}; known devices: {', '.join(BACKENDS)}")
    module = import_module(f"{__name__}.{BACKENDS[name]}")
    session: Session = module.open_session(
        graph, device, threads=threads, spinning=spinning, planned=planned, eager=eager
    )
    return session
