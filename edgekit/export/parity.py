"""No bundle without proof: every part, the torch module against ONNX Runtime, on fixed inputs of several shapes.

Two processes do it, so that the two frameworks' memory never adds up: the one that holds the torch module writes inputs
and answers to a file, and a later one that never imports torch runs the graph on them.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from edgekit.bundle.manifest import Gate
from edgekit.errors import ParityFailed
from edgekit.export.families import PartJob
from edgekit.runtime.backends import open_session

F32 = npt.NDArray[np.float32]

# float32 on both sides, another order of summation: 1e-7 to 1e-5 of max|x| is what whole UNets show; a wrong constant
# or a missing branch shows as 1e-2 and more.
LIMIT = 1e-4


class Comparison(msgspec.Struct, frozen=True):
    """One part's worst difference, as a fraction of the largest absolute value torch gave."""

    part: str
    error: float
    shapes: tuple[tuple[int, ...], ...]

    def gate(self) -> Gate:
        """For the manifest.

        Raises:
            ParityFailed: beyond LIMIT, or not a number.
        """
        sizes = ", ".join("x".join(map(str, shape)) for shape in self.shapes)
        if not self.error <= LIMIT:
            raise ParityFailed(
                f"{self.part}: the graph differs from the torch model by {self.error:.2g} of max|x| ({sizes}), over "
                f"the limit of {LIMIT:g}; no bundle is written. Report the model's config with this line."
            )
        return Gate(f"{self.part}: max|onnx - torch| / max|torch|, outputs of {sizes}", self.error, LIMIT)


def probe(job: PartJob, number: int) -> dict[str, npt.NDArray[np.generic]]:
    """The inputs of one probe, by name: the same on every machine, others for every part, probe and input."""
    feeds: dict[str, npt.NDArray[np.generic]] = {}
    for spec in job.inputs:
        generator = np.random.default_rng([number, zlib.crc32(f"{job.part}/{spec.name}".encode())])
        shape = job.shape(spec, number)
        if spec.dtype == "int64":
            low, high = job.fill[spec.name]
            feeds[spec.name] = generator.integers(int(low), int(high), shape, dtype=np.int64)
        elif spec.name in job.fill:
            feeds[spec.name] = generator.uniform(*job.fill[spec.name], shape).astype(np.float32)
        else:
            feeds[spec.name] = generator.standard_normal(shape, dtype=np.float32)
    return feeds


def compare(job: PartJob, graph: Path, references: Path) -> Comparison:
    """Run a graph on saved probes.

    Args:
        job: the part.
        graph: its ONNX file.
        references: an .npz of torch's answers, `<probe>.<output>` float32.

    Raises:
        ParityFailed: torch's own answer is empty of content, so that nothing would be compared.
        SessionFailed: ONNX Runtime refuses the graph.
    """
    session = open_session(graph, "cpu")
    worst, shapes = 0.0, []
    with np.load(references) as saved:
        for number in range(job.probes):
            wanted = {spec.name: saved[f"{number}.{spec.name}"] for spec in job.outputs}
            given = session.run(probe(job, number))
            for name, reference in wanted.items():
                worst = max(worst, difference(f"{job.part}.{name}", reference, given[name]))
                shapes.append(reference.shape)
    return Comparison(job.part, worst, tuple(shapes))


def difference(where: str, reference: F32, given: F32) -> float:
    """max|given - reference| / max|reference|; infinite for another shape or a value that is not finite.

    Raises:
        ParityFailed: the reference is all zero or not finite.
    """
    largest = float(np.abs(reference).max(initial=0.0))
    if not 0 < largest < np.inf:
        raise ParityFailed(
            f"{where}: torch's own answer has max|x| = {largest}, so nothing can be compared; are the weights whole?"
        )
    if given.shape != reference.shape or not np.isfinite(given).all():
        return float("inf")
    return float(np.abs(given.astype(np.float64) - reference).max()) / largest


def save_references(path: Path, answers: Mapping[str, F32]) -> None:
    """Write what `compare` reads."""
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **answers)
