"""A text-generation bundle, ready to use: prompt in, text out, whole or streamed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.bundle.reader import Bundle
from edgekit.errors import BadManifest, BadRequest
from edgekit.runtime.backends import Array, open_session
from edgekit.runtime.llm.accept import Accept, Accepted, own_draw
from edgekit.runtime.llm.chat import ChatTemplate
from edgekit.runtime.llm.drafters import Ask, Drafter, NoDraft
from edgekit.runtime.llm.drafters.corpus import spans
from edgekit.runtime.llm.generate import generate
from edgekit.runtime.llm.request import Job, Reader, TextOptions
from edgekit.runtime.llm.result import FinishReason, Stats, TextChunk, TextResult, Timed
from edgekit.runtime.llm.speculation import SpeculativeConfig, Speculator, Target, graph_fingerprint, read_config
from edgekit.runtime.llm.stop import StopStrings
from edgekit.runtime.llm.tree import TokenTree
from edgekit.runtime.llm.verifier import LocalVerifier
from edgekit.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from edgekit.runtime.llm.prefix import PrefixStore


class TextPipeline:
    """A language model from a bundle. One call at a time; a call left early, even by Ctrl-C, spoils nothing.

    The cache stays between calls: a prompt that begins like the last text is computed from where they part.

    Args:
        bundle: what `edgekit.bundle.store.read_bundle` gives.
        device: `cpu`, `cuda` or `cuda:N`.
        threads: of the inference engine; 0 leaves the choice to it.
        draft: `none`, `auto`, another row of DRAFTERS, `corpus:PATH`, or the path of a smaller bundle.
        speculative_config: the keys of `speculation.SpeculativeConfig`.
        exact: fill up every run so that drafts cannot change a bit of the text (see docs/controller.md).
        prefixes: keys and values of earlier texts, shared between calls and kept as long as it has room.
        report: told in words when something is measured that takes seconds; it is measured once on a machine.

    Raises:
        BadRequest: the bundle generates no text; a drafter that does not exist or does not fit; or `exact` where the
            engine's kernels allow no such thing.
        BadManifest: it has no decoding block or no tokenizer.
        DeviceError: the device is not there, or refuses the graph.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        *,
        threads: int = 0,
        draft: str = "none",
        speculative_config: Mapping[str, Any] | None = None,
        exact: bool = False,
        prefixes: PrefixStore | None = None,
        report: Callable[[str], None] = lambda words: None,  # noqa: ARG005
    ) -> None:
        manifest = bundle.manifest
        if manifest.task != "text-generation":
            raise BadRequest(f"this is a {manifest.task} bundle; a text pipeline needs text-generation")
        if manifest.decoding is None or "default" not in manifest.tokenizers:
            raise BadManifest("a text-generation bundle needs a decoding block and a tokenizer named default")
        self._decoding = manifest.decoding
        spec = manifest.tokenizers["default"]
        self.tokenizer = Tokenizer.from_file(bundle.root / spec.file)
        chat = None
        if spec.chat_template is not None:
            chat = ChatTemplate((bundle.root / spec.chat_template).read_text("utf-8"))
        self._reader = Reader(self._decoding, self.tokenizer, chat, spec.special)
        graph = bundle.root / manifest.parts[self._decoding.part].graph
        config = read_config(draft, speculative_config)
        session = open_session(graph, device, threads=threads)
        self.verifier = LocalVerifier(session, self._decoding, prefixes=prefixes)
        self.fingerprint = graph_fingerprint(bundle, device)
        self._target = Target(bundle, self.verifier, self.tokenizer, exact, device, threads, report)
        if exact:
            self.verifier.granule = self._target.invariance.exact()
        self.speculator: Speculator | None = None if config.method == "none" else self.speculate(config)

    def speculate(self, config: SpeculativeConfig) -> Speculator:
        """Another way to speculate; it is used once it is the pipeline's `speculator`. Raises BadRequest."""
        return Speculator(config, self._target)

    def generate(self, prompt: str | None = None, *, best_of: int = 1, **options: Unpack[TextOptions]) -> TextResult:
        """Generate to the end.

        Args:
            prompt: text to continue; with `system` it is a user's message instead.
            best_of: draw this many texts, with seeds `seed`, `seed + 1`, ..., and give the one whose tokens are most
                probable on average; the prompt is computed once.
            options: see `request.TextOptions`.

        Raises:
            BadRequest: an option out of its range, or a prompt that is empty or does not fit.
            SessionFailed: the engine failed.
        """
        job = self._reader.job(prompt, options)
        if best_of == 1:
            return self._whole(job, None)
        if best_of < 1 or job.sampling.temperature == 0:
            raise BadRequest(
                f"best_of is {best_of} at temperature {job.sampling.temperature:g}: it must be at least 1, and above 1 "
                "it needs a temperature above 0, since greedy texts are all the same"
            )
        seeds = (job.sampling.seed + number for number in range(best_of))
        drawn = [self._whole(replace(job, sampling=replace(job.sampling, seed=s)), MeanLogProb()) for s in seeds]
        return max(drawn, key=lambda result: result.mean_logprob or 0.0)

    def stream(self, prompt: str | None = None, **options: Unpack[TextOptions]) -> Iterator[TextChunk]:
        """Generate token by token; the arguments, errors and text are those of `generate`.

        The request is checked at once; tokens are computed as chunks are taken. Leaving the loop early is fine.
        """
        return self._chunks(self._reader.job(prompt, options), None)

    def _whole(self, job: Job, probable: MeanLogProb | None) -> TextResult:
        chunks = list(self._chunks(job, probable))
        last = chunks[-1]
        assert last.finish_reason is not None
        sources = [chunk.source for chunk in chunks if chunk.tokens]
        tokens = tuple(token for chunk in chunks for token in chunk.tokens)
        return TextResult(
            text="".join(chunk.text for chunk in chunks),
            tokens=tokens,
            finish_reason=last.finish_reason,
            prompt_tokens=job.prompt,
            stats=last.stats,
            spans=spans(sources),
            seed=job.sampling.seed,
            mean_logprob=None if probable is None else probable.mean,
        )

    def _chunks(self, job: Job, probable: MeanLogProb | None) -> Iterator[TextChunk]:
        """Run a job: tokens to text, text past the stop strings, and the reason for the end."""
        try:
            yield from self._pieces(job, probable)
        finally:
            self.verifier.remember()

    def _pieces(self, job: Job, probable: MeanLogProb | None) -> Iterator[TextChunk]:
        steps = self._steps(job, probable)
        words, stops = self.tokenizer.stream(), StopStrings(job.stop)
        ends, made, last = self._decoding.eos, 0, None
        for step in steps:
            for last, source in zip(step.tokens, step.sources or (None,) * len(step.tokens), strict=True):
                made += 1
                text = stops.feed(words.feed([last] if last not in ends else []))
                if stops.stopped:
                    yield TextChunk(text, (last,), "stop", source, self._stats(steps))
                    return
                yield TextChunk(text, (last,), source=source)
        text = stops.feed(words.finish()) + stops.flush()
        reason: FinishReason = "length" if made == job.max_new_tokens else "context"
        if last in ends:
            reason = "eos"
        yield TextChunk(text, (), "stop" if stops.stopped else reason, stats=self._stats(steps))

    def _steps(self, job: Job, probable: MeanLogProb | None) -> Timed:
        """The loop, with this pipeline's drafter and rule."""
        drafter: Drafter = NoDraft()
        accept: Accept = partial(own_draw, draw=job.sampling)
        if self.speculator is not None:
            drafter, accept = self.speculator.begin(job.sampling)
        if probable is not None:
            accept = probable.watch(accept)
        steps = generate(
            job.prompt,
            drafter=drafter,
            verifier=self.verifier,
            accept=accept,
            ask=Ask(sampling=job.sampling),
            ends=self._decoding.eos,
            max_new_tokens=job.max_new_tokens,
        )
        return Timed(steps, len(job.prompt), self.verifier.recall(job.prompt))

    def _stats(self, steps: Timed) -> Stats:
        return steps.stats(None if self.speculator is None else self.speculator.stats())


class MeanLogProb:
    """The mean log-probability, under the model at temperature 1, of the tokens that an acceptance rule lets pass."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    @property
    def mean(self) -> float:
        """Of the tokens so far, in nats; 0 where there are none."""
        return self._sum / max(1, self._count)

    def watch(self, rule: Accept) -> Accept:
        """The same rule, its tokens counted."""

        def watched(tree: TokenTree, logits: Array, context: tuple[int, ...], ends: Collection[int] = ()) -> Accepted:
            step = rule(tree, logits, context, ends)
            for node, token in zip(step.path, step.tokens, strict=True):
                row = logits[node] - logits[node].max()
                self._sum += float(row[token]) - float(np.log(np.exp(row).sum(dtype=np.float64)))
            self._count += len(step.tokens)
            return step

        return watched
