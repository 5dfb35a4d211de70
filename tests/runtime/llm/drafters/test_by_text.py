"""A draft of another tokenizer: the text goes over whole, and the guesses come back in the target's tokens."""

from __future__ import annotations

import json
import re
import zlib
from functools import cache
from itertools import takewhile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from edgekit.runtime.llm.drafters import Ask, NoDraft
from edgekit.runtime.llm.drafters.by_text import ByTextDraft, Retokenizer
from edgekit.runtime.llm.probs import Sampling
from edgekit.runtime.llm.tree import Shape, Source
from edgekit.runtime.tokenizer import Tokenizer
from tests.runtime.llm.drafters.copying import ASKS, Rule, steps, text
from tests.runtime.llm.drafters.drafting import Slow

POEM = (
    "the owl and the pussycat went to sea in a beautiful pea green boat, they took some honey, and plenty of money, "
    "wrapped up in a five pound note. the owl looked up to the stars above, and sang to a small guitar, o lovely "
    "pussy! o pussy my love, what a beautiful pussy you are, you are, you are! what a beautiful pussy you are!\n"
    "in süßen Träumen 🙂 日本語 café naïve, the owl and the cat, the boat and the sea.\n"
)
START, END = "<start>", "<end>"
CHAIN = Ask(Shape.chain(8))
KINDS = ["bytes", "bytes-small", "spaces", "fallback"]


def trained(kind: str) -> Engine:
    """A byte-level one, or one that marks spaces and may fall back to `<0x..>` tokens."""
    specials = [START, END]
    if kind.startswith("bytes"):
        engine = Engine(models.BPE())
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = decoders.ByteLevel()
        size, letters = (285 if kind == "bytes-small" else 380), pre_tokenizers.ByteLevel.alphabet()
    else:
        engine = Engine(models.BPE(unk_token=START))
        engine.pre_tokenizer = pre_tokenizers.Metaspace()
        engine.decoder = decoders.Metaspace()
        size, letters = 170, list(POEM)
    learned = POEM if kind != "fallback" else POEM[:300]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=letters if kind != "fallback" else []
    )
    trainer.show_progress = False
    engine.train_from_iterator([learned], trainer)
    if kind == "bytes-ruler":
        engine.add_tokens(["=" * 64])
    if kind == "fallback":
        known = json.loads(engine.to_str())
        vocab = known["model"]["vocab"]
        for byte in range(256):
            vocab[f"<0x{byte:02X}>"] = len(vocab)
        known["model"].update(byte_fallback=True, unk_token=None)
        engine = Engine.from_str(json.dumps(known))
        engine.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return engine


@cache
def tokenizer(kind: str, *, begins: bool = False) -> Tokenizer:
    """One of KINDS; with `begins` its texts begin with a special token."""
    engine = trained(kind)
    if begins:
        engine.post_processor = processors.TemplateProcessing(
            single=f"{START} $A", special_tokens=[(START, engine.token_to_id(START))]
        )
    return Tokenizer(engine.to_str().encode())


@cache
def surfaces(known: Tokenizer) -> dict[int, bytes]:
    """What each token writes."""
    letters = {letter: byte for byte, letter in enumerate(byte_letters())}
    found = {}
    for index in range(known.size):
        token = known._engine.id_to_token(index)
        if known.is_silent(index):
            found[index] = b""
        elif index in known.byte_tokens:
            found[index] = bytes([int(token[3:5], 16)])
        elif known._engine.to_str().count('"ByteLevel"'):
            found[index] = bytes(letters[letter] for letter in token)
        else:
            found[index] = token.replace("\u2581", " ").encode()
    return found


def byte_letters() -> list[str]:
    """The letter by which byte-level tokenizers write each byte (GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


def reciter(known: Tokenizer, document: str, begin: str = "") -> Rule:
    """A model that knows a text by heart, in whatever tokens it is told its beginning."""
    whole, written = (begin + document).encode(), surfaces(known)

    def after(context):
        said = b"".join(written[token] for token in context)
        rest = whole[len(said) :]
        fitting = [token for token, piece in written.items() if piece and rest.startswith(piece)]
        if not whole.startswith(said) or not fitting:
            return known.id_of(END)
        return max(fitting, key=lambda token: len(written[token]))

    return Rule(after, known.size)


def begin_of(kind: str) -> str:
    """What a tokenizer puts before a text."""
    return "" if kind.startswith("bytes") else " "


# ------------------------------------------------------------------------------------------------- the text over

WORDS = st.sampled_from(
    ["the", "owl", "pussycat", "süßen", "🙂", "日本語", "café", "x", "!?", "a,b", "\n", "\n\n", " ", "q" * 9]
)
TEXTS = st.one_of(
    st.lists(WORDS, max_size=60).map(" ".join),
    st.text(st.sampled_from("abcow thé 🙂日\n,.!1"), max_size=80),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
)


@settings(max_examples=100, deadline=None)
@given(
    TEXTS,
    st.sampled_from(["bytes", "bytes-small"]),
    st.sampled_from([(kind, begins) for kind in KINDS for begins in (False, True)]),
    st.lists(st.integers(1, 9), min_size=1, max_size=9),
    st.sets(st.integers(0, 40)),
    st.sampled_from([16, 256]),
)
def test_following_is_encoding_the_whole_text(said, theirs, ours, strides, marks, window):
    """However the text grows, also in the middle of characters and around special tokens, and wherever it is cut."""
    theirs, ours = tokenizer(theirs), tokenizer(ours[0], begins=ours[1])
    ids = theirs.encode(said)
    for place in sorted(marks):
        ids.insert(place, theirs.id_of(START if place % 2 else END))
    reading = Retokenizer(theirs, ours)
    reading.WINDOW = window
    end = 0
    for stride in [*strides * (1 + len(ids)), len(ids)]:
        end = min(end + stride, len(ids))
        found = reading.follow(tuple(ids[:end]))
        whole = theirs.decode(ids[:end])
        if reading.settled and max(map(len, re.split(r"(?<=\S)(?= )", whole))) < window:
            assert found == tuple(ours.encode(whole))
        assert reading.settled or whole.endswith("\ufffd")
        if end == len(ids):
            break
    assert reading.settled
    assert ours.decode(found) == ours.decode(ours.encode(said))


@pytest.mark.parametrize("ours", [*KINDS, "bytes-ruler"])
@pytest.mark.parametrize("letters", ["theowlandthesea", "日本語🙂süß", "pussycat", "="])
def test_no_character_is_lost_where_there_are_no_words(letters, ours):
    """A text without a space is cut between tokens, or, where these are very long, in the middle of one."""
    theirs, ours = tokenizer("bytes-small"), tokenizer(ours)
    said = "x" * 20 + letters * (700 // len(letters))
    ids, reading = theirs.encode(said), Retokenizer(theirs, ours)
    for end in range(0, len(ids), 7):
        found = reading.follow(tuple(ids[:end]))
        whole = theirs.decode(ids[:end])
        if reading.settled:
            right = tuple(ours.encode(whole))
            assert ours.decode(found) == ours.decode(right)
            assert found == right or letters == "="


def test_a_character_cut_in_the_middle_is_waited_for():
    """Not settled until its last byte is there; until then what is before it is not lost either."""
    theirs, ours = tokenizer("bytes-small"), tokenizer("bytes")
    ids = theirs.encode("owl 日")
    first = len(theirs.encode("owl ")) + 1
    assert len(ids) - first == 2
    reading = Retokenizer(theirs, ours)
    for end, settled in ((first - 1, True), (first, False), (first + 1, False), (first + 2, True)):
        assert reading.follow(tuple(ids[:end])) == tuple(ours.encode("owl 日" if end == len(ids) else "owl "))
        assert reading.settled == settled


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), TEXTS), min_size=1, max_size=5))
def test_a_reader_has_no_memory_of_other_texts(edits):
    """Texts that are cut back or change are read anew; what was waited for is forgotten with them."""
    theirs, ours = tokenizer("bytes-small"), tokenizer("spaces", begins=True)
    reading, ids = Retokenizer(theirs, ours), ()
    for kept, more in edits:
        ids = (*ids[:kept], *theirs.encode(more))
        fresh = Retokenizer(theirs, ours)
        assert reading.follow(ids) == fresh.follow(ids)
        assert reading.settled == fresh.settled


def test_only_the_end_of_a_long_text_is_encoded(monkeypatch):
    """A token more costs the same after a thousand words as after a hundred."""
    theirs, ours = tokenizer("bytes"), tokenizer("bytes-small")
    ids = tuple(theirs.encode(POEM * 10))
    reading, sizes = Retokenizer(theirs, ours), []
    encode = ours.encode
    monkeypatch.setattr(ours, "encode", lambda said, **options: sizes.append(len(said)) or encode(said, **options))
    for end in range(len(ids) // 2, len(ids)):
        sizes.clear()
        found = reading.follow(ids[:end])
        assert end == len(ids) // 2 or sum(sizes) < 6 * Retokenizer.WINDOW
    assert found == tuple(encode(theirs.decode(ids[: len(ids) - 1])))


# ----------------------------------------------------------------------------------------------------- the drafts


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("own", KINDS)
@pytest.mark.parametrize("target", ["bytes", "bytes-small", "spaces"])
def test_a_draft_that_agrees_is_right(own, target, begins):
    """Both know one text: what is proposed says what comes next, and most of it in the tokens of the target."""
    known, theirs = tokenizer(own, begins=begins), tokenizer(target, begins=begins)
    document = POEM.split("\n")[0]
    ids = theirs.encode(document)
    drafter = ByTextDraft(reciter(known, document, begin_of(own)), known, theirs)
    stood, sizes = 0, range(14, len(ids) - 20, 5)
    for size in sizes:
        tree = drafter.propose(tuple(ids[:size]), CHAIN)
        assert set(tree.sources) == {Source("model")}
        assert (tree.is_chain, tree.tokens[0], tree.log_q) == (True, ids[size - 1], ())
        assert 2 <= len(tree) <= 9
        assert document.startswith(theirs.decode([*ids[:size], *tree.tokens[1:]]))
        pairs = zip(tree.tokens[1:], ids[size:], strict=False)
        stood += sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    assert stood / len(sizes) > 4


@pytest.mark.parametrize("own", KINDS)
def test_characters_of_many_bytes_go_over(own):
    """A text of accents, emoji and Japanese, in tokens that are parts of characters: it is said again, whole."""
    known, theirs = tokenizer(own), tokenizer("bytes-small")
    document = POEM.split("\n")[1]
    ids = theirs.encode(document)
    drafter = ByTextDraft(reciter(known, document, begin_of(own)), known, theirs)
    proposed = 0
    for size in range(8, len(ids) - 8):
        drafts = list(drafter.propose(tuple(ids[:size]), CHAIN).tokens[1:])
        whole = surfaces(theirs)
        assert document.encode().startswith(b"".join(whole[token] for token in ids[:size] + drafts))
        assert not (drafts and theirs.decode(ids[:size]).endswith("\ufffd"))
        proposed += len(drafts)
    assert proposed > 2 * len(ids)


def noisy(theirs: Tokenizer, document: str, doubt: float) -> Slow:
    """A target that leans towards a text, and has a mind of its own."""
    ids = theirs.encode(document)

    def after(context):
        row = np.random.default_rng(zlib.crc32(repr(context).encode())).normal(size=theirs.size) * doubt
        if len(context) < len(ids):
            row[ids[len(context)]] += 8
        return row.astype(np.float32)

    return Slow(after)


@pytest.mark.parametrize("own", KINDS)
@pytest.mark.parametrize("target", ["bytes", "bytes-small"])
@pytest.mark.parametrize(("temperature", "doubt"), [(0.0, 0.5), (0.0, 4.0), (1.0, 1.0), (1.5, 2.0)])
def test_the_text_is_that_without_drafts(own, target, temperature, doubt):
    """Greedy and sampled, whether the target follows the text or strays from it into tokens that are no text at all."""
    known, theirs = tokenizer(own), tokenizer(target)
    document, sampling = POEM.split("\n")[0][:200], Sampling(temperature=temperature, seed=4)
    prompt = theirs.encode(document)[:12]
    plain_model, model = (noisy(theirs, document, doubt) for _ in range(2))
    plain = text(steps(NoDraft(), plain_model, prompt, 40, Ask(), sampling))
    drafter = ByTextDraft(reciter(known, document, begin_of(own)), known, theirs)
    done = steps(drafter, model, prompt, 40, CHAIN._replace(sampling=sampling), sampling)
    assert text(done) == plain
    assert doubt > 0.5 or model.calls < plain_model.calls / 2


@pytest.mark.parametrize("ask", ASKS)
def test_a_chain_is_drafted_whatever_the_shape(ask):
    """Never deeper than the shape or than there is room, and no siblings."""
    known, theirs = tokenizer("spaces"), tokenizer("bytes")
    drafter = ByTextDraft(reciter(known, POEM.split("\n")[0], " "), known, theirs)
    ids = tuple(theirs.encode(POEM)[:20])
    for room in (0, 2, 99):
        tree = drafter.propose(ids, ask._replace(room=room))
        assert tree.is_chain
        assert len(tree) <= 1 + min(ask.shape.depth, room)
        assert (len(tree) > 1) == (ask.shape.depth > 0 and room > 0)


# ------------------------------------------------------------------------------------------------ the root alone


def test_a_text_that_cannot_go_over_is_the_root_alone():
    """No text, half a character, a draft that ends the text, and a full context."""
    known, theirs = tokenizer("bytes"), tokenizer("bytes-small")
    silent = ByTextDraft(Rule(lambda context: known.id_of(END), known.size), known, theirs)
    speaking = ByTextDraft(Rule(lambda context: known.encode("a")[0], known.size), known, theirs)
    start, half = (theirs.id_of(START),), tuple(theirs.encode("the 日")[:-1])
    whole = tuple(theirs.encode("the owl"))
    for drafter, tokens, runs in ((speaking, start, 0), (speaking, half, 0), (silent, whole, 1)):
        assert drafter.propose(tokens, CHAIN).tokens == tokens[-1:]
        assert drafter.verifier.rows == runs
    speaking.propose(half[:-2], CHAIN)
    runs = speaking.verifier.rows
    assert runs > 0
    assert speaking.propose(half, CHAIN).tokens == half[-1:]
    assert speaking.verifier.rows == runs
    ids, size = tuple(theirs.encode("the owl and the cat")), len(known.encode("the owl and the cat"))
    for context, drafts in ((size - 1, 0), (size, 1)):
        full = Rule(lambda context: known.encode("a")[0], known.size)
        full.context_length = context
        assert len(ByTextDraft(full, known, theirs).propose(ids, CHAIN)) == 1 + drafts
        assert full.rows == drafts


def test_a_border_that_does_not_come_back_is_the_root_alone():
    """Tokens that the target's tokenizer would have cut otherwise cannot be encoded again, so nothing follows them."""
    known, theirs = tokenizer("bytes"), tokenizer("bytes-small")
    letters = [theirs.encode(letter)[0] for letter in "the the the the the the the"]
    assert theirs.encode(theirs.decode(letters)) != letters
    drafter = ByTextDraft(Rule(lambda context: known.encode("a")[0], known.size), known, theirs)
    assert drafter.propose(tuple(letters), CHAIN).tokens == (letters[-1],)


def test_special_tokens_are_no_part_of_the_border():
    """After a special token the guess begins anew; what stood before it is told the draft as text."""
    known, theirs = tokenizer("bytes"), tokenizer("bytes-small")
    told = []
    rule = Rule(lambda context: told.append(known.decode(context)) or known.encode(" owl")[0], known.size)
    drafter = ByTextDraft(rule, known, theirs)
    ids = (theirs.id_of(START), *theirs.encode("the sea"), theirs.id_of(END))
    drafts = drafter.propose(ids, Ask(Shape.chain(2))).tokens[1:]
    assert told[0] == "the sea"
    assert drafts
    assert " owl owl".startswith(theirs.decode(drafts))
