"""Finding the graph of a component and refusing, before anything is loaded, what no bundle could carry or run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edgekit.bundle.graphfile import GraphFile, GraphTensor, read_graph
from edgekit.errors import BadGraph, BadSource, UnsafePath, UnsupportedModel

GRAPH = "model.onnx"
OLDEST_OPSET, NEWEST_OPSET = 11, 26  # Resize got its present meaning in 11; no engine here knows more than 26
DOMAINS = {"ort": ("ai.onnx", "com.microsoft"), "std": ("ai.onnx",)}  # dialect of the target -> operators it may run
NOISE = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")
AGAIN = "Export the model again with a current `optimum-cli export onnx`"


@dataclass(frozen=True)
class FoundGraph:
    """One graph file of a folder, its signature, and the bytes it takes with its data."""

    path: Path
    file: GraphFile
    bytes: int

    def input(self, name: str) -> GraphTensor | None:
        """The input of this name, if there is one."""
        return next((tensor for tensor in self.file.inputs if tensor.name == name), None)

    def output(self, name: str) -> GraphTensor | None:
        """The output of this name, if there is one."""
        return next((tensor for tensor in self.file.outputs if tensor.name == name), None)


def find_graph(folder: Path, dialect: str) -> FoundGraph:
    """The graph in a component's folder, checked as far as that goes without loading it.

    Args:
        folder: holds one ONNX file, or one called model.onnx.
        dialect: `ort` or `std`, which says whose operators there may be.

    Raises:
        BadSource: no graph, several, a malformed one, or data files that are missing, short or elsewhere.
        UnsupportedModel: an opset or an operator that cannot be carried or run.
    """
    path = _graph_in(folder)
    try:
        file = read_graph(path.resolve())
    except (BadGraph, UnsafePath) as why:
        fault = str(why).removeprefix(path.resolve().name).lstrip(": ").partition(". Export the model again")[0]
        raise BadSource(f"{path} is no ONNX graph that can be adopted: {fault}. Is the download complete?") from why
    _check_opset(path, file)
    _check_operators(path, file, dialect)
    return FoundGraph(path, file, path.stat().st_size + _check_data(path, file))


def graph_names(folder: Path) -> tuple[str, ...]:
    """Names of the ONNX files in a folder, in order."""
    return tuple(sorted(file.name for file in folder.glob("*.onnx"))) if folder.is_dir() else ()


def _graph_in(folder: Path) -> Path:
    names = graph_names(folder)
    if not names:
        raise BadSource(f"{folder} holds no *.onnx; is the download complete? An adopted folder has a graph per part")
    if len(names) > 1 and GRAPH not in names:
        raise BadSource(
            f"{folder} holds {', '.join(names)} and no {GRAPH}: a decoder in two halves, or several precisions. {AGAIN}"
            f" (one graph per part), or leave one file there and call it {GRAPH}"
        )
    return folder / (GRAPH if GRAPH in names else names[0])


def _check_opset(path: Path, file: GraphFile) -> None:
    opset = file.opsets.get("ai.onnx", 0)
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise UnsupportedModel(
            f"{path} is opset {opset}; {OLDEST_OPSET} to {NEWEST_OPSET} are adopted. {AGAIN} (--opset 18)"
        )


def _check_operators(path: Path, file: GraphFile, dialect: str) -> None:
    """Operators of the standard, and of ONNX Runtime where that is what runs them; none that draws random numbers."""
    allowed = DOMAINS[dialect]
    foreign = sorted(name for name in file.operators if name.partition("::")[0] not in allowed)
    if foreign:
        raise UnsupportedModel(
            f"{path} calls {_listed(foreign)}; the device asked for runs operators of {' and '.join(allowed)} alone. "
            f"{AGAIN}, without optimizations for another engine"
        )
    noise = sorted(name for name in file.operators if name.removeprefix("ai.onnx::") in NOISE)
    if noise:
        raise UnsupportedModel(
            f"{path} calls {_listed(noise)}: it would answer differently every time, and no seed reaches it. {AGAIN}, "
            f"which gives `latent_parameters` instead of drawing from them"
        )


def _check_data(path: Path, file: GraphFile) -> int:
    """Bytes of the data files: plain names beside the graph, each long enough."""
    ends: dict[str, int] = {}
    for external in file.external:
        name = external.location
        if name in ("", ".", "..") or set(name) & set("/\\:\0"):
            raise BadSource(f"{path}: tensor {external.tensor!r} lies in {name!r}; data lies beside its graph")
        ends[name] = max(ends.get(name, 0), external.offset + (external.length or 0))
    sizes = {name: _size(path.with_name(name)) for name in ends}
    for name, end in ends.items():
        if end > sizes[name]:
            raise BadSource(
                f"{path.with_name(name)} has {sizes[name]:,} bytes where the graph reads {end:,}; "
                f"is the download complete?"
            )
    return sum(sizes.values())


def _size(path: Path) -> int:
    if not path.is_file():
        raise BadSource(f"{path} is missing, and the graph beside it takes weights from it; is the download complete?")
    return path.stat().st_size


def _listed(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
