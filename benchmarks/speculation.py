"""Speculative decoding against plain decoding, paired and interleaved: tokens/s by drafter and kind of text.

    python benchmarks/speculation.py --work DIR [--precision int4-128] [--rounds 3] [--pairs shipped,large]

Two pairs. `shipped` is models/pycode with models/pycode-draft. `large` is the same target widened and deepened with
parts that do nothing but cost (benchmarks/enlarge.py): 308 M parameters that say the same, so acceptance is that of a
trained pair and a step costs what it costs on a model worth speeding up.

Every drafter continues every prompt, one after the other before the next prompt, the first of them another one each
time; `none` is plain decoding, its engine free to let its threads spin. Each drafter first writes one text that is not
counted. A row has, by drafter and kind of text: the sum of tokens over the sum of seconds, prompts left out; the ratio
to plain decoding, of the sums and by prompt (median and spread); how many texts are those of plain decoding, token for
token; and what the engine says of itself.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from enlarge import enlarge
from harness import record, summary
from speculation_prompts import prompts

import edgekit
from edgekit.export import build
from edgekit.runtime.llm.pipeline import TextPipeline
from edgekit.runtime.llm.result import TextResult

MODELS = Path(__file__).parent.parent / "models"
DRAFTS = ("none", "ngram", "lookahead", "corpus", "model", "hybrid", "auto")
KINDS: Mapping[str, Mapping[str, Any]] = {  # the prompts of a kind of text, and how it is drawn
    "copy": {"of": "copy"},
    "docs": {"of": "docs"},
    "code": {"of": "code"},
    "code, T=1.3, top-p 0.95": {"of": "code", "temperature": 1.3, "top_p": 0.95},
}
SETTLE = 0.05  # seconds: threads of the session before still wait awake for a while
Run = tuple[str, str]  # kind, drafter


def bundle(work: Path, name: str, precision: str) -> Path:
    """A bundle of a model, exported when first asked for."""
    source, path = MODELS / name, work / f"{name}-{precision}.bundle"
    if name == "pycode-large":
        source = work / name
        if not source.exists():
            enlarge(MODELS / "pycode", source)
    build.export(build.ExportRequest(source, path, precision=precision), lambda _what, _share: None)
    return path


def opened(target: Path, draft: Path, name: str, args: argparse.Namespace) -> TextPipeline:
    """The target with a drafter; `corpus` copies from the training scripts of this repository."""
    config: dict[str, Any] = {"model": str(draft)} if name in ("model", "hybrid", "auto") else {}
    if name not in ("none", "auto"):
        config |= {"method": name, "adaptive": True}
    if name == "corpus":
        config["documents"] = str(Path(__file__).parent.parent / "training")
    return edgekit.load(
        target,
        task="text-generation",
        threads=args.threads,
        draft="none" if name == "none" else "auto",
        speculative_config=config or None,
        exact=args.exact,
    )


def compare(pipes: Mapping[str, TextPipeline], args: argparse.Namespace) -> dict[Run, list[TextResult]]:
    """Every text of every drafter, in an order that is the same for all."""
    texts = prompts()
    for pipe in pipes.values():
        pipe.generate(texts["code"][-1] + "0\n", max_new_tokens=args.tokens)
    found: dict[Run, list[TextResult]] = defaultdict(list)
    names, turn = list(pipes), 0
    for number in range(args.rounds):
        for kind, how in KINDS.items():
            options = {key: value for key, value in how.items() if key != "of"}
            for prompt in texts[how["of"]][: args.prompts]:
                turn += 1
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    options["seed"] = turn
                    time.sleep(SETTLE)
                    found[kind, name].append(pipes[name].generate(prompt, max_new_tokens=args.tokens, **options))
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr)
    return found


def rate(results: list[TextResult]) -> float:
    """Tokens per second of decoding."""
    return sum(r.stats.decode_tokens for r in results) / sum(r.stats.decode_seconds for r in results)


def row(kind: str, name: str, plain: list[TextResult], mine: list[TextResult]) -> dict[str, Any]:
    """One drafter on one kind of text, beside plain decoding of the same prompts."""
    pairs = list(zip(plain, mine, strict=True))
    told = {
        "kind": kind,
        "draft": name,
        "tokens_per_s": round(rate(mine), 2),
        "plain_tokens_per_s": round(rate(plain), 2),
        "ratio_of_sums": round(rate(mine) / rate(plain), 4),
        "ratio_by_prompt": summary([rate([one]) / rate([other]) for other, one in pairs]),
        "texts": len(pairs),
        "same_text": sum(other.tokens == one.tokens for other, one in pairs),
    }
    steps = [one.stats.speculation for one in mine if one.stats.speculation is not None]
    if steps:
        tokens = sum(one.tokens for one in steps)
        told |= {
            "tokens_per_verify": round(tokens / sum(one.steps for one in steps), 3),
            "rows_per_token": round(sum(one.rows_per_token * one.tokens for one in steps) / tokens, 3),
            "accepted": sum(one.accepted for one in steps),
            "drafted": sum(one.drafted for one in steps),
            "first_draft_accepted": acceptance(steps, 1),
            "second_draft_accepted": acceptance(steps, 2),
            "drafting_share": round(
                sum(one.draft_seconds for one in steps)
                / sum(one.draft_seconds + one.verify_seconds + one.accept_seconds for one in steps),
                4,
            ),
            "estimated_speedup": round(summary([one.speedup for one in steps])["median"], 3),
        }
    return told


def acceptance(steps: list[Any], depth: int) -> float | None:
    """Share of the drafts at a depth whose parents stood that stood too."""
    rows = [found for one in steps for found in one.acceptance if found.depth == depth]
    offered = sum(found.offered for found in rows)
    return round(sum(found.accepted for found in rows) / offered, 3) if offered else None


def run_pair(pair: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one pair."""
    name = {"shipped": "pycode", "large": "pycode-large"}[pair]
    target = bundle(args.work, name, args.precision)
    draft = bundle(args.work, "pycode-draft", args.draft_precision)
    pipes = {name: opened(target, draft, name, args) for name in args.drafts.split(",")}
    found = compare(pipes, args)
    common = {"pair": pair, "precision": args.precision, "draft_precision": args.draft_precision, "exact": args.exact}
    common |= {"threads": args.threads, "new_tokens": args.tokens, "rounds": args.rounds}
    speculating = next(pipe.speculator for pipe in pipes.values() if pipe.speculator is not None)
    common["curve"] = {n: round(speculating.curve.relative(n), 3) for n in speculating.curve.rows}
    common["plain_ms_measured_at_load"] = round(1e3 * speculating.curve.at(1), 3)
    common["invariance"] = asdict(speculating.invariance)
    return [
        {**common, **row(kind, name, found[kind, "none"], results)}
        for (kind, name), results in found.items()
        if name != "none"
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Ratios to plain decoding, drafters by kind of text, as Markdown."""
    lines = []
    for pair in dict.fromkeys(row["pair"] for row in rows):
        mine = [row for row in rows if row["pair"] == pair]
        drafts = list(dict.fromkeys(row["draft"] for row in mine))
        lines += [f"\n{pair}, {mine[0]['precision']}", "", f"| text | plain, tokens/s | {' | '.join(drafts)} |"]
        lines.append("|---|---:|" + "---:|" * len(drafts))
        for kind in dict.fromkeys(row["kind"] for row in mine):
            cells = {row["draft"]: row for row in mine if row["kind"] == kind}
            plain = next(iter(cells.values()))["plain_tokens_per_s"]
            ratios = " | ".join(f"{cells[draft]['ratio_of_sums']:.2f}" for draft in drafts)
            lines.append(f"| {kind} | {plain:.0f} | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of bundles")
    parser.add_argument("--pairs", default="shipped,large")
    parser.add_argument("--drafts", default=",".join(DRAFTS))
    parser.add_argument("--precision", default="int4-128", help="of the target")
    parser.add_argument("--draft-precision", default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=10, help="of each kind, at most ten")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = [row for pair in args.pairs.split(",") for row in run_pair(pair, args)]
    if not args.dry_run:
        record("speculation", rows)
    print(table(rows))


if __name__ == "__main__":
    main()
