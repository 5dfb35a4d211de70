"""Does a row of logits depend on what is computed beside it? Found by running the graph.

A verifier computes a token's row together with drafts after it; ordinary decoding computes it alone. Engines choose
their kernels by the number of rows, kernels add up in different orders, and so the two may differ in the last bits.
That is rounding, and it has a measured size. A graph that quantizes its activations with one scale per tensor is
another matter: there a wrong draft changes the scale, and with it the row of the token before it by far more than
rounding. Such a graph cannot verify.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgekit.errors import BadRequest
from edgekit.runtime.llm.tree import TokenTree
from edgekit.runtime.llm.verifier import LocalVerifier

Rows = npt.NDArray[np.float32]

SIZES = (1, 2, 3, 5, 8, 16)  # rows per run that are compared
GRANULES = (1, 2, 4, 8)  # that runs are filled up to a multiple of
TEXTS = 3  # that are compared: a difference of the last bit shows where a rounding to few bits tips over, now and then
LONG = (64, 256)  # and of prompts
CONTEXT = 24  # tokens before the compared rows
MATES = 6  # other drafts that a row is computed beside
STEPS = 10  # single steps that are compared with one run


@dataclass(frozen=True)
class Invariance:
    """How far a row of logits depends on its run.

    Attributes:
        kind: `exact`: the same bits in runs of 1 to 16 rows; `padded`: in runs of 1 to 16 rows that are filled up to a
            multiple of `granule`; `rounding`: the same up to `margin`; `dependent`: the drafts in the rows after it
            change it in a run of the same size.
        margin: the largest difference seen between two runs, not filled up, in logits; for `dependent` between two
            drafts.
        prompt: the largest difference between a row at the end of a prompt computed in one run and the same row
            computed in small ones, in logits; 0 is the same bits.
        granule: of `exact` 1; 0 where none was found.
    """

    kind: Literal["exact", "padded", "rounding", "dependent"]
    margin: float
    prompt: float = 0.0
    granule: int = 0

    def exact(self) -> int:
        """The granule that makes drafts change no bit.

        Raises:
            BadRequest: there is none.
        """
        self.check()
        if not self.granule:
            raise BadRequest(
                f"no filling makes runs of different sizes give the same bits on this machine (they differ by up to "
                f"{self.margin:.2g} logits), so there is no exact mode. Leave it out, or export with fp32."
            )
        return self.granule

    def check(self) -> None:
        """Refuse a graph whose rows depend on the drafts beside them.

        Raises:
            BadRequest: saying so, and what to do.
        """
        if self.kind == "dependent":
            raise BadRequest(
                f"this graph cannot verify drafts: a token's logits change by up to {self.margin:.2g} with the drafts "
                "computed after it, as with per-tensor dynamic quantization (DynamicQuantizeLinear). Use it without "
                "drafts, or export with fp32, int8 or int4 weights, whose activations are quantized row by row."
            )


def filler(count: int, vocabulary: int, salt: int = 0) -> tuple[int, ...]:
    """`count` token ids that look like nothing in particular, always the same."""
    return tuple((salt * 7919 + at * at * 31 + at * 127 + 5) % vocabulary for at in range(count))


def classify(verifier: LocalVerifier) -> Invariance:
    """Run the graph on throw-away texts; the verifier's own cache is left alone. True of the runs compared."""
    twin = verifier.fork()
    twin.prefixes, twin.granule = None, 1
    most = min(SIZES[-1], max(1, verifier.context_length // 2))
    texts = [_text(twin, most, salt) for salt in range(TEXTS)]
    head, drafts = texts[0]
    whole = _rows(twin, head, drafts)
    noise = _apart(whole, _rows(twin, head, drafts))  # engines that add up in no fixed order differ from themselves
    mates = max(_apart(whole[: len(rows)], rows) for rows in _beside(twin, head, drafts))
    if mates > 2 * noise:
        return Invariance("dependent", mates)
    margins: list[float] = []
    for granule in GRANULES:
        twin.granule = granule
        margins.append(max(_spread(twin, *text) for text in texts))
        if margins[-1] == 0:
            break
    if noise > 0 or margins[-1] > 0:
        twin.granule = 1
        return Invariance("rounding", max(margins[0], noise), _prompt(twin, most))
    return Invariance("exact" if granule == 1 else "padded", margins[0], _prompt(twin, most), granule)


def _text(verifier: LocalVerifier, most: int, salt: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A context, and the drafts after it that make a run of `most` rows."""
    text = filler(min(CONTEXT, verifier.context_length - most + 1) + most - 1, verifier.vocab_size, salt)
    return text[: len(text) - most + 1], text[len(text) - most + 1 :]


def _spread(verifier: LocalVerifier, head: tuple[int, ...], drafts: tuple[int, ...]) -> float:
    """How far the rows of runs of other sizes, and of single steps, are from those of one run."""
    whole = _rows(verifier, head, drafts)
    shorter = (_rows(verifier, head, drafts[: size - 1]) for size in SIZES if size <= len(drafts))
    return max(_apart(whole, _stepped(verifier, head, drafts[: STEPS - 1])), *(_apart(whole, r) for r in shorter), 0.0)


def _rows(verifier: LocalVerifier, tokens: tuple[int, ...], drafts: tuple[int, ...]) -> Rows:
    """The rows of one run: the last of `tokens` and the drafts; (1 + drafts, vocabulary)."""
    if verifier.cached != tokens[:-1] and len(tokens) > 1:  # the context is computed apart, by one and the same run
        verifier.rollback(0)
        verifier.score(tokens[:-1], TokenTree.chain(tokens[-2]))
        verifier.keep((0,))
    return np.array(verifier.score(tokens, TokenTree.chain(tokens[-1], drafts)).logits)


def _beside(verifier: LocalVerifier, head: tuple[int, ...], drafts: tuple[int, ...]) -> Iterator[Rows]:
    """The first rows again, in runs of the same size beside other drafts.

    The drafts differ wholly (the special tokens among them, whose activations are often the largest), then from the
    middle on.
    """
    count, vocabulary = len(drafts), verifier.vocab_size
    ends = tuple(at % vocabulary for at in range(count)), tuple(-(at + 1) % vocabulary for at in range(count))
    half = count // 2
    for others in (*ends, *(filler(count, vocabulary, salt) for salt in range(1, MATES - 1))):
        yield _rows(verifier, head, others)[:1]
        yield _rows(verifier, head, drafts[:half] + others[half:])[: 1 + half]


def _stepped(verifier: LocalVerifier, head: tuple[int, ...], drafts: tuple[int, ...]) -> Rows:
    """The same rows as ordinary decoding makes them, one by one, each from the keys and values of those before."""
    rows = [_rows(verifier, head, ())]
    for at in range(len(drafts)):
        verifier.keep((0,))
        rows.append(verifier.score((*head, *drafts[: at + 1]), TokenTree.chain(drafts[at])).logits.copy())
    verifier.rollback(0)
    return np.concatenate(rows)


def _prompt(verifier: LocalVerifier, piece: int) -> float:
    """How far the last rows of a prompt computed in one run are from the same, computed `piece` tokens at a time."""
    apart = 0.0
    for size in LONG:
        if size > verifier.context_length:
            break
        text = filler(size, verifier.vocab_size)
        verifier.rollback(0)
        once = verifier.score(text[:-1], TokenTree.chain(text[-2], text[-1:])).logits.copy()
        verifier.rollback(0)
        for start in range(0, size, piece):
            tree = TokenTree.chain(text[start], text[start + 1 : start + piece])
            rows = verifier.score(text[: start + 1], tree).logits
            verifier.keep(range(len(tree)))
        apart = max(apart, _apart(once, rows[-2:]))
    return apart


def _apart(one: Rows, other: Rows) -> float:
    """The largest difference between two arrays of logits, up to the shorter's rows; 0 is bit-equal."""
    least = min(len(one), len(other))
    if np.array_equal(one[:least], other[:least]):
        return 0.0
    return float(np.abs(one[:least] - other[:least]).max())
