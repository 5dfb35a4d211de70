"""The workload of a language model: what it says of every token of fixed texts, each in one run on an empty cache.

Texts come from a file that the user gives, or the model writes them itself. Generated text is good calibration text: it
has the model's own distribution, and needs no data (Liu et al. 2023, LLM-QAT, arXiv:2305.17888, section 3.1; Williams
and Aletras 2024, arXiv:2410.17170). Half the texts are for choosing, the other half is held out and for checking.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekit.bundle.manifest import Decoding, TensorSpec
from edgekit.bundle.store import Bundle
from edgekit.errors import BadManifest, BadRequest
from edgekit.quant.metrics import LANGUAGE_METRICS, Metric
from edgekit.runtime.backends import Array, Session, open_session
from edgekit.runtime.llm.accept import own_draw
from edgekit.runtime.llm.drafters import NoDraft
from edgekit.runtime.llm.generate import generate
from edgekit.runtime.llm.probs import Sampling
from edgekit.runtime.llm.tree import TokenTree
from edgekit.runtime.llm.verifier import LocalVerifier
from edgekit.runtime.random import philox_u32
from edgekit.runtime.tokenizer import Tokenizer

Tokens = tuple[int, ...]

COUNT, LENGTH = 8, 256  # texts of one workload, tokens in each
MORE = 2  # times as many again calibrate: on pycode, of three times the texts GPTQ made 15 % less KL divergence
SHORTEST = 16  # tokens of a text; with fewer, what is measured is mostly how a text begins
LOGITS = 1 << 28  # bytes of one workload's outputs: with large vocabularies only the last rows of a text are compared
SEED = 1
_PER_TOKEN = 64  # bytes read for a token; text has 1 to 5
_START = 1 << 20  # Philox draw of first tokens: far from the positions that address the noise of the others


class TextWorkload:
    """Texts, and the logits at every token of them.

    Args:
        bundle: the unquantized bundle.
        requests: token ids, all of one length, from different places.
        rows: at the end of each text, whose logits are compared; the tokens before are context alone. 0 is as many as
            LOGITS bytes hold.
        threads: of the inference engine.

    Attributes:
        feeds: what the decoder is fed for each text, the same for every graph that takes its place.

    Raises:
        BadRequest: no text, texts of different lengths, or longer ones than the context; a token outside the
            vocabulary; or the bundle generates no text.
    """

    metrics: tuple[Metric, ...] = LANGUAGE_METRICS

    def __init__(self, bundle: Bundle, requests: Sequence[Tokens], *, rows: int = 0, threads: int = 0) -> None:
        decoding = decoding_of(bundle)
        lengths = {len(request) for request in requests}
        if len(lengths) != 1 or 0 in lengths:
            raise BadRequest(f"the texts have {sorted(lengths) or 'no'} tokens; give at least one, all of one length")
        (length,) = lengths
        fitting = LOGITS // (4 * decoding.vocab_size * len(requests))
        self.rows = max(1, min(rows or fitting, length))
        self.requests = tuple(requests)
        self.part = decoding.part
        self.feeds = tuple(_feeds(decoding, bundle.manifest.parts[decoding.part].inputs, self.requests, self.rows))
        self._graph, self._threads = bundle.graph(decoding.part), threads

    @property
    def digest(self) -> str:
        """sha256 of what is measured: the ids and the rows."""
        return hashlib.sha256(repr((self.rows, self.requests)).encode()).hexdigest()

    def run(self, replaced: Mapping[str, Session]) -> tuple[Array, ...]:
        """Logits (rows, vocabulary) of every text. Without a replacement the bundle's own graph is opened for it."""
        session = replaced.get(self.part)
        if session is None:
            session = open_session(self._graph, threads=self._threads)
        return tuple(session.run(feeds)["logits"][0] for feeds in self.feeds)


def text_workloads(
    bundle: Bundle,
    calibration: Path | None = None,
    *,
    count: int = COUNT,
    length: int = LENGTH,
    threads: int = 0,
    more: int = 0,
    work: Path | None = None,
) -> tuple[TextWorkload, TextWorkload, TextWorkload]:
    """Workloads of different texts: to choose precisions on, to check the choice on, and to calibrate rounding on.

    The last has the texts of the first, and others.

    Args:
        bundle: the unquantized bundle.
        calibration: a plain text in UTF-8; without it the model writes.
        count: texts in each workload.
        length: tokens in each text; shorter where the file or the context is.
        threads: of the inference engine.
        more: times `count` texts that only calibrate.
        work: folder of this bundle's measurements, where texts of the model's own are kept.

    Raises:
        BadRequest: a file that is not there, no UTF-8, or too short; or the bundle generates no text.
    """
    kinds = 2 + more
    if calibration is None:
        texts = _written_once(bundle, kinds * count, length, threads, work)
    else:
        texts = read(bundle, calibration, count=kinds * count, length=length)
    chosen, held = (TextWorkload(bundle, texts[kind::kinds], threads=threads) for kind in (0, 1))
    others = [text for number, text in enumerate(texts) if number % kinds != 1]
    return chosen, held, TextWorkload(bundle, others, rows=chosen.rows, threads=threads)


def read(bundle: Bundle, path: Path, *, count: int, length: int) -> tuple[Tokens, ...]:
    """`count` texts of a file, from evenly spread places, all of one length: `length` tokens or as many as there are.

    Raises:
        BadRequest: see `text_workloads`.
    """
    length = min(length, decoding_of(bundle).context_length)
    tokenizer = _tokenizer(bundle)
    try:
        texts = [tokenizer.encode(piece)[:length] for piece in _pieces(path, count, length * _PER_TOKEN)]
    except UnicodeDecodeError as why:
        raise BadRequest(f"{path} is no UTF-8 text: {why.reason}. --calibration takes plain text.") from why
    except OSError as why:
        raise BadRequest(f"{path}: {why.strerror}; name a plain text, or leave it out: the model writes one") from why
    shortest = min(map(len, texts))
    if shortest < SHORTEST:
        raise BadRequest(
            f"{path} is too short: a {count}th of it has {shortest} tokens, and at least {SHORTEST} are needed. Give a "
            f"text of {count * length} tokens or more, or leave it out: the model writes one."
        )
    return tuple(tuple(text[:shortest]) for text in texts)


def written(
    bundle: Bundle, *, count: int, length: int, seed: int = SEED, threads: int = 0, temperature: float = 1.0
) -> tuple[Tokens, ...]:
    """`count` texts of `length` tokens that the model draws itself.

    Four begin with the token that begins a text, four with a random one, and so on, so that every second or fourth text
    has both kinds; tokens that end a text are not drawn.
    The noise has addresses, so the texts are the same everywhere, but for machines whose logits round differently.

    Raises:
        BadRequest: the bundle generates no text.
    """
    decoding, tokenizer = decoding_of(bundle), _tokenizer(bundle)
    length = min(length, decoding.context_length)
    verifier = LocalVerifier(open_session(bundle.graph(decoding.part), threads=threads), decoding)
    texts = []
    for number in range(count):
        tokens = first_tokens(decoding, tokenizer, number, seed)[:length]
        draw = _Endless(Sampling(temperature=temperature, seed=seed + number), decoding.eos)
        accept = partial(own_draw, draw=draw)
        left = length - len(tokens)
        steps = generate(tokens, drafter=NoDraft(), verifier=verifier, accept=accept, max_new_tokens=left)
        texts.append((*tokens, *(token for step in steps for token in step.tokens)))
    return tuple(texts)


def _written_once(bundle: Bundle, count: int, length: int, threads: int, work: Path | None) -> tuple[Tokens, ...]:
    """`written`, from `work` where it was finished there."""
    if work is None:
        return written(bundle, count=count, length=length, threads=threads)
    file = work / f"texts-{count}x{length}-{SEED}.npy"
    if not file.is_file():
        texts = written(bundle, count=count, length=length, threads=threads)
        beside = file.with_suffix(".new")
        with beside.open("wb") as stream:
            np.save(stream, np.array(texts, np.int64))
        beside.replace(file)
    return tuple(tuple(map(int, text)) for text in np.load(file))


def first_tokens(decoding: Decoding, tokenizer: Tokenizer, number: int, seed: int) -> Tokens:
    """What the `number`-th text of the model's own begins with."""
    begin = (decoding.bos,) if decoding.bos is not None else ()
    if number // 4 % 2 == 0 and (begin or decoding.eos):
        return begin or decoding.eos[:1]
    most = min(decoding.vocab_size, tokenizer.size)
    found = (int(word) % most for word in philox_u32((256,), seed, _START + number))
    return (*begin, next((token for token in found if not tokenizer.is_silent(token)), 0))


def decoding_of(bundle: Bundle) -> Decoding:
    """How the bundle's text is made. Raises BadRequest where it makes none."""
    if bundle.manifest.decoding is None:
        raise BadRequest(f"a {bundle.manifest.task} bundle writes no text, so there is no text to measure it on")
    return bundle.manifest.decoding


def _tokenizer(bundle: Bundle) -> Tokenizer:
    if "default" not in bundle.manifest.tokenizers:
        raise BadManifest("a text-generation bundle needs a tokenizer named default")
    return Tokenizer.from_file(bundle.tokenizer())


def _pieces(path: Path, count: int, most: int) -> Iterator[str]:
    """The beginnings, `most` bytes at most, of `count` equal parts of a file. Raises UnicodeDecodeError, OSError."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        for number in range(count):
            start, stop = size * number // count, size * (number + 1) // count
            stream.seek(start)
            raw = stream.read(min(most, stop - start))
            if start:  # perhaps in the middle of a character: its other bytes are 10xxxxxx
                raw = raw[next((at for at, byte in enumerate(raw[:3]) if byte & 0xC0 != 0x80), 3) :]
            yield codecs.getincrementaldecoder("utf-8")().decode(raw).replace("\r\n", "\n").removeprefix("\ufeff")


def _feeds(
    decoding: Decoding, inputs: tuple[TensorSpec, ...], requests: Sequence[Tokens], rows: int
) -> Iterator[dict[str, Array]]:
    """What the runtime feeds the decoder for each text: its own code is asked, with a graph that writes it down."""
    notes = _Notebook(inputs, decoding.vocab_size)
    verifier = LocalVerifier(notes, decoding, chunk=len(requests[0]))
    for tokens in requests:
        before = len(tokens) - rows
        verifier.rollback(0)
        verifier.score(tokens[: before + 1], TokenTree.chain(tokens[before], tokens[before + 1 :]))
        yield notes.feeds


@dataclass
class _Notebook:
    """A session, and its own binding, that answers zeros and keeps what it was fed."""

    inputs: tuple[TensorSpec, ...]
    vocab_size: int
    device: str = "cpu"
    outputs: tuple[TensorSpec, ...] = ()
    live: bool = True

    def __post_init__(self) -> None:
        self.buffers: dict[str, Array] = {}
        self.feeds: dict[str, Array] = {}

    def bind(self) -> _Notebook:
        return self

    def share(self, input: str, output: str, shape: Sequence[int], dtype: npt.DTypeLike) -> None:  # noqa: ARG002
        self.buffers[input] = np.zeros(tuple(shape), dtype)

    def read(self, input: str) -> Array:
        return self.buffers[input]

    def write(self, input: str, value: Array) -> None:
        self.buffers[input][...] = value

    def run(self, feeds: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> dict[str, Array]:  # noqa: ARG002
        self.feeds = {**{name: value.copy() for name, value in feeds.items()}, **self.buffers}
        return {"logits": np.zeros((1, len(feeds["rows"]), self.vocab_size), np.float32)}


@dataclass(frozen=True)
class _Endless:
    """A draw that never gives a token that ends a text."""

    draw: Callable[[Array, Tokens], int]
    ends: Tokens

    def __call__(self, logits: Array, context: Tokens) -> int:
        logits = logits.copy()
        logits[list(self.ends)] = -np.inf
        return self.draw(logits, context)
