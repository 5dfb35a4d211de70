"""How the thread pools of a draft and its target should wait, measured: policies of ONNX Runtime, side by side.

One cycle is what speculative decoding does: `--drafts` runs of one token on the draft, then one run of one row more
on the target, each after a text of `--context` tokens. Every policy lives in a process of its own, because the global
pool of ONNX Runtime is one per process; the processes take turns, a few cycles each, so that the machine's ups and
downs hit all alike. `plain` is one token of the target alone, in the same process and so beside an idle draft.

    python benchmarks/threads.py TARGET.bundle DRAFT.bundle [--rounds 40] [--cycles 8] [--drafts 4] [--threads 0]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime
from harness import record, summary

from edgekit.bundle.store import read_bundle
from edgekit.runtime.backends.ort import OrtSession
from edgekit.runtime.llm.tree import TokenTree
from edgekit.runtime.llm.verifier import LocalVerifier

SPIN = "session.intra_op.allow_spinning"
STOP = "session.force_spinning_stop"  # at the end of a run
SPELL = "session.intra_op.spin_duration_us"


@dataclass(frozen=True)
class Policy:
    """Session configuration of the target and of the draft; `shared` puts both on the global pool."""

    target: Mapping[str, str] = field(default_factory=dict)
    draft: Mapping[str, str] = field(default_factory=dict)
    draft_threads: int | None = None
    shared: bool = False


POLICIES = {
    "both spin": Policy(),
    "both sleep": Policy({SPIN: "0"}, {SPIN: "0"}),
    "both spin, stopped after each run": Policy({STOP: "1"}, {STOP: "1"}),
    **{f"both spin for {us} us": Policy({SPELL: us}, {SPELL: us}) for us in ("50", "200", "500", "1000", "2000")},
    "both spin for 50 us, stopped after each run": Policy({SPELL: "50", STOP: "1"}, {SPELL: "50", STOP: "1"}),
    "target spins, draft sleeps": Policy({}, {SPIN: "0"}),
    "target spins, draft on one thread": Policy({}, {}, draft_threads=1),
    "target sleeps, draft on one thread": Policy({SPIN: "0"}, {}, draft_threads=1),
    "one pool": Policy(shared=True),
}


def verifier(path: Path, entries: Mapping[str, str], threads: int, shared: bool) -> LocalVerifier:
    """The decoder of a bundle in a session configured so."""
    bundle = read_bundle(path)
    decoding = bundle.manifest.decoding
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.use_per_session_threads = not shared
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    graph = bundle.root / bundle.manifest.parts[decoding.part].graph
    engine = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    return LocalVerifier(OrtSession(engine, graph.name, "cpu"), decoding)


def serve(target: Path, draft: Path, args: argparse.Namespace) -> None:
    """One policy's process: for every line on stdin, some cycles and their times as JSON."""
    policy = POLICIES[args.serve]
    if policy.shared:
        onnxruntime.set_global_thread_pool_sizes(args.threads, 1)
    big = verifier(target, policy.target, args.threads, policy.shared)
    draft_threads = args.threads if policy.draft_threads is None else policy.draft_threads
    small = verifier(draft, policy.draft, draft_threads, policy.shared)
    text = tuple(5 + number * 7 % 1009 for number in range(args.context))
    chain = TokenTree.chain(text[-1], text[: args.drafts])

    def drafting() -> None:
        small.rollback(args.context - 1)
        grown = text
        for _ in range(args.drafts):
            row = small.score(grown, TokenTree(grown[-1:], (-1,))).logits[0]
            small.keep((0,))
            grown += (int(row.argmax()) % 1009,)

    def verify() -> None:
        big.score(text, chain).logits.argmax(axis=1)

    def plain() -> None:
        big.score(text, TokenTree(text[-1:], (-1,))).logits.argmax(axis=1)

    for _ in range(3):
        drafting(), verify(), plain()
    print("ready", flush=True)
    for _ in sys.stdin:
        cycles = [[timed(drafting), timed(verify)] for _ in range(args.cycles)]
        alone = [timed(plain) for _ in range(args.cycles)]
        drafts, verifies = (median(column) for column in zip(*cycles, strict=True))
        whole = median(map(sum, cycles))
        print(json.dumps({"draft": drafts, "verify": verifies, "cycle": whole, "plain": median(alone)}), flush=True)


def timed(run: Callable[[], None]) -> float:
    """Wall milliseconds."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per policy."""
    workers = {}
    try:
        for name in POLICIES:
            command = [sys.executable, __file__, *sys.argv[1:], "--serve", name]
            workers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert workers[name].stdout.readline() == "ready\n"
        times: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        for turn in range(args.rounds):
            for name in list(workers)[turn % len(workers) :] + list(workers)[: turn % len(workers)]:
                workers[name].stdin.write("go\n")
                workers[name].stdin.flush()
                times[name].append(json.loads(workers[name].stdout.readline()))
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    rows = []
    for name, seen in times.items():
        ms = {part: summary([one[part] for one in seen]) for part in seen[0]}
        paired = [one["cycle"] / spin["cycle"] for one, spin in zip(seen, times["both spin"], strict=True)]
        rows.append(
            {
                "policy": name,
                "target": args.target.name,
                "draft": args.draft.name,
                "drafts": args.drafts,
                "context": args.context,
                "threads": args.threads,
                "ms": ms,
                "cycle_over_both_spin": summary(paired),
            }
        )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("draft", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--cycles", type=int, default=8)
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--threads", type=int, default=0, help="of each session; 0 leaves the choice to the engine")
    parser.add_argument("--serve", choices=POLICIES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.target, given.draft, given)
    else:
        record("threads", compare(given))
