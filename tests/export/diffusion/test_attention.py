"""Attention of every kind a model may ask for is one node in both dialects, and gives what torch gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional

from edgekit.errors import UnsupportedModel
from edgekit.export.attention import OPSETS, Dialect, OneNodeAttention, one_node, translation
from edgekit.runtime.backends import open_session
from tests.export.diffusion.tiny_pipelines import FOREIGN

pytestmark = [*FOREIGN, pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")]

BATCH, HEADS, LENGTH, KEYS, WIDTH = 2, 3, 5, 7, 8
NODE = {"ort": "MultiHeadAttention", "std": "Attention"}


def random(*shape: int, seed: int = 0) -> Tensor:
    """Unit normals."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exported(network: nn.Module, inputs: tuple[Tensor, ...], dialect: Dialect, to: Path) -> tuple[Any, list[Any]]:
    """A network's graph, its batch free, and what ONNX Runtime makes of the inputs with it."""
    free = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    with torch.no_grad(), one_node(network, dialect):
        captured = torch.export.export(network.eval(), inputs, dynamic_shapes=(free,), strict=False)
        program = torch.onnx.export(
            captured,
            opset_version=OPSETS[dialect],
            custom_translation_table=translation(dialect),
            dynamo=True,
            verbose=False,
        )
    onnx_ir.save(program.model, to)
    names = [value.name for value in program.model.graph.inputs]
    feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    out = open_session(to, "cpu").run(feeds)
    return program.model.graph, [out[value.name] for value in program.model.graph.outputs]


class Calls(nn.Module):  # type: ignore[misc]
    """Some calls of scaled_dot_product_attention on the same tensors, one output each."""

    def __init__(self, *calls: Callable[..., Tensor]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What each call gives."""
        return tuple(call(*tensors) for call in self.calls)


def attend(*tensors: Tensor, **options: Any) -> Tensor:
    """By the name a model finds it under."""
    return functional.scaled_dot_product_attention(*tensors, **options)


SEEN = torch.arange(KEYS)[None] < torch.tensor([[KEYS], [2]])  # (batch, keys): one prompt is whole, one has two ids
POSITIONS = random(HEADS, LENGTH, KEYS)
EVERY = {
    "no mask": lambda q, k, v, seen: attend(q, k, v),
    "another scale": lambda q, k, v, seen: attend(q, k, v, scale=1.0),
    "keys that are padding": lambda q, k, v, seen: attend(q, k, v, attn_mask=seen[:, None, None]),
    "a bias per key": lambda q, k, v, seen: attend(q, k, v, attn_mask=(seen * 1.5)[:, None, None]),
    "a bias per head and key": lambda q, k, v, seen: attend(q, k, v, attn_mask=(k + v).mean(-1)[:, :, None]),
    "positions for all pictures": lambda q, k, v, seen: attend(q, k, v, attn_mask=POSITIONS),
    "a forbidden triangle": lambda q, k, v, seen: attend(
        q, k, v, attn_mask=torch.ones(LENGTH, KEYS, dtype=torch.bool).tril()
    ),
    "causal": lambda q, k, v, seen: attend(q, k[:, :, :LENGTH], v[:, :, :LENGTH], is_causal=True),
    "fewer heads of keys": lambda q, k, v, seen: attend(q, k[:, :1], v[:, :1], enable_gqa=True),
    "wider values": lambda q, k, v, seen: attend(q, k, torch.cat([v, v.sin()], dim=-1)),
}


@pytest.mark.parametrize("dialect", NODE)
def test_every_kind_of_attention_is_one_node(dialect: Dialect, tmp_path: Path) -> None:
    """Masks, biases, causality, shared heads: a node each, no scores in the graph, and torch's own numbers."""
    inputs = (random(BATCH, HEADS, LENGTH, WIDTH), *(random(BATCH, HEADS, KEYS, WIDTH, seed=n) for n in (1, 2)), SEEN)
    graph, ours = exported(Calls(*EVERY.values()), inputs, dialect, tmp_path / "calls.onnx")
    operators = Counter(node.op_type for node in graph)
    assert operators[NODE[dialect]] == len(EVERY)
    assert not operators["Softmax"]
    for name, call, given in zip(EVERY, EVERY.values(), ours, strict=True):
        np.testing.assert_allclose(given, call(*inputs).numpy(), atol=2e-6, err_msg=name)


def test_a_mask_of_keys_becomes_a_head_dimension(tmp_path: Path) -> None:
    """ONNX Runtime's node then has no mask, which would make it hold every score; whole blocks give no NaN."""
    keys = 600  # several of its kernel's blocks of keys
    seen = torch.arange(keys)[None] >= torch.tensor([[keys - 2], [1]])
    inputs = (random(2, 2, 300, WIDTH), random(2, 2, keys, WIDTH, seed=1), random(2, 2, keys, WIDTH, seed=2), seen)
    call = EVERY["keys that are padding"]
    graph, (ours,) = exported(Calls(call), inputs, "ort", tmp_path / "masked.onnx")
    (node,) = (node for node in graph if node.op_type == "MultiHeadAttention")
    query, key, value, *mask = node.inputs
    assert not any(mask)
    assert [x.shape[2] for x in (query, key, value)] == [2 * (WIDTH + 8), 2 * (WIDTH + 8), 2 * WIDTH]
    np.testing.assert_allclose(ours, call(*inputs).numpy(), atol=2e-6)


def test_plain_attention_of_diffusers_never_makes_heads(tmp_path: Path) -> None:
    """What UNets are made of is projections and one node, without a Transpose or a Reshape."""
    torch.manual_seed(0)
    module = Attention(query_dim=12, cross_attention_dim=10, heads=3, dim_head=4, processor=AttnProcessor2_0())
    call = Calls(lambda x, context: module(x, context))
    call.attention = module
    inputs = (random(2, 5, 12), random(2, 7, 10))
    wanted = module(*inputs).detach().numpy()
    graph, (ours,) = exported(call, inputs, "ort", tmp_path / "plain.onnx")
    assert isinstance(module.processor, OneNodeAttention)
    assert not {"Transpose", "Reshape"} & {node.op_type for node in graph}
    np.testing.assert_allclose(ours, wanted, atol=2e-6)


def test_plain_attention_with_a_mask_runs_its_own_code() -> None:
    """The stock processor takes over, whose call of attention is caught like any other."""
    torch.manual_seed(0)
    module = Attention(query_dim=12, cross_attention_dim=10, heads=3, dim_head=4, processor=AttnProcessor2_0())
    x, context = random(2, 5, 12), random(2, KEYS, 10)
    bias = torch.where(SEEN, 0.0, -10000.0)[:, None]
    wanted = module(x, context, attention_mask=bias)
    with one_node(module, "ort"):
        torch.testing.assert_close(module(x, context, attention_mask=bias), wanted)


def test_attention_is_torchs_own_again_afterwards() -> None:
    """Also where an export fails half way."""
    stock = functional.scaled_dot_product_attention
    with pytest.raises(UnsupportedModel, match="attention of 3 axes"), one_node(nn.Identity(), "ort"):
        attend(*(random(2, 5, 8) for _ in range(3)))
    assert functional.scaled_dot_product_attention is stock
