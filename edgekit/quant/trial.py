"""A graph in which any unit can be tried at any choice, in one session that is never rebuilt.

Two forms of the same thing. In both, a boolean input per unit lets its activations through an `If` that rounds them;
all these inputs are initializers too, so that a run names only what it changes.

    override  every weight is an input with a default. A run feeds the rounded weights of the units it changes.
    delta     y + If(gate){op(x, dW)}: a run feeds the weights' change. The weights themselves stay constants, which the
              engine lays out once for its kernels, but a changed unit is computed twice.

On a convolutional denoiser, in plain runs: one unit 1.24 with override, 1.08 with delta; all units 1.4 and 2.3; a graph
written anew 2.4. So units are tried one at a time with `delta`, and whole mixes with `override`. They agree to float
rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgekit.errors import BadRequest, SessionFailed
from edgekit.quant.choices import get_choice
from edgekit.quant.graph import Unit, from_matrix, initializer, weight_matrix
from edgekit.quant.lower.common import Store, rtn_store
from edgekit.quant.targets import Target
from edgekit.quant.trial_graph import Form, Range, input_name, ranges_of, rounding_of, trial_model
from edgekit.quant.weights import restore
from edgekit.runtime.backends import Binding, open_session

Array = npt.NDArray[Any]


def open_trial(
    model: ir.Model,
    units: Sequence[Unit],
    ranges: Mapping[str, Range],
    target: Target,
    folder: Path,
    *,
    form: Form = "delta",
    device: str = "cpu",
    threads: int = 0,
    store: Store = rtn_store,
) -> TrialSession:
    """Write a trial graph into a folder, which the caller removes, and open it.

    Args:
        model, units, ranges, target, form: see `trial_model`.
        folder: where the graph and a copy of the weights go.
        device, threads: see `open_session`.
        store: how a weight matrix is rounded; see `lower`.

    Raises:
        BadRequest: see `trial_model`.
        SessionFailed: the engine refused the graph.
    """
    path = folder / f"{form}.onnx"
    ir.save(trial_model(model, units, ranges, target, form), path, external_data=f"{path.name}.data")
    return TrialSession(path, model, units, ranges, target, form=form, device=device, threads=threads, store=store)


class TrialSession:
    """A session with some units at other choices, until they are set anew; see `edgekit.runtime.backends.Session`.

    Args:
        path: a graph that `trial_model` made.
        model, units, ranges, target, form: what it was made from.
        device, threads, store: see `open_trial`.
    """

    def __init__(
        self,
        path: Path,
        model: ir.Model,
        units: Sequence[Unit],
        ranges: Mapping[str, Range],
        target: Target,
        *,
        form: Form = "delta",
        device: str = "cpu",
        threads: int = 0,
        store: Store = rtn_store,
    ) -> None:
        self._session = open_session(path, device, threads=threads, planned=False)
        self.device, self.inputs, self.outputs = self._session.device, self._session.inputs, self._session.outputs
        self._model, self._ranges, self._target, self._form = model, ranges, target, form
        self._store = store
        self._units = {unit.id: (index, unit) for index, unit in enumerate(units)}
        self._now: dict[str, str] = {}
        self._feeds: dict[str, dict[str, Array]] = {}  # by unit

    @property
    def overrides(self) -> Mapping[str, str]:
        """The choices of the units that are not as in the graph."""
        return dict(self._now)

    @property
    def plain(self) -> bool:
        """Whether nothing that is set changes a number: weights may lie on the choice's grid already."""
        return not any(self._feeds.values())

    def set(self, overrides: Mapping[str, str] | None) -> None:
        """Put units at choices, and all others back. What stays as it was is not computed again.

        Raises:
            BadRequest: no such unit, a choice it may not take here, or one that needs a range that was not measured.
        """
        wanted = {unit: choice for unit, choice in (overrides or {}).items() if choice != "fp32"}
        for unit in [unit for unit, choice in self._now.items() if wanted.get(unit) != choice]:
            del self._now[unit], self._feeds[unit]
        for unit, choice in wanted.items():
            if unit not in self._now:
                self._feeds[unit] = self._fed(unit, choice)
                self._now[unit] = choice

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """One run with the units as they are set. Raises SessionFailed."""
        changed = {name: value for given in self._feeds.values() for name, value in given.items()}
        return self._session.run({**feeds, **changed})

    def bind(self) -> Binding:
        """Not here: what is bound would outlive `set`."""
        raise SessionFailed("a trial session keeps no buffers between runs; call run")

    def _fed(self, name: str, choice: str) -> dict[str, Array]:
        if name not in self._units:
            raise BadRequest(f"the graph has no unit {name!r}")
        index, unit = self._units[name]
        allowed = self._target.allowed(unit)
        if choice not in allowed:
            raise BadRequest(f"{name} cannot be {choice!r} on {self._target.name}; it may be {', '.join(allowed)}")
        rounding = rounding_of(get_choice(choice), self._target, unit.op)
        missing = [each for each in ranges_of(unit, rounding, self._target) if each not in self._ranges]
        if missing:
            raise BadRequest(f"{name} cannot be tried at {choice}: calibration has no range of {', '.join(missing)}")
        weight = self._weight(unit, choice)
        if weight is None and not rounding:
            return {}
        gates = ["delta"] if self._form == "delta" else []
        gates += ["rounds", rounding] if rounding else []
        fed = {input_name(index, gate): np.array(True) for gate in gates}
        return fed | {input_name(index, "weight"): weight} if weight is not None else fed

    def _weight(self, unit: Unit, choice: str) -> Array | None:
        """What is fed: the weights as stored, or their change, like the graph's own; None where they stay the same."""
        stored, before = initializer(self._model, unit.weight), weight_matrix(self._model, unit)
        matrix = restore(self._store(before, self._target.choice(choice), self._target.code_bits, unit))
        if np.array_equal(matrix, before):
            return None
        if self._form == "delta":
            matrix = matrix - before
        shaped = from_matrix(matrix, unit, tuple(int(size) for size in stored.shape))
        weight: Array = shaped.astype(stored.dtype.numpy(), copy=False)
        return weight
