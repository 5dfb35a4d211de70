"""ONNX Runtime: `cpu`, `cuda`, `cuda:N`. Buffers stay bound between runs (IOBinding).

ONNX Runtime falls back to the CPU without an exception when a provider cannot start, and two of its wheels installed
together break each other; both are turned into DeviceMissing here. The CUDA paths are written against the documented
interface (docs/text-generation.md says what has been run where).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from edgekit.bundle.manifest import Dim, DType, TensorSpec
from edgekit.errors import DeviceMissing, SessionFailed, UnknownDevice
from edgekit.runtime.backends import Array
from edgekit.runtime.backends.devices import PROVIDER_OF, engine

EXTRAS = {"cpu": "edgekit[cpu] (onnxruntime)", "cuda": "edgekit[gpu] (onnxruntime-gpu)"}
DTYPES: dict[str, DType] = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16",
    "tensor(bool)": "bool",
}


def open_session(
    graph: Path,
    device: str = "cpu",
    *,
    threads: int = 0,
    spinning: bool = True,
    planned: bool = True,
    eager: bool = False,
) -> OrtSession:
    """Load one graph with ONNX Runtime.

    Args:
        graph: an ONNX file, its external data beside it.
        device: `cpu`, `cuda` or `cuda:N`.
        threads: inside one operator; 0 takes one per physical core.
        spinning: worker threads wait for the next operator awake. Of a target and a draft that take turns on the same
            cores one may do so: if both do, they fight, and a cycle takes twice as long. The target's do, so that
            ordinary decoding is as fast as without a draft; the draft's sleep (benchmarks/threads.py).
        planned: the second run of a shape lays its activations out as one block, and what the first took stays taken.
            Off where activations are large: a third less memory, the same CPU time (benchmarks/memory.py).
        eager: what can run does, in the graph's order; else what leads to an output comes late, and where hundreds of
            values are reduced to outputs they would all stay in memory.

    Raises:
        UnknownDevice: neither `cpu` nor `cuda[:N]`.
        DeviceMissing: the wheel is not installed, two are, or the session landed on another device.
        SessionFailed: ONNX Runtime refused the graph.
    """
    kind, index = _parse(device)
    onnxruntime = _import(kind)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_mem_pattern = planned
    if eager:
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    providers: list[Any] = [(PROVIDER_OF["cuda"], {"device_id": index})] if kind == "cuda" else []
    providers.append(PROVIDER_OF["cpu"])
    with _translated(f"{graph.name} on {device}"):
        loaded = onnxruntime.InferenceSession(str(graph), options, providers=providers, enable_fallback=0)
    if PROVIDER_OF[kind] not in loaded.get_providers():
        raise DeviceMissing(
            f"{device} was asked for and ONNX Runtime gave {', '.join(loaded.get_providers())}: the driver or the CUDA "
            "and cuDNN libraries do not load. Check `nvidia-smi`, install onnxruntime-gpu[cuda,cudnn], or ask for cpu."
        )
    return OrtSession(loaded, graph.name, device)


class OrtSession:
    """One graph in ONNX Runtime; see `edgekit.runtime.backends.Session`."""

    def __init__(self, engine: Any, name: str, device: str) -> None:
        self._engine = engine
        self._name = name
        self.device = device
        self.inputs = tuple(_spec(arg) for arg in engine.get_inputs())
        self.outputs = tuple(_spec(arg) for arg in engine.get_outputs())

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once: arrays in, every output out, by name. Raises SessionFailed."""
        with _translated(f"a run of {self._name} on {self.device}"):
            values = self._engine.run(None, dict(feeds))
        return dict(zip((spec.name for spec in self.outputs), values, strict=True))

    def bind(self) -> OrtBinding:
        """A fresh set of bound buffers."""
        return OrtBinding(self._engine, self._name, self.device, tuple(spec.name for spec in self.outputs))


class OrtBinding:
    """An IOBinding whose arrays are bound once and read again on every run; see `backends.Binding`."""

    def __init__(self, engine: Any, name: str, device: str, outputs: Sequence[str]) -> None:
        self._engine = engine
        self._io = engine.io_binding()
        self._running = _translated(f"a run of {name} on {device}")
        self._kind, self._index = _parse(device)
        self.live = self._kind == "cpu"
        self._outputs = tuple(outputs)
        self._shared: dict[str, tuple[Any, Array | None]] = {}
        self._fed: dict[str, Array] = {}
        self._into: dict[str, Array] = {}
        self._order: list[str] = []  # IOBinding lists outputs in the order of their first binding

    def share(self, input: str, output: str, shape: Sequence[int], dtype: npt.DTypeLike) -> None:
        """Allocate one zeroed buffer, bound as `input` and as `output` of every later run."""
        from onnxruntime import OrtValue

        zeros = np.zeros(tuple(shape), dtype)
        with _translated(f"a buffer of {zeros.nbytes:,} bytes for {input}"):
            value = OrtValue.ortvalue_from_numpy(zeros, self._kind, self._index)
            self._io.bind_ortvalue_input(input, value)
            self._io.bind_ortvalue_output(output, value)
        self._shared[input] = (value, zeros if self.live else None)
        self._outputs = tuple(name for name in self._outputs if name != output)
        self._order.append(output)

    def read(self, input: str) -> Array:
        """The shared buffer's content: a live view on the CPU, elsewhere a copy."""
        value, view = self._shared[input]
        return view if view is not None else cast("Array", value.numpy())

    def write(self, input: str, value: Array) -> None:
        """Replace the shared buffer's content."""
        buffer, view = self._shared[input]
        if view is not None:
            view[...] = value
        else:
            buffer.update_inplace(np.ascontiguousarray(value))

    def run(self, feeds: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """One run; the outputs that are not shared, by name. Raises SessionFailed."""
        with self._running:
            for name, array in feeds.items():
                # On the CPU a bound array is read where it lies; elsewhere binding is what copies it to the device.
                if not self.live or self._fed.get(name) is not array:
                    self._feed(name, array)
            results = dict(into or {})
            for name in self._outputs:
                self._expect(name, results.get(name))
            self._engine.run_with_iobinding(self._io)
            if len(results) < len(self._outputs):
                values = self._io.get_outputs_as_ortvaluevector()
                for name in self._outputs:
                    if name not in results:
                        results[name] = values[self._order.index(name)].numpy()
        return results

    def _feed(self, name: str, array: Array) -> None:
        if array.flags.c_contiguous:
            self._io.bind_cpu_input(name, array)
            self._fed[name] = array
        else:
            self._io.bind_cpu_input(name, array.copy(order="C"))
            self._fed.pop(name, None)

    def _expect(self, name: str, array: Array | None) -> None:
        """Bind an output to the caller's array, or to a fresh one (an old one would be written over)."""
        if name not in self._order:
            self._order.append(name)
        if array is None:
            self._io.bind_output(name, "cpu")
            self._into.pop(name, None)
        elif self._into.get(name) is not array:
            self._io.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            self._into[name] = array


def _parse(device: str) -> tuple[str, int]:
    """`cuda:1` to ("cuda", 1)."""
    kind, colon, index = device.partition(":")
    if kind not in PROVIDER_OF or (colon and (kind == "cpu" or not index.isdecimal())):
        raise UnknownDevice(f"ONNX Runtime has no device {device!r}; write cpu, cuda or cuda:N")
    return kind, int(index or 0)


def _import(kind: str) -> Any:
    """The onnxruntime module, if exactly one wheel provides it and it was built for the device."""
    found = engine()
    if kind not in found.devices:
        raise DeviceMissing(
            f"{kind} was asked for and {found.wheel} {found.version} is built for {', '.join(found.devices)}. "
            f"Uninstall it, then install {EXTRAS[kind]}; or ask for {found.devices[0]}."
        )
    import onnxruntime

    return onnxruntime


class _translated:
    """Give ONNX Runtime's own exceptions our name and say what was being done.

    A class, and not a generator, because one of them is entered for every token.
    """

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, why: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The engine's classes derive from Exception alone; their module is their only common mark.
        foreign = kind is not None and kind.__module__.startswith("onnxruntime")
        if foreign or isinstance(why, (ValueError, TypeError, RuntimeError)):
            raise SessionFailed(f"{self._what} failed: {why}") from why


def _spec(arg: Any) -> TensorSpec:
    """A graph input or output as the engine describes it; axes without a name get one from their place."""
    dims: list[Dim] = [
        size if isinstance(size, int) else size or f"{arg.name}_axis{axis}".replace(".", "_")
        for axis, size in enumerate(arg.shape)
    ]
    if arg.type not in DTYPES:
        raise SessionFailed(f"{arg.name} has type {arg.type}; edgekit feeds plain tensors of {', '.join(DTYPES)}")
    return TensorSpec(arg.name, DTYPES[arg.type], tuple(dims))
