"""The two architectures, and the optimizers that train them."""

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from training.pycode.tokenizer import CONTEXT, VOCAB_SIZE

SHAPES: dict[str, dict[str, int]] = {  # target: 11.0 M parameters; draft: 1.1 M
    "target": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}
    | {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64},
    "draft": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
}
MATRIX_LR = 0.02  # Muon, for the matrices inside the layers
OTHER_LR = 4e-3  # AdamW, for the tied embedding and the norms
WARMUP = 60  # steps


def build_model(role: str, seed: int) -> LlamaForCausalLM:
    """A freshly initialised `target` or `draft`, float32."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        **SHAPES[role],
    )
    return LlamaForCausalLM(config)


class Optimizers:
    """Muon (Jordan et al. 2024) for the layers' matrices and AdamW for the rest, on one schedule."""

    def __init__(self, model: nn.Module) -> None:
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in chosen]
        self.muon = torch.optim.Muon(matrices, lr=MATRIX_LR, momentum=0.95, weight_decay=0.05)
        self.adam = torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(self, factor: float) -> None:
        """One update at `factor` times the peak rates; gradients are cleared."""
        for optimizer, peak in ((self.muon, MATRIX_LR), (self.adam, OTHER_LR)):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()

    def state(self) -> dict[str, object]:
        """What `restore` needs."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def restore(self, state: dict[str, dict[str, object]]) -> None:
        """Continue from a saved `state`."""
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


def schedule(step: int, progress: float, decay: float) -> float:
    """Warm-up, stable, linear decay over the last `decay` share of the budget (WSD, Hu et al. 2024)."""
    return min(1.0, (step + 1) / WARMUP, max(0.0, 1.0 - progress) / decay)
