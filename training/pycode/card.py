"""Write `training_record.json`, the model card and NOTICE of both folders from what was recorded and measured.

    python -m training.pycode.card --work WORK --models models

WORK holds `data/`, the runs `target/`, `draft-start/` and `draft/`, `generated.npz`, `metrics.json`, `demos.json`.
"""

import argparse
import hashlib
import json
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

from training.pycode.train import TOKENS_PER_STEP

HERE = Path(__file__).parent
FOLDERS = {"target": "pycode", "draft": "pycode-draft"}
RUNS = {"target": ("target",), "draft": ("draft-start", "draft")}
Record = dict[str, Any]


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def run_record(run: Path) -> Record:
    """Steps, tokens, seconds and the loss curve of one run; a step repeated after a resumption counts once."""
    state = torch.load(run / "state.pt", weights_only=True)
    rows = {row["step"]: row for row in map(json.loads, (run / "log.jsonl").read_text().splitlines())}
    seconds = {"wall_seconds": round(state["wall"]), "cpu_seconds": round(state["cpu"])}
    curve = [[row["tokens"], row["loss"]] for step, row in sorted(rows.items()) if step % 100 == 0]
    steps = {"steps": state["step"], "tokens": state["step"] * TOKENS_PER_STEP}
    return read_json(run / "options.json") | steps | seconds | {"loss_by_tokens": curve}  # type: ignore[no-any-return]


def folder_record(role: str, work: Path, folder: Path) -> Record:
    """Everything `training_record.json` says about one folder."""
    metrics = read_json(work / "metrics.json")
    runs = [{"name": name, **run_record(work / name)} for name in RUNS[role]]
    weights = (folder / "model.safetensors").read_bytes()
    generated = len(np.load(work / "generated.npz")["tokens"]) if role == "draft" else 0
    libraries = {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)}
    pair = {key: metrics[key] for key in ("greedy", "sampled")}
    return {
        "role": role,
        "weights": {"file": "model.safetensors", "bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()},
        "sources": read_json(work / "data" / "sources.json"),
        "runs": runs,
        "cpu_seconds": sum(run["cpu_seconds"] for run in runs),
        "rows_written_by_the_target": generated,
        "libraries": libraries,
        "metrics": metrics[role] | ({"acceptance": pair}),
    }


def source_table(sources: list[Record]) -> str:
    """Markdown rows: name, version, licence, files, kilobytes trained on."""
    head = "| source | version | licence | files | trained on, kB | held out, kB |\n|---|---|---|---|---|---|\n"
    return head + "\n".join(
        f"| {row['name']} | {row['version']} | {row['licence']} | {row['files']} | {row['train_bytes'] / 1000:,.0f} "
        f"| {(row['heldout_bytes'] + row['heldout_package_bytes']) / 1000:,.0f} |"
        for row in sources
    )


def notice(sources: list[Record]) -> str:
    """The NOTICE file: whose text the weights were trained on."""
    lines = [f"  {row['name']} {row['version']}: {row['licence']}" for row in sources if row["train_bytes"]]
    return (HERE / "NOTICE.in").read_text(encoding="utf-8") + "\n".join(lines) + "\n"


def demo_text(demos: list[Record]) -> str:
    """The demonstrations, each as one Python block whose first lines are the prompt."""
    shown = []
    for demo in demos:
        lines = demo["prompt"].count("\n") + (not demo["prompt"].endswith("\n"))
        given = f"Prompt: {'the first line' if lines == 1 else f'the first {lines} lines'}"
        text = demo["whole"] or demo["text"]
        shown.append(
            f"{given}; temperature {demo['temperature']}, seed {demo['seed']}.\n\n```python\n{text.rstrip()}\n```"
        )
    return "\n\n".join(shown)


def metric_fields(metrics: Record) -> dict[str, str]:
    """The numbers the card templates name."""
    fields = {}
    for role in FOLDERS:
        for split in ("heldout", "heldout_package"):
            one = metrics[role][split]
            fields[f"{role}_{split}_ppl"] = f"{one['perplexity']:.2f}"
            fields[f"{role}_{split}_bpb"] = f"{one['bits_per_byte']:.3f}"
            fields[f"{split}_tokens"] = f"{one['tokens']:,}"
            fields[f"{split}_bytes"] = f"{one['bytes']:,}"
    greedy = metrics["greedy"]
    fields |= {"agreement": f"{greedy['agreement']:.3f}", "accepted": f"{greedy['accepted_per_round']:.2f}"}
    fields |= {"per_call": f"{greedy['tokens_per_target_call']:.2f}", "positions": f"{greedy['positions']:,}"}
    fields |= {"by_depth": ", ".join(f"{share:.3f}" for share in greedy["acceptance_by_depth"])}
    return fields | {
        f"sampled_{heat[2:].replace('.', '')}": f"{share:.3f}" for heat, share in metrics["sampled"].items()
    }


def write_cards(work: Path, models: Path) -> None:
    """Write the record, card and NOTICE of both folders."""
    for role, name in FOLDERS.items():
        record = folder_record(role, work, models / name)
        fields = metric_fields(read_json(work / "metrics.json"))
        fields |= {"sources": source_table(record["sources"]), "cpu_seconds": f"{record['cpu_seconds']:,}"}
        fields |= {"tokens": f"{sum(run['tokens'] for run in record['runs']) / 1e6:.1f}"}
        fields |= {
            "demos": demo_text(read_json(work / "demos.json")),
            "rows": str(record["rows_written_by_the_target"]),
        }
        card = Template((HERE / f"card_{role}.md").read_text(encoding="utf-8")).substitute(fields)
        (models / name / "README.md").write_text(card, encoding="utf-8")
        (models / name / "NOTICE").write_text(notice(record["sources"]), encoding="utf-8")
        text = json.dumps(record, indent=2) + "\n"
        (models / name / "training_record.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    options = parser.parse_args()
    write_cards(options.work, options.models)
