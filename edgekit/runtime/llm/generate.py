"""The loop: propose, score, accept, keep. It does no I/O, so local, remote and fake are one loop."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from edgekit.runtime.llm.accept import Accept, Accepted
from edgekit.runtime.llm.drafters import Ask, Drafter
from edgekit.runtime.llm.verifier import Verifier


def generate(
    prompt: Sequence[int],
    *,
    drafter: Drafter,
    verifier: Verifier,
    accept: Accept,
    ask: Ask = Ask(),  # noqa: B008  (frozen)
    ends: Collection[int] = (),
    max_new_tokens: int,
) -> Iterator[Accepted]:
    """Continue `prompt`, one accepted step at a time.

    Args:
        prompt: at least one token.
        drafter: guesses; `NoDraft` for ordinary decoding.
        verifier: scores guesses; afterwards its cache holds the text but for its last token.
        accept: which guesses stand, given the tree, its rows and all tokens so far.
        ask: how much to draft; a controller makes up its own mind.
        ends: tokens after which the text is over; `accept` draws nothing after them.
        max_new_tokens: stop here, or where the verifier's context is full.

    Raises:
        BadRequest: a prompt the verifier cannot take.
    """
    tokens = tuple(prompt)  # the only truth; caches are memories of it
    room = verifier.context_length
    end = min(len(tokens) + max_new_tokens, room)
    while len(tokens) < end:
        left = end - len(tokens) - 1  # the verifier's own draw is one more
        tree = drafter.propose(tokens, ask._replace(room=left)).pruned(depth=left, nodes=room - len(tokens) + 1)
        scores = verifier.score(tokens, tree)
        step = accept(tree, scores.logits, tokens, ends)
        verifier.keep(step.path)
        drafter.observe(tree, step, scores)
        tokens += step.tokens
        yield step
        if tokens[-1] in ends:
            return
