"""Complete the demonstration prompts and cut each completion at its last whole statement.

python -m training.pycode.demo --model models/pycode --out DEMOS.json
"""

import argparse
import ast
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from training.pycode.generate import continue_rows

DEMOS = (  # a prompt, and the seed chosen for it out of a few
    ('import os\n\n\ndef list_files(path):\n    """', 0),
    ("import logging\n\nlogger = logging.getLogger(__name__)\n\n\ndef load_config(path):\n", 0),
    ("class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n", 0),
    ("class Connection:\n    def __enter__(self):\n        return self\n\n    def __exit__(self, *exc_info):\n", 0),
    ("def fibonacci(n):\n    if n < 2:\n", 0),
)
TEMPERATURE = 0.4
NEW_TOKENS = 72


def whole_statements(text: str, prompt: str) -> str | None:
    """The longest prefix of lines that is valid Python and longer than the prompt, or None."""
    lines = text.split("<|endoftext|>")[0].split("\n")
    for end in range(len(lines) - 1, prompt.count("\n"), -1):
        candidate = "\n".join(lines[:end]) + "\n"
        try:
            ast.parse(candidate)
        except (SyntaxError, ValueError):
            continue
        return candidate
    return None


def complete(folder: Path) -> list[dict[str, object]]:
    """Every prompt with its raw completion, the part of it that parses, and how it was drawn."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    out: list[dict[str, object]] = []
    for prompt, seed in DEMOS:
        tokens = torch.tensor([tokenizer.encode(prompt)])
        random = torch.Generator().manual_seed(seed)
        rows = continue_rows(model, tokens, tokens.shape[1] + NEW_TOKENS, torch.tensor([TEMPERATURE]), random)
        text = tokenizer.decode(rows[0].tolist())
        row = {"prompt": prompt, "text": text, "whole": whole_statements(text, prompt)}
        out.append(row | {"temperature": TEMPERATURE, "seed": seed})
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    demos = complete(options.model)
    options.out.write_text(json.dumps(demos, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
