"""A session answered by a Python function: everything above the backend runs with no engine, no graph and no device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from edgekit.bundle.manifest import TensorSpec
from edgekit.errors import SessionFailed
from edgekit.runtime.backends import Array

Answer = Callable[[Mapping[str, Array]], Mapping[str, Array]]


class FakeSession:
    """Answers `run` with `answer(feeds)`, after checking what an engine checks: names, types and fixed sizes.

    `answer` gets every input by name and returns every output by name. Shared buffers (`bind`) come as inputs like any
    other; the outputs they are bound to are copied back into them, as if the engine had written in place.
    """

    def __init__(
        self,
        answer: Answer,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        device: str = "fake",
        live: bool = True,
    ) -> None:
        self.device = device
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.live = live  # False plays a device whose memory the host cannot address
        self.runs = 0
        self._answer = answer

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once: arrays in, every output out, by name. Raises SessionFailed."""
        self._check(feeds)
        self.runs += 1
        results = self._answer(feeds)
        missing = [spec.name for spec in self.outputs if spec.name not in results]
        if missing:
            raise SessionFailed(f"the fake session's function gave no {', '.join(missing)}")
        return {spec.name: np.asarray(results[spec.name]) for spec in self.outputs}

    def bind(self) -> FakeBinding:
        """A fresh set of bound buffers."""
        return FakeBinding(self)

    def _check(self, feeds: Mapping[str, Array]) -> None:
        wanted = {spec.name: spec for spec in self.inputs}
        if feeds.keys() != wanted.keys():
            wrong = sorted(feeds.keys() ^ wanted.keys())
            raise SessionFailed(f"fed {', '.join(sorted(feeds))}; missing or unknown: {', '.join(wrong)}")
        for name, array in feeds.items():
            spec = wanted[name]
            fits = len(array.shape) == len(spec.shape) and all(
                not isinstance(want, int) or want == size for want, size in zip(spec.shape, array.shape, strict=True)
            )
            if not fits or array.dtype != np.dtype(spec.dtype):
                raise SessionFailed(f"{name} is {array.dtype}{array.shape}; the graph wants {spec.dtype}{spec.shape}")


class FakeBinding:
    """The same semantics as a real binding, in plain arrays; see `backends.Binding`."""

    def __init__(self, session: FakeSession) -> None:
        self._session = session
        self.live = session.live
        self._shared: dict[str, Array] = {}
        self._outputs: dict[str, str] = {}  # shared output -> its input
        self._fed: dict[str, Array] = {}

    def share(self, input: str, output: str, shape: Sequence[int], dtype: npt.DTypeLike) -> None:
        """Allocate one zeroed buffer, bound as `input` and as `output` of every later run."""
        self._shared[input] = np.zeros(tuple(shape), dtype)
        self._outputs[output] = input

    def read(self, input: str) -> Array:
        """The shared buffer's content: a live view where `live`, else a copy."""
        buffer = self._shared[input]
        return buffer if self.live else buffer.copy()

    def write(self, input: str, value: Array) -> None:
        """Replace the shared buffer's content."""
        self._shared[input][...] = value

    def run(self, feeds: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """One run; the outputs that are not shared, by name. Raises SessionFailed."""
        self._fed.update(feeds)  # as with a real binding, an input once bound stays bound
        results = self._session.run({**self._fed, **self._shared})
        for output, input in self._outputs.items():
            self._shared[input][...] = results.pop(output)
        for name, array in (into or {}).items():
            if array.shape != results[name].shape or array.dtype != results[name].dtype:
                raise SessionFailed(
                    f"{name} is {results[name].dtype}{results[name].shape}; its array is {array.dtype}{array.shape}"
                )
            array[...] = results[name]
            results[name] = array
        return results
