"""What a bundle is really used for: requests with fixed prompts and seeds, answered with some graphs exchanged.

Errors are measured on the final outputs, after every step and every later graph, because that is what a user sees: an
error that the next step or the decoder takes away has cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgekit.errors import BadRequest
from edgekit.quant.metrics import Metric, errors
from edgekit.runtime.backends import Session

Array = npt.NDArray[Any]


class Workload(Protocol):
    """Requests that can be answered again and again; equal sessions give equal outputs."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What errors mean here."""

    def run(self, replaced: Mapping[str, Session]) -> tuple[Array, ...]:
        """Final outputs, one float array per request, with these parts of the bundle exchanged."""


@dataclass(frozen=True, eq=False)
class GraphWorkload:
    """The plainest workload: one graph and fixed inputs, such as recorded activations.

    Attributes:
        part: the name under which the graph is exchanged.
        session: what runs where nothing is exchanged.
        feeds: one set of inputs per request.
        output: the name of the output that counts.
        metrics: what errors mean here.
    """

    part: str
    session: Session
    feeds: Sequence[Mapping[str, Array]]
    output: str
    metrics: tuple[Metric, ...]

    def run(self, replaced: Mapping[str, Session]) -> tuple[Array, ...]:
        """See Workload."""
        session = replaced.get(self.part, self.session)
        return tuple(np.asarray(session.run(feeds)[self.output]) for feeds in self.feeds)


def reference_of(workload: Workload) -> tuple[Array, ...]:
    """The outputs with nothing exchanged.

    Raises:
        BadRequest: there is no request, or an output that is not finite: no error can be measured against it.
    """
    outputs = workload.run({})
    if not outputs:
        raise BadRequest("a workload without requests measures nothing; give at least one prompt")
    broken = [number for number, output in enumerate(outputs) if not np.isfinite(output).all()]
    if broken:
        raise BadRequest(f"requests {broken} give infinite or undefined outputs before anything was changed")
    return outputs


def measure(workload: Workload, references: Sequence[Array], replaced: Mapping[str, Session]) -> dict[str, float]:
    """Every metric's value with these parts exchanged: the mean over requests."""
    return errors(workload.metrics, references, workload.run(replaced))
