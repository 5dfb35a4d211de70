"""A request for text, checked: what was asked for over the bundle's defaults, and the prompt as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import msgspec

from edgekit.bundle.manifest import Decoding
from edgekit.errors import BadRequest
from edgekit.runtime.llm.chat import ChatTemplate
from edgekit.runtime.llm.probs import Sampling
from edgekit.runtime.llm.stop import StopStrings
from edgekit.runtime.tokenizer import Tokenizer

Message = Mapping[str, Any]


class TextOptions(TypedDict, total=False):
    """What a request may say besides its prompt.

    messages: a conversation, `{"role": ..., "content": ...}`, in place of the prompt; needs a chat template.
    system: the system message that goes first; the prompt is then a user's message.
    max_new_tokens: at most this many; 256.
    temperature: 0 is greedy; None takes the bundle's default, as for the four that follow.
    top_k: keep the k best tokens; 0 keeps all.
    top_p: keep the best tokens up to this probability.
    min_p: keep tokens at least this probable relative to the best.
    repetition_penalty: makes tokens already there less likely; 1 is none.
    stop: texts that end the generation; they are not part of it.
    seed: of the noise; the same seed, prompt and bundle give the same text.
    add_special_tokens: let the tokenizer put its special tokens around the prompt; yes.
    """

    messages: Sequence[Message] | None
    system: str | None
    max_new_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    stop: Sequence[str]
    seed: int
    add_special_tokens: bool


DRAWING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class Job:
    """One request, checked."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reader:
    """Turns requests into jobs for one model."""

    decoding: Decoding
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    special: Mapping[str, str]

    def job(self, prompt: str | None, options: TextOptions) -> Job:
        """Check a request.

        Raises:
            BadRequest: an unknown option, one out of its range, or a prompt that is empty or does not fit.
        """
        unknown = sorted(set(options) - TextOptions.__annotations__.keys())
        if unknown:
            raise BadRequest(f"unknown option {unknown[0]!r}; known: {', '.join(TextOptions.__annotations__)}")
        ids = self._encode(prompt, options)
        room, most = self.decoding.context_length, options.get("max_new_tokens", 256)
        if not ids:
            raise BadRequest("the prompt has no tokens and the model no beginning-of-sequence token; write something")
        if len(ids) >= room:
            raise BadRequest(f"the prompt has {len(ids)} tokens and the model's context is {room}; shorten it")
        if most < 1:
            raise BadRequest(f"max_new_tokens is {most}; it must be at least 1")
        stop = options.get("stop", ())
        StopStrings(stop)  # refuses what is no list of texts
        asked = {name: value for name in DRAWING if (value := options.get(name)) is not None}
        defaults = msgspec.structs.asdict(self.decoding.defaults)
        return Job(ids, most, Sampling(**{**defaults, **asked}, seed=options.get("seed", 0)), tuple(stop))

    def _encode(self, prompt: str | None, options: TextOptions) -> tuple[int, ...]:
        """The ids of a request; a conversation's special tokens are the template's business."""
        messages, system = options.get("messages"), options.get("system")
        if (prompt is None) == (messages is None):
            raise BadRequest("give either prompt or messages")
        if prompt is not None and system is None:
            ids = self.tokenizer.encode(prompt, add_special_tokens=options.get("add_special_tokens", True))
            if not ids and self.decoding.bos is not None:
                ids = [self.decoding.bos]
            return tuple(ids)
        if self.chat is None:
            raise BadRequest("this bundle has no chat template: give a prompt without system, or export a chat model")
        talk = list(messages) if messages is not None else [{"role": "user", "content": prompt}]
        if system is not None:
            talk.insert(0, {"role": "system", "content": system})
        text = self.chat.render(talk, special=self.special)
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))
