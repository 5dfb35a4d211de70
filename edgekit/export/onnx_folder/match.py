"""A family's part held against a ready-made graph: what is called otherwise, what has to be rewritten, what is refused.

Only signatures and configs are read. What comes out is the plan of an adoption; `diffusion` carries it out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from edgekit.bundle.graphfile import GraphTensor
from edgekit.bundle.manifest import Dim, DType, TensorSpec
from edgekit.errors import BadSource, UnsupportedModel
from edgekit.export.families import PartJob
from edgekit.export.onnx_folder.graphs import AGAIN, FoundGraph

TIME = "timestep"
STATES, MORE_STATES = "encoder_hidden_states", "encoder_hidden_states_2"
DTYPES: dict[str, tuple[DType, ...]] = {"float32": ("float32", "float16"), "int64": ("int64", "int32")}
TIMES = ("float32", "float16", "float64", "int64", "int32")
WOVEN = {  # inputs that edgekit weaves into a network as it is traced -> what they are there for
    "masked_image_latents": "in-painting by a UNet that sees the mask",
    "down_residual_0": "a ControlNet",
}


@dataclass(frozen=True)
class Adoption:
    """One part, and what has to be done to its graph.

    Attributes:
        job: what the family wants.
        found: what there is.
        inputs, outputs: the signature to be; axes the exporter fixed have their sizes.
        joined: inputs that take the place of STATES, with their widths; or empty.
        sources: output of the job -> output of the graph it is taken from.
        halved: the output that is the first half of its channels; or "".
        fixed: sizes of axes that the family leaves open and the graph does not.
    """

    job: PartJob
    found: FoundGraph
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    joined: dict[str, int]
    sources: dict[str, str]
    halved: str
    fixed: dict[str, int]


@dataclass
class _Axes:
    """Sizes that a graph fixes, by the family's name of the axis."""

    where: str
    fixed: dict[str, int] = field(default_factory=dict)

    def fit(self, name: str, wanted: tuple[Dim, ...], tensor: GraphTensor) -> None:
        """Hold a tensor against its shape in the family. Raises BadSource, UnsupportedModel."""
        if tensor.shape is None or len(tensor.shape) != len(wanted):
            raise UnsupportedModel(f"{self.where}: {name} is {_shape(tensor)} where {_text(wanted)} is fed")
        for dim, there in zip(wanted, tensor.shape, strict=True):
            if not isinstance(there, int):
                continue
            said = dim if isinstance(dim, int) else self.fixed.setdefault(dim, there)
            if said != there:
                raise BadSource(
                    f"{self.where}: {name} is {_shape(tensor)}; by the configs beside it it is {_text(wanted)} with "
                    f"{dim if isinstance(dim, str) else 'the size'} {said}. Do graph and config belong together?"
                )

    def settled(self, name: str, dtype: DType, shape: Iterable[Dim]) -> TensorSpec:
        """The tensor as it will be."""
        return TensorSpec(
            name, dtype, tuple(self.fixed.get(dim, dim) if isinstance(dim, str) else dim for dim in shape)
        )


def match(job: PartJob, found: FoundGraph) -> Adoption:
    """Plan the adoption of one part.

    Raises:
        UnsupportedModel: an input no recipe feeds, an output the recipe takes and the graph has not, another rank or
            element type.
        BadSource: sizes that contradict the configs.
    """
    where, axes = str(found.path), _Axes(str(found.path))
    joined = _joined(job, found)
    wanted = {spec.name: spec for spec in job.inputs if spec.name not in joined}
    if joined:
        length = next(spec for spec in job.inputs if spec.name == STATES).shape[1]
        wanted[STATES] = TensorSpec(STATES, "float32", ("batch", length, sum(joined.values())))
    _check_names(job, found, wanted)
    types: dict[str, DType] = {}
    for name, spec in wanted.items():
        tensor = found.input(name)
        assert tensor is not None
        if name == TIME:
            types[name] = _time(where, tensor)
            continue
        types[name] = _type(where, spec, tensor)
        axes.fit(name, spec.shape, tensor)
    sources, halved = _sources(job, found), ""
    for spec in job.outputs:
        tensor = found.output(sources[spec.name])
        assert tensor is not None
        types[f"output {spec.name}"] = _type(where, spec, tensor)
        shape = spec.shape
        if tensor.name == "latent_parameters":
            shape, halved = _doubled(spec.shape), spec.name
        axes.fit(tensor.name, shape, tensor)
    inputs = []
    for tensor in found.file.inputs:
        for name in joined if joined and tensor.name == STATES else (tensor.name,):
            spec = next(spec for spec in job.inputs if spec.name == name)
            inputs.append(axes.settled(name, types[tensor.name], spec.shape))
    there = [tensor.name for tensor in found.file.outputs]
    order = sorted(job.outputs, key=lambda spec: there.index(sources[spec.name]))
    outputs = tuple(axes.settled(spec.name, types[f"output {spec.name}"], spec.shape) for spec in order)
    return Adoption(job, found, tuple(inputs), outputs, joined, sources, halved, axes.fixed)


def _joined(job: PartJob, found: FoundGraph) -> dict[str, int]:
    """SDXL's two text states, where the graph takes them as one."""
    widths = {spec.name: spec.shape[2] for spec in job.inputs if spec.name in (STATES, MORE_STATES)}
    if len(widths) < 2 or found.input(MORE_STATES) is not None or found.input(STATES) is None:
        return {}
    return {name: width for name, width in widths.items() if isinstance(width, int)}


def _check_names(job: PartJob, found: FoundGraph, wanted: Mapping[str, TensorSpec]) -> None:
    there = [tensor.name for tensor in found.file.inputs]
    unfed = [name for name in there if name not in wanted]
    if unfed:
        raise UnsupportedModel(
            f"{found.path} takes {', '.join(unfed)}, which no recipe feeds {job.part}; it feeds {', '.join(wanted)}. "
            f"{AGAIN}, without options that add inputs"
        )
    missing = [name for name in wanted if name not in there]
    woven = [purpose for name, purpose in WOVEN.items() if name in missing]
    if woven:
        raise UnsupportedModel(
            f"{found.path} is for {woven[0]}, which is not adopted from ready-made graphs; export the folder they were "
            f"made from (safetensors)"
        )
    if missing:
        raise UnsupportedModel(
            f"{found.path} takes {', '.join(there)} and not {', '.join(missing)}, which the config beside it asks for. "
            f"{AGAIN}, so that graph and config belong together"
        )


def _type(where: str, spec: TensorSpec, tensor: GraphTensor) -> DType:
    for dtype in DTYPES[spec.dtype]:
        if dtype == tensor.dtype:
            return dtype
    raise UnsupportedModel(
        f"{where}: {tensor.name} is {tensor.dtype}; only {' or '.join(DTYPES[spec.dtype])} is adopted"
    )


def _time(where: str, tensor: GraphTensor) -> DType:
    if tensor.dtype not in TIMES or tensor.shape is None or len(tensor.shape) > 1:
        raise UnsupportedModel(
            f"{where}: {TIME} is {tensor.dtype} {_shape(tensor)}; a number or a vector of them is adopted"
        )
    return "float32"


def _sources(job: PartJob, found: FoundGraph) -> dict[str, str]:
    """Which outputs of the graph the recipe's are."""
    there = [tensor.name for tensor in found.file.outputs]
    sources = {}
    for spec in job.outputs:
        other = {"hidden_states": _penultimate(there), "latent_sample": "latent_parameters"}.get(spec.name, "")
        taken = next((name for name in (spec.name, other) if name in there), None)
        if taken is None:
            raise UnsupportedModel(
                f"{found.path} gives {', '.join(there)}; the recipe takes {spec.name} of {job.part}"
                f"{' (hidden_states.N of every layer)' if spec.name == 'hidden_states' else ''}. {AGAIN}"
            )
        sources[spec.name] = taken
    return sources


def _penultimate(names: Iterable[str]) -> str:
    """`hidden_states.N` before the last; optimum numbers them from the embeddings, 0, to the number of layers."""
    numbers = [int(found[1]) for name in names if (found := re.fullmatch(r"hidden_states\.(\d+)", name))]
    return f"hidden_states.{max(numbers) - 1}" if len(numbers) > 1 else ""


def _doubled(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """Mean and log-variance, one after the other along the channels."""
    channels = shape[1]
    assert isinstance(channels, int)
    return (shape[0], 2 * channels, *shape[2:])


def _shape(tensor: GraphTensor) -> str:
    return "of any rank" if tensor.shape is None else _text("?" if dim is None else dim for dim in tensor.shape)


def _text(shape: Iterable[Dim | str]) -> str:
    return f"({', '.join(map(str, shape))})"
