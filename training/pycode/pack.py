"""Turn a run's checkpoint into a Hugging Face folder: bf16 weights, configuration and the shared tokenizer.

    python -m training.pycode.pack --role target --run RUN --tokenizer TOKENIZER --out models/pycode

The folder is written beside its place and each file renamed into it, so a reader never meets half a file.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaForCausalLM

from training.pycode.model import build_model

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def load_checkpoint(role: str, run: Path) -> LlamaForCausalLM:
    """The model of `RUN/state.pt`, rounded to bfloat16."""
    model = build_model(role, seed=0)
    model.load_state_dict(torch.load(run / "state.pt", weights_only=True)["model"])
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return model.to(torch.bfloat16)


def add_rope_theta(config: Path) -> None:
    """Repeat `rope_theta` at the top level, where readers of older configurations look for it."""
    fields = json.loads(config.read_text())
    fields["rope_theta"] = fields["rope_parameters"]["rope_theta"]
    config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def write_folder(model: LlamaForCausalLM, tokenizer: Path, out: Path) -> None:
    """Save `model` and the tokenizer's files into `out`, replacing what they replace and nothing else."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        model.save_pretrained(scratch)
        add_rope_theta(Path(scratch) / "config.json")
        for name in TOKENIZER_FILES:
            shutil.copyfile(tokenizer / name, Path(scratch) / name)
        for path in sorted(Path(scratch).iterdir()):
            path.chmod(0o644)
            os.replace(path, out / path.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", choices=("target", "draft"), required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    write_folder(load_checkpoint(options.role, options.run), options.tokenizer, options.out)
