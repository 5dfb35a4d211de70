"""A part held against a graph: what is taken, what is rewritten, and every way in which the two may not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgekit.bundle.graphfile import GraphFile, GraphTensor
from edgekit.bundle.manifest import TensorSpec
from edgekit.errors import BadSource, UnsupportedModel
from edgekit.export.families import PartJob, family_of
from edgekit.export.onnx_folder.graphs import FoundGraph, find_graph
from edgekit.export.onnx_folder.match import match
from edgekit.export.sources import read_source
from tests.export.onnx_folder.folders import FOLDERS, PIPELINES


def job_of(name: str, part: str) -> PartJob:
    """What the folder's family wants of a part."""
    source = read_source(FOLDERS / name)
    return next(job for job in family_of(source).jobs(source) if job.part == part)


def found(name: str, part: str) -> FoundGraph:
    """What the folder has."""
    return find_graph(FOLDERS / name / part, "ort")


def changed(graph: FoundGraph, name: str, **values) -> FoundGraph:
    """The same graph with another input or output of this name; without one where `drop` is told."""
    file = graph.file
    drop = values.pop("drop", False)

    def each(tensors: tuple[GraphTensor, ...]) -> tuple[GraphTensor, ...]:
        return tuple(replace(t, **values) if t.name == name else t for t in tensors if not (drop and t.name == name))

    return replace(graph, file=replace(file, inputs=each(file.inputs), outputs=each(file.outputs)))


def added(graph: FoundGraph, tensor: GraphTensor) -> FoundGraph:
    """The same graph with one more input."""
    return replace(graph, file=replace(graph.file, inputs=(*graph.file.inputs, tensor)))


@pytest.mark.parametrize("name", PIPELINES)
def test_every_part_of_every_folder_fits_its_family(name: str) -> None:
    """Inputs and outputs are those the family wants, in the graph's order."""
    source = read_source(FOLDERS / name)
    for job in family_of(source).jobs(source):
        adoption = match(job, found(name, job.part))
        assert {spec.name: spec for spec in adoption.inputs} == {spec.name: spec for spec in job.inputs}
        assert set(adoption.outputs) == set(job.outputs)
        assert adoption.fixed == {}
        assert adoption.halved == ("latent_sample" if job.part == "vae_encoder" else "")


def test_what_is_called_otherwise_is_found() -> None:
    """The penultimate of SDXL's hidden states, the parameters of the encoder's distribution, joined text states."""
    assert match(job_of("sdxl-turbo", "text_encoder"), found("sdxl-turbo", "text_encoder")).sources == {
        "hidden_states": "hidden_states.1"
    }
    assert match(job_of("lcm", "vae_encoder"), found("lcm", "vae_encoder")).sources == {
        "latent_sample": "latent_parameters"
    }
    assert match(job_of("sdxl-turbo", "unet"), found("sdxl-turbo", "unet")).joined == {
        "encoder_hidden_states": 8,
        "encoder_hidden_states_2": 12,
    }
    assert match(job_of("lcm", "unet"), found("lcm", "unet")).joined == {}


@pytest.mark.parametrize(
    ("inputs", "dtype"),
    [("float16", "float16"), ("float32", "float32")],
)
def test_half_precision_is_adopted_as_it_is(inputs: str, dtype: str) -> None:
    """What is fed is cast by the runtime; times are float32 whatever the graph takes."""
    graph = found("sd-turbo", "unet")
    for name in ("sample", "timestep", "encoder_hidden_states", "out_sample"):
        graph = changed(graph, name, dtype=inputs)
    adoption = match(job_of("sd-turbo", "unet"), graph)
    types = {spec.name: spec.dtype for spec in (*adoption.inputs, *adoption.outputs)}
    assert types.pop("timestep") == "float32"
    assert set(types.values()) == {dtype}


def test_token_ids_may_be_int32() -> None:
    """As the text encoders of older pages have them."""
    adoption = match(job_of("lcm", "text_encoder"), changed(found("lcm", "text_encoder"), "input_ids", dtype="int32"))
    assert adoption.inputs == (TensorSpec("input_ids", "int32", ("batch", 16)),)


def test_sizes_the_exporter_fixed_are_fixed() -> None:
    """On every tensor that has the axis, whether or not the graph said so there."""
    graph = changed(found("lcm", "unet"), "sample", shape=(1, 4, 8, 10))
    adoption = match(job_of("lcm", "unet"), graph)
    assert adoption.fixed == {"batch": 1, "height": 8, "width": 10}
    assert {spec.name: spec.shape for spec in adoption.inputs} == {
        "sample": (1, 4, 8, 10),
        "timestep": (1,),
        "encoder_hidden_states": (1, "length", 8),
        "timestep_cond": (1, 8),
    }
    assert adoption.outputs[0].shape == (1, 4, 8, 10)


REFUSED = {  # (folder, part, change to the graph) -> error, words
    "an input nobody feeds": (
        ("lcm", "unet", lambda g: added(g, GraphTensor("controlnet_cond", "float32", ("b", 3)))),
        UnsupportedModel,
        "takes controlnet_cond, which no recipe feeds unet; it feeds sample, timestep",
    ),
    "an embedding the config asks for": (
        ("lcm", "unet", lambda g: changed(g, "timestep_cond", drop=True)),
        UnsupportedModel,
        "not timestep_cond, which the config beside it asks for",
    ),
    "an embedding the config does not know": (
        ("sd-turbo", "unet", lambda g: added(g, GraphTensor("timestep_cond", "float32", ("b", 8)))),
        UnsupportedModel,
        "takes timestep_cond, which no recipe feeds",
    ),
    "no hidden states at all": (
        ("sdxl-turbo", "text_encoder", lambda g: replace(g, file=replace(g.file, outputs=g.file.outputs[:2]))),
        UnsupportedModel,
        r"gives last_hidden_state, pooler_output; the recipe takes hidden_states .*hidden_states\.N of every layer",
    ),
    "another width": (
        ("lcm", "unet", lambda g: changed(g, "encoder_hidden_states", shape=("b", "n", 768))),
        BadSource,
        r"\(b, n, 768\); by the configs .*the size 8. Do graph and config belong together",
    ),
    "another number of channels": (
        ("lcm", "vae_encoder", lambda g: changed(g, "latent_parameters", shape=("b", 32, "h", "w"))),
        BadSource,
        "the size 8",
    ),
    "two sizes of one axis": (
        ("lcm", "unet", lambda g: changed(changed(g, "sample", shape=(1, 4, 8, 8)), "out_sample", shape=(2, 4, 8, 8))),
        BadSource,
        "batch 1",
    ),
    "another rank": (
        ("lcm", "vae_decoder", lambda g: changed(g, "latent_sample", shape=("b", 4, "f", "h", "w"))),
        UnsupportedModel,
        r"\(b, 4, f, h, w\) where \(batch, 4, height, width\) is fed",
    ),
    "no rank": (
        ("lcm", "vae_decoder", lambda g: changed(g, "latent_sample", shape=None)),
        UnsupportedModel,
        "of any rank",
    ),
    "another type": (
        ("lcm", "vae_decoder", lambda g: changed(g, "latent_sample", dtype="bfloat16")),
        UnsupportedModel,
        "bfloat16; only float32 or float16",
    ),
    "a matrix of times": (
        ("lcm", "unet", lambda g: changed(g, "timestep", shape=("b", "n"))),
        UnsupportedModel,
        "a number or a vector of them",
    ),
    "times that are no numbers": (
        ("lcm", "unet", lambda g: changed(g, "timestep", dtype="bool")),
        UnsupportedModel,
        "timestep is bool",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case: str) -> None:
    """Before a weight is read: the file, the tensor, both sides of the contradiction, and what to do."""
    (name, part, change), error, words = REFUSED[case]
    graph = change(found(name, part))
    with pytest.raises(error, match=words) as caught:
        match(job_of(name, part), graph)
    assert str(Path(name, part)) in str(caught.value)


def test_a_graph_that_takes_two_text_states_itself_is_not_joined() -> None:
    """Where the exporter kept SDXL's states apart under our names, they are fed as they are."""
    graph = changed(found("sdxl-turbo", "unet"), "encoder_hidden_states", shape=("b", "n", 8))
    graph = added(graph, GraphTensor("encoder_hidden_states_2", "float32", ("b", "n", 12)))
    adoption = match(job_of("sdxl-turbo", "unet"), graph)
    assert adoption.joined == {}
    assert {spec.name for spec in adoption.inputs} >= {"encoder_hidden_states", "encoder_hidden_states_2"}


def test_signatures_are_all_it_reads() -> None:
    """A graph that is nowhere on disk is matched just the same."""
    graph = found("lcm", "vae_decoder")
    ghost = replace(
        graph, path=Path("nowhere"), file=GraphFile(graph.file.inputs, graph.file.outputs, frozenset(), (), {})
    )
    assert match(job_of("lcm", "vae_decoder"), ghost).outputs == job_of("lcm", "vae_decoder").outputs
