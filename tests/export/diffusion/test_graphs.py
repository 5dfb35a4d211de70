"""What the exported graphs look like, and what the manifest says of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import onnx_ir
import pytest

from edgekit.export.parity import LIMIT
from tests.export.diffusion.conftest import Exported
from tests.export.diffusion.tiny_pipelines import FOREIGN, PIPELINES

pytestmark = FOREIGN

AXES = {"batch", "height", "width", "length", "image_height", "image_width"}


def graph(example: Exported, part: str) -> onnx_ir.Graph:
    """One part's graph, its weights left on disk."""
    return onnx_ir.load(example.bundle.graph(part)).graph


@pytest.mark.parametrize("name", PIPELINES)
def test_attention_is_one_node(exported: Callable[[str], Exported], name: str) -> None:
    """As many MultiHeadAttention nodes as the torch model has attentions, and not one softmax."""
    from diffusers.models.attention_processor import Attention

    example = exported(name)
    modules = {"unet": example.pipeline.unet, "vae_decoder": getattr(example.pipeline.vae, "decoder", None)}
    for part, module in modules.items():
        wanted = sum(isinstance(each, Attention) for each in module.modules())
        operators = Counter(node.op_type for node in graph(example, part))
        assert operators["MultiHeadAttention"] == wanted
        assert not operators["Softmax"]
    assert Counter(node.op_type for node in graph(example, "unet"))["MultiHeadAttention"] > 0


@pytest.mark.parametrize("name", PIPELINES)
def test_signatures_are_readable(exported: Callable[[str], Exported], name: str) -> None:
    """Time is float32 (batch,), every dynamic axis has a word for a name, and inside only formulas of those words."""
    example = exported(name)
    for part, spec in example.bundle.manifest.parts.items():
        made = graph(example, part)
        for value, said in zip([*made.inputs, *made.outputs], [*spec.inputs, *spec.outputs], strict=True):
            assert value.name == said.name
            assert tuple(d if isinstance(d, int) else d.value for d in value.shape) == said.shape
            assert {dim for dim in said.shape if isinstance(dim, str)} <= AXES
        inner = [out for node in made for out in node.outputs if out.shape is not None]
        formulas = {str(dim.value) for out in inner for dim in out.shape if not isinstance(dim, int) and dim.value}
        assert set(re.findall(r"[A-Za-z_]\w*", " ".join(formulas))) <= AXES
    unet = example.bundle.manifest.parts["unet"]
    (time,) = (spec for spec in unet.inputs if spec.name == "timestep")
    assert (time.dtype, time.shape) == ("float32", ("batch",))


@pytest.mark.parametrize("name", PIPELINES)
def test_every_part_passed_its_gate(exported: Callable[[str], Exported], name: str) -> None:
    """The manifest holds one measured difference per part, far below the limit."""
    manifest = exported(name).bundle.manifest
    assert [gate.what.partition(":")[0] for gate in manifest.precision.gates] == list(manifest.parts)
    assert all(0 <= gate.value < LIMIT / 10 for gate in manifest.precision.gates)
    assert all(gate.limit == LIMIT for gate in manifest.precision.gates)


@pytest.mark.parametrize("name", PIPELINES)
def test_nothing_of_the_making_machine_is_in_a_graph(exported: Callable[[str], Exported], name: str) -> None:
    """No file path, stack trace or module dump of the exporter stays in the bundle."""
    example = exported(name)
    for part in example.bundle.manifest.parts:
        raw = example.bundle.graph(part).read_bytes()
        assert b"site-packages" not in raw
        assert b"stack_trace" not in raw
        assert b"pkg.torch" not in raw


@pytest.mark.parametrize("name", PIPELINES)
def test_provenance_says_where_it_came_from(exported: Callable[[str], Exported], name: str) -> None:
    """Source, hash, licence of the card, and the versions of the tools."""
    provenance = exported(name).bundle.manifest.provenance
    assert (provenance.source, provenance.licence) == (name, "openrail++")
    assert {"edgekit", "torch", "diffusers", "onnxruntime"} <= provenance.tools.keys()


def test_progress_only_goes_forward(exported: Callable[[str], Exported]) -> None:
    """Fractions rise to one, and every part is heard of."""
    example = exported("lcm")
    fractions = [fraction for _, fraction in example.said]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert all(any(text.startswith(f"{part}:") for text, _ in example.said) for part in example.bundle.manifest.parts)
