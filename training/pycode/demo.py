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

PROMPTS = (
    "def fibonacci(n):\n",
    "class Stack:\n    def __init__(self):\n",
    'import os\n\ndef list_files(path):\n    """',
    "import json\n\n\ndef read_json(path):\n",
    "import argparse\n\ndef main():\n    parser = argparse.ArgumentParser()\n",
)
NEW_TOKENS = 96


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


def complete(folder: Path, temperature: float, seed: int) -> list[dict[str, object]]:
    """Every prompt with its raw completion, the part of it that parses, and how it was drawn."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    out: list[dict[str, object]] = []
    for prompt in PROMPTS:
        tokens = torch.tensor([tokenizer.encode(prompt)])
        random = torch.Generator().manual_seed(seed)
        rows = continue_rows(model, tokens, tokens.shape[1] + NEW_TOKENS, torch.tensor([temperature]), random)
        text = tokenizer.decode(rows[0].tolist())
        row = {"prompt": prompt, "text": text, "whole": whole_statements(text, prompt)}
        out.append(row | {"temperature": temperature, "seed": seed})
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    demos = complete(options.model, options.temperature, options.seed)
    options.out.write_text(json.dumps(demos, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
