"""A text-generation bundle, ready to use: prompt in, text out, whole or streamed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, Protocol

import msgspec

from edgekit.bundle.manifest import Manifest
from edgekit.errors import BadManifest, BadRequest
from edgekit.runtime.backends import open_session
from edgekit.runtime.llm.accept import Accepted, own_draw
from edgekit.runtime.llm.chat import ChatTemplate
from edgekit.runtime.llm.drafters import Drafter, NoDraft
from edgekit.runtime.llm.generate import generate
from edgekit.runtime.llm.probs import Sampling
from edgekit.runtime.llm.stop import StopStrings
from edgekit.runtime.llm.verifier import LocalVerifier
from edgekit.runtime.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length", "context"]
Message = Mapping[str, Any]


class BundleLike(Protocol):
    """What a pipeline needs of a bundle: its folder and its checked manifest."""

    @property
    def root(self) -> Path:
        """The folder."""

    @property
    def manifest(self) -> Manifest:
        """The manifest."""


@dataclass(frozen=True, slots=True)
class Stats:
    """Where the time went; the consumer's own time between chunks is not counted.

    Attributes:
        prefill_tokens: prompt tokens computed, the last one with the first step.
        reused_tokens: prompt tokens found in the cache of an earlier call.
        prefill_seconds: until the first token was there.
        decode_tokens: tokens after the first step.
        decode_steps: verifier calls after the first.
        decode_seconds: time of these.
    """

    prefill_tokens: int = 0
    reused_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    decode_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class TextChunk:
    """A piece of streamed text, with the tokens since the last piece; the last piece says why it is the last.

    `text` may be empty while a character, or what could be a stop string, is incomplete.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None
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
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: tuple[int, ...]
    stats: Stats


@dataclass(frozen=True, slots=True)
class _Job:
    """One request, checked."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]


class TextPipeline:
    """A language model from a bundle. One call at a time; a call left early, even by Ctrl-C, spoils nothing.

    The cache stays between calls: a prompt that begins like the last text is computed from where they part.

    Args:
        bundle: with `.root` and `.manifest`, such as `edgekit.bundle.store.read_bundle` gives.
        device: `cpu`, `cuda` or `cuda:N`.
        threads: of the inference engine; 0 leaves the choice to it.

    Raises:
        BadRequest: the bundle generates no text.
        BadManifest: it has no decoding block or no tokenizer.
        DeviceError: the device is not there, or refuses the graph.
    """

    def __init__(self, bundle: BundleLike, device: str = "cpu", *, threads: int = 0) -> None:
        manifest = bundle.manifest
        if manifest.task != "text-generation":
            raise BadRequest(f"this is a {manifest.task} bundle; a text pipeline needs text-generation")
        if manifest.decoding is None or "default" not in manifest.tokenizers:
            raise BadManifest("a text-generation bundle needs a decoding block and a tokenizer named default")
        self._decoding = manifest.decoding
        spec = manifest.tokenizers["default"]
        self.tokenizer = Tokenizer.from_file(bundle.root / spec.file)
        self._special = dict(spec.special)
        self._chat: ChatTemplate | None = None
        if spec.chat_template is not None:
            self._chat = ChatTemplate((bundle.root / spec.chat_template).read_text("utf-8"))
        graph = bundle.root / manifest.parts[self._decoding.part].graph
        self._verifier = LocalVerifier(open_session(graph, device, threads=threads), self._decoding)

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
        add_special_tokens: bool = True,
    ) -> TextResult:
        """Generate to the end.

        Args:
            prompt: text to continue; with `system` it is a user's message instead.
            messages: a conversation, `{"role": ..., "content": ...}`; needs the bundle's chat template.
            system: the system message that goes first.
            max_new_tokens: at most this many.
            temperature: 0 is greedy; None takes the bundle's default, as for the four that follow.
            top_k: keep the k best tokens; 0 keeps all.
            top_p: keep the best tokens up to this probability.
            min_p: keep tokens at least this probable relative to the best.
            repetition_penalty: makes tokens already there less likely; 1 is none.
            stop: texts that end the generation; they are not part of it.
            seed: of the noise; the same seed, prompt and bundle give the same text.
            add_special_tokens: let the tokenizer put its special tokens around `prompt`.

        Raises:
            BadRequest: an option out of its range, or a prompt that is empty or does not fit.
            SessionFailed: the engine failed.
        """
        sampling = self._sampling(seed, temperature, top_k, top_p, min_p, repetition_penalty)
        tokens = self._encode(prompt, messages, system, add_special_tokens)
        job = self._job(tokens, max_new_tokens, stop, sampling)
        chunks = list(self._chunks(job, NoDraft()))
        reason = chunks[-1].finish_reason
        assert reason is not None
        made = tuple(token for chunk in chunks for token in chunk.tokens)
        return TextResult("".join(chunk.text for chunk in chunks), made, reason, job.prompt, chunks[-1].stats)

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
        add_special_tokens: bool = True,
    ) -> Iterator[TextChunk]:
        """Generate piece by piece; the arguments, errors and text are those of `generate`.

        The request is checked at once; tokens are computed as chunks are taken. Leaving the loop early is fine.
        """
        sampling = self._sampling(seed, temperature, top_k, top_p, min_p, repetition_penalty)
        tokens = self._encode(prompt, messages, system, add_special_tokens)
        return self._chunks(self._job(tokens, max_new_tokens, stop, sampling), NoDraft())

    def _sampling(
        self,
        seed: int,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        min_p: float | None,
        repetition_penalty: float | None,
    ) -> Sampling:
        """What was asked for, over the bundle's defaults."""
        asked = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
        }
        defaults = msgspec.structs.asdict(self._decoding.defaults)
        return Sampling(
            **{**defaults, **{name: value for name, value in asked.items() if value is not None}}, seed=seed
        )

    def _encode(
        self, prompt: str | None, messages: Sequence[Message] | None, system: str | None, add_special_tokens: bool
    ) -> tuple[int, ...]:
        """The ids of a request; a conversation's special tokens are the template's business."""
        if (prompt is None) == (messages is None):
            raise BadRequest("give either prompt or messages")
        if prompt is not None and system is None:
            ids = self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
            if not ids and self._decoding.bos is not None:
                ids = [self._decoding.bos]
            return tuple(ids)
        if self._chat is None:
            raise BadRequest("this bundle has no chat template: give a prompt without system, or export a chat model")
        talk = list(messages) if messages is not None else [{"role": "user", "content": prompt}]
        if system is not None:
            talk.insert(0, {"role": "system", "content": system})
        text = self._chat.render(talk, special=self._special)
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def _job(self, prompt: tuple[int, ...], max_new_tokens: int, stop: Sequence[str], sampling: Sampling) -> _Job:
        room = self._decoding.context_length
        if not prompt:
            raise BadRequest("the prompt has no tokens and the model no beginning-of-sequence token; write something")
        if len(prompt) >= room:
            raise BadRequest(f"the prompt has {len(prompt)} tokens and the model's context is {room}; shorten it")
        if max_new_tokens < 1:
            raise BadRequest(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        StopStrings(stop)  # refuses what is no list of texts
        return _Job(prompt, max_new_tokens, sampling, tuple(stop))

    def _chunks(self, job: _Job, drafter: Drafter) -> Iterator[TextChunk]:
        """Run a job: tokens to text, text past the stop strings, and the reason for the end."""
        ends = frozenset(self._decoding.eos)
        steps = _Timed(
            generate(
                job.prompt,
                drafter=drafter,
                verifier=self._verifier,
                accept=partial(own_draw, draw=job.sampling, ends=ends),
                ends=ends,
                max_new_tokens=job.max_new_tokens,
            ),
            len(job.prompt),
            self._verifier.shared(job.prompt),
        )
        words, stops = self.tokenizer.stream(), StopStrings(job.stop)
        last: int | None = None
        for step in steps:
            last = step.tokens[-1]
            text = stops.feed(words.feed(token for token in step.tokens if token not in ends))
            if stops.stopped:
                yield TextChunk(text, step.tokens, "stop", steps.stats())
                return
            yield TextChunk(text, step.tokens)
        text = stops.feed(words.finish()) + stops.flush()
        reason: FinishReason = "length" if steps.made == job.max_new_tokens else "context"
        if last in ends:
            reason = "eos"
        yield TextChunk(text, (), "stop" if stops.stopped else reason, steps.stats())


class _Timed:
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

    def stats(self) -> Stats:
        """The counts and times so far."""
        return Stats(
            prefill_tokens=self._prompt - self._reused,
            reused_tokens=self._reused,
            prefill_seconds=sum(self._seconds[:1]),
            decode_tokens=sum(self._sizes[1:]),
            decode_steps=len(self._sizes[1:]),
            decode_seconds=sum(self._seconds[1:]),
        )
