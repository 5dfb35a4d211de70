"""What the builder needs to know of a decoder, and nothing of where it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgekit.errors import BadSource
from edgekit.export.language.names import Names
from edgekit.export.language.rope import Rope

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True)
class Spec:
    """One decoder-only transformer. Lengths in tokens; `windows` and `ropes` hold one entry per layer.

    A layer with window w sees positions p - w + 1 .. p; None sees all before it. A layer without rope adds no position.
    """

    family: str
    names: Names
    vocab: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    eps: float
    activation: Activation
    windows: tuple[int | None, ...]
    ropes: tuple[Rope | None, ...]
    tied: bool = False
    gated: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_offset: float = 0.0  # Gemma stores weight - 1
    qk_norm: Literal["none", "head", "all"] = "none"
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    attention_scale: float = 1.0
    attention_softcap: float = 0.0  # 0: none; else cap * tanh(score / cap) before the mask (Gemma 2)
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    logit_softcap: float = 0.0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise BadSource(f"{self.heads} attention heads cannot share {self.kv_heads} key-value heads evenly")
        if len(self.windows) != len(self.ropes) or not self.windows:
            raise BadSource(f"{len(self.windows)} layers by attention type, {len(self.ropes)} by rope: they must agree")

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.windows)

    @property
    def window(self) -> int | None:
        """The sliding window, where any layer has one."""
        return next((window for window in self.windows if window is not None), None)

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Output widths of query, key and value."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim
