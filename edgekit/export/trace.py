"""One part, from weights on disk to an ONNX graph with readable axes: the torch side, run in a child process."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import nn
from torch.export import Dim

from edgekit.bundle.manifest import TensorSpec
from edgekit.errors import UnsupportedModel
from edgekit.export.attention import OPSETS, one_node, translation
from edgekit.export.families import PartJob
from edgekit.export.lora import fold
from edgekit.export.parity import probe, save_references
from edgekit.export.worker import Task

INLINE_BYTES = 256  # smaller constants stay in the .onnx file


def trace(job: PartJob, task: Task, at: Callable[[str], None]) -> None:
    """Load a part, fold LoRAs, save torch's answers to its probes, and write `<graphs>/<part>.onnx` (+ `.data`).

    Args:
        job: the part.
        task: where it comes from and goes to, the attention dialect, the LoRAs.
        at: told each stage: load, reference, trace, write.

    Raises:
        BadSource, UnsupportedModel: the component cannot be loaded or expressed.
    """
    _be_quiet()
    at("load")
    module, attribute = job.network.split(":")
    files = [Path(task.source) / job.folder, *([Path(job.adapter)] if job.adapter is not None else [])]
    network: nn.Module = getattr(import_module(module), attribute)(*files)
    if job.lora is not None:
        for lora in task.loras:
            fold(network.inner, job.lora, Path(lora.path), lora.scale)
    with torch.no_grad():
        at("reference")
        save_references(Path(task.references) / f"{job.part}.npz", _answers(network, job))
        at("trace")
        with one_node(network, task.attention):
            program = _export(network, job, task)
    at("write")
    _tidy(program.model, job)
    path = Path(task.graphs) / f"{job.part}.onnx"
    large = any(value.const_value.nbytes > INLINE_BYTES for value in program.model.graph.initializers.values())
    data = f"{path.name}.data" if large else None
    onnx_ir.save(program.model, path, external_data=data, size_threshold_bytes=INLINE_BYTES)


def _be_quiet() -> None:
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _example(job: PartJob, number: int) -> tuple[torch.Tensor, ...]:
    feeds = probe(job, number)
    return tuple(torch.from_numpy(feeds[spec.name]) for spec in job.inputs)


def _answers(network: nn.Module, job: PartJob) -> dict[str, Any]:
    """Torch's outputs for every probe, by the stock attention: what `parity.compare` holds the graph against."""
    answers: dict[str, Any] = {}
    for number in range(job.probes):
        given = network(*_example(job, number))
        given = (given,) if isinstance(given, torch.Tensor) else given
        answers |= {f"{number}.{spec.name}": value.numpy() for spec, value in zip(job.outputs, given, strict=True)}
    return answers


def _export(network: nn.Module, job: PartJob, task: Task) -> Any:
    """The whole part as an ONNX program; its axes still have torch's names for symbols.

    torch.export runs here and not inside torch.onnx.export, which asks it for deferred shape assertions, fails on those
    of an odd latent, and then captures everything a second time with the slower tracer.
    """
    free = [{i: Dim.DYNAMIC for i, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in job.inputs]
    dims = _as_signature(network, free)
    try:
        captured = torch.export.export(network.eval(), _example(job, 0), dynamic_shapes=dims, strict=False)
        return torch.onnx.export(
            captured,
            input_names=[spec.name for spec in job.inputs],
            output_names=[spec.name for spec in job.outputs],
            opset_version=OPSETS[task.attention],
            custom_translation_table=translation(task.attention),
            dynamo=True,
            verbose=False,
        )
    except (torch.onnx.errors.OnnxExporterError, torch._dynamo.exc.UserError) as why:
        reason = str(why.__cause__ or why).strip().splitlines()
        raise UnsupportedModel(f"{job.part}: torch cannot export this network: {' '.join(reason[:3])}") from why


def _as_signature(network: nn.Module, dims: list[dict[int, Any]]) -> tuple[Any, ...]:
    """Per-input dynamic axes as torch.export takes them: those of `*inputs` are one entry."""
    parameters = inspect.signature(network.forward).parameters.values()
    named = sum(each.kind is not inspect.Parameter.VAR_POSITIONAL for each in parameters)
    rest = tuple(dims[named:])
    return (*dims[:named], rest) if rest and named < len(parameters) else tuple(dims)


def _tidy(model: Any, job: PartJob) -> None:
    """Name axes as the job does, and drop what the exporter noted of this machine's files."""
    names = _axis_names(model.graph.inputs, job)
    for value in _values(model):
        value.metadata_props.clear()
        if value.shape is not None and any(isinstance(dim, onnx_ir.SymbolicDim) for dim in value.shape):
            value.shape = onnx_ir.Shape([_renamed(dim, names) for dim in value.shape])
    for value, spec in zip(model.graph.outputs, job.outputs, strict=True):
        _check_fixed(value, spec, job.part)
        value.shape = onnx_ir.Shape(spec.shape)
    _name_products(model.graph)
    for holder in (model, model.graph, *onnx_ir.traversal.RecursiveGraphIterator(model.graph)):
        holder.metadata_props.clear()
        holder.doc_string = None


def _name_products(graph: Any) -> None:
    """Name what has weights after its module (`up_blocks.0.resnets.1.conv1`): plans and reports speak of it by that."""
    taken = {node.name for node in graph}
    for node in graph:
        if node.op_type not in ("Conv", "MatMul", "Gemm", "Gather") or not any(
            value is not None and value.is_initializer() for value in node.inputs
        ):
            continue
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        name = scopes[-2].removeprefix("inner.") if len(scopes) > 1 else ""
        if name and name not in taken:
            taken.add(name)
            node.name = name


def _axis_names(inputs: Any, job: PartJob) -> dict[str, str]:
    """Torch's symbols (`s18`) by the axes they turned out to be."""
    names: dict[str, str] = {}
    for value, spec in zip(inputs, job.inputs, strict=True):
        for symbol, axis in zip(value.shape, spec.shape, strict=True):
            if isinstance(axis, str):
                if not isinstance(symbol, onnx_ir.SymbolicDim):
                    raise UnsupportedModel(f"{job.part}: {axis} of {spec.name} can only be {symbol}; it must be free")
                names.setdefault(str(symbol.value), axis)
    return names


def _values(model: Any) -> Iterator[Any]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        yield from node.outputs


def _renamed(dim: Any, names: dict[str, str]) -> Any:
    if isinstance(dim, int) or dim.value is None:  # an unknown size must stay unnamed: equal names are equal sizes
        return dim
    return onnx_ir.SymbolicDim(re.sub(r"\bs\d+\b", lambda found: names.get(found[0], found[0]), str(dim.value)))


def _check_fixed(value: Any, spec: TensorSpec, part: str) -> None:
    for got, wanted in zip(value.shape, spec.shape, strict=True):
        if isinstance(wanted, int) and got != wanted:
            raise UnsupportedModel(f"{part}: output {spec.name} has shape {value.shape}, its config says {spec.shape}")
