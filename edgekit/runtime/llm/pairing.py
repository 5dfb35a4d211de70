"""Whether a draft suits a target: the same tokens, how often it is right, and what that is worth on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from msgspec.structs import replace as replace_fields

from edgekit.bundle.store import Bundle, read_bundle
from edgekit.errors import BadRequest
from edgekit.runtime.llm.ledger import DepthStats, SpeculationStats
from edgekit.runtime.llm.pipeline import TextPipeline
from edgekit.runtime.llm.planning import best_chain
from edgekit.runtime.llm.request import TextOptions
from edgekit.runtime.llm.result import Stats, TextResult

PROMPTS, PROMPT_TOKENS = 8, 48
DEPTH = 4  # drafts of every step of the trial that acceptance is measured with
SAMPLE = '''def read_lines(path, encoding="utf-8"):
    """Read a text file and return its lines without line ends."""
    with open(path, encoding=encoding) as stream:
        return [line.rstrip("\\n") for line in stream]


class Stack:
    """A last-in, first-out collection."""

    def __init__(self, items=()):
        self._items = list(items)

    def push(self, item):
        """Put an item on top."""
        self._items.append(item)

    def pop(self):
        """Take the item on top; raises IndexError when there is none."""
        return self._items.pop()

The weather was fine and the road was empty, so they walked until the evening and told each other what they had seen.
'''


@dataclass(frozen=True)
class Pairing:
    """What a trial of a draft with a target found.

    Attributes:
        same_tokenizer: their tokenizers have one fingerprint; otherwise drafts went through text.
        parameters: of target and draft.
        prompts: texts continued.
        same_text: of these, how many came out token for token as without drafts.
        acceptance: by depth, of chains of DEPTH drafts at every step.
        draft_cost: seconds of one draft over seconds of a plain step.
        depth: drafts per step with the most tokens per second, by acceptance, T(n) and the cost of a draft.
        predicted: tokens per second with so many, over plain decoding.
        speedup: measured with the controller in charge: median over prompts of plain seconds per token over its own.
        slowest, fastest: the least and the largest of these ratios.
        speculation: what the controller says of all prompts together.
    """

    same_tokenizer: bool
    parameters: tuple[int, int]
    prompts: int
    same_text: int
    acceptance: tuple[DepthStats, ...]
    draft_cost: float
    depth: int
    predicted: float
    speedup: float
    slowest: float
    fastest: float
    speculation: SpeculationStats


def pair(
    target: Path,
    draft: Path,
    text: str = SAMPLE,
    *,
    device: str = "cpu",
    threads: int = 0,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    progress: Callable[[str, float], None] = lambda what, share: None,  # noqa: ARG005
) -> Pairing:
    """Continue pieces of `text` without the draft, with a fixed number of drafts, and as the controller chooses.

    The three take turns on one target, and the first piece is continued once more before, uncounted.

    Raises:
        BadRequest: a text too short to cut prompts from, or a pair that cannot draft.
        BundleError, DeviceError: what cannot be loaded.
    """
    one, two = read_bundle(target), read_bundle(draft)
    pipe = TextPipeline(one, device, threads=threads, draft=str(draft))
    chosen = pipe.speculator
    assert chosen is not None
    fixed = pipe.speculate(replace_fields(chosen.config, num_speculative_tokens=DEPTH, adaptive=False))
    roads = {"plain": None, "fixed": fixed, "chosen": chosen}
    options: TextOptions = {"max_new_tokens": max_new_tokens, "temperature": temperature, "add_special_tokens": False}
    pieces = list(prompts(pipe, text))
    results: dict[str, list[TextResult]] = {name: [] for name in roads}
    for number, piece in enumerate([pieces[0], *pieces]):
        progress("comparing", number / (1 + len(pieces)))
        for name in list(roads)[number % 3 :] + list(roads)[: number % 3]:
            pipe.speculator = roads[name]
            results[name].append(pipe.generate(piece, **options))
    plain, helped = results["plain"][1:], results["chosen"][1:]
    pairs = list(zip(plain, helped, strict=True))
    ratios = [seconds_per_token(alone.stats) / seconds_per_token(other.stats) for alone, other in pairs]
    trial = fixed.stats(total=True)
    level = trial.draft_seconds / max(1, DEPTH * trial.steps)
    plan = best_chain(fixed.drafter.prices.at, [row.rate for row in trial.acceptance], draft=level)
    return Pairing(
        same_tokenizer=_tokenizer(one) == _tokenizer(two),
        parameters=(_parameters(one), _parameters(two)),
        prompts=len(pieces),
        same_text=sum(alone.tokens == other.tokens for alone, other in pairs),
        acceptance=trial.acceptance,
        draft_cost=level / fixed.drafter.prices.plain,
        depth=plan.shape.depth,
        predicted=plan.speedup,
        speedup=median(ratios),
        slowest=min(ratios),
        fastest=max(ratios),
        speculation=chosen.stats(total=True),
    )


def prompts(pipe: TextPipeline, text: str) -> Iterator[str]:
    """Up to PROMPTS pieces of `text`, evenly spaced. Raises BadRequest where there is not enough for one."""
    ids = pipe.tokenizer.encode(text, add_special_tokens=False)
    room = min(PROMPT_TOKENS, pipe.verifier.context_length // 4)
    if len(ids) < room:
        raise BadRequest(f"the text has {len(ids)} tokens; a trial needs {room} or more. Give a longer --text.")
    count = min(PROMPTS, 1 + (len(ids) - room) // room)
    for start in _spread(len(ids) - room, count):
        yield pipe.tokenizer.decode(ids[start : start + room])


def _spread(last: int, count: int) -> Sequence[int]:
    return [round(number * last / max(1, count - 1)) for number in range(count)]


def seconds_per_token(stats: Stats) -> float:
    """Of decoding alone, the prompt left out."""
    return stats.decode_seconds / max(1, stats.decode_tokens)


def _tokenizer(bundle: Bundle) -> str:
    return bundle.manifest.tokenizers["default"].fingerprint


def _parameters(bundle: Bundle) -> int:
    return sum(part.parameters for part in bundle.manifest.parts.values())
