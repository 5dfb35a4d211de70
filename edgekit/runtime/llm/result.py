"""What a text pipeline gives: chunks while it streams, a result at the end, and counts and times of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

from edgekit.runtime.llm.accept import Accepted
from edgekit.runtime.llm.drafters.corpus import Span
from edgekit.runtime.llm.ledger import SpeculationStats
from edgekit.runtime.llm.tree import Source

FinishReason = Literal["eos", "stop", "length", "context"]


@dataclass(frozen=True, slots=True)
class Stats:
    """Where the time went; the consumer's own time between chunks is not counted.

    Attributes:
        prefill_tokens: prompt tokens computed, the last one with the first step.
        reused_tokens: prompt tokens found in the cache of an earlier call, or in the prefix store.
        prefill_seconds: until the first step was done.
        decode_tokens: tokens after the first step.
        decode_steps: verifier calls after the first.
        decode_seconds: time of these.
        speculation: what the drafter and its controller did; None for ordinary decoding.
    """

    prefill_tokens: int = 0
    reused_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    speculation: SpeculationStats | None = None


@dataclass(frozen=True, slots=True)
class TextChunk:
    """One token and the text that is certain with it; the last chunk has no token and says why it is the last.

    `text` may be empty while a character, or what could be a stop string, is incomplete. `source` says which drafter
    guessed the token, None where the model drew it itself. Chunks are the same with and without drafts, but for it.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None
    source: Source | None = None
    stats: Stats = field(default=Stats(), repr=False)


@dataclass(frozen=True, slots=True)
class TextResult:
    """A finished text.

    Attributes:
        text: what was generated, without special tokens and without the stop string.
        tokens: every generated token, the end-of-sequence token included.
        finish_reason: `eos`; `stop`, a stop string; `length`, max_new_tokens; `context`, the model's context is full.
        prompt_tokens: ids of the prompt.
        stats: counts and seconds.
        spans: runs of tokens that were copied from a document, with the document's name and offset.
        seed: of the noise it was drawn with; one of several under `best_of`.
        mean_logprob: mean log-probability of its tokens under the model; None unless `best_of` asked for it.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: tuple[int, ...]
    stats: Stats
    spans: tuple[Span, ...] = ()
    seed: int = 0
    mean_logprob: float | None = None


class Timed:
    """Accepted steps, and the seconds that making them took."""

    def __init__(self, steps: Iterator[Accepted], prompt: int, reused: int) -> None:
        self._steps = steps
        self._prompt = prompt
        self._reused = reused
        self._sizes: list[int] = []
        self._seconds: list[float] = []

    def __iter__(self) -> Iterator[Accepted]:
        while True:
            start = perf_counter()
            step = next(self._steps, None)
            if step is None:
                return
            self._seconds.append(perf_counter() - start)
            self._sizes.append(len(step.tokens))
            yield step

    @property
    def made(self) -> int:
        """Tokens so far."""
        return sum(self._sizes)

    def stats(self, speculation: SpeculationStats | None) -> Stats:
        """The counts and times so far."""
        return Stats(
            prefill_tokens=self._prompt - self._reused,
            reused_tokens=self._reused,
            prefill_seconds=sum(self._seconds[:1]),
            decode_tokens=sum(self._sizes[1:]),
            decode_steps=len(self._sizes[1:]),
            decode_seconds=sum(self._seconds[1:]),
            speculation=speculation,
        )
