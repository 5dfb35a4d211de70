"""Acceptance rules: their promises with real noise, their addresses, and what they refuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import BadRequest
from edgekit.runtime.llm.probs import Sampling, uniforms
from edgekit.runtime.llm.rules import (
    RULES,
    LossyRatio,
    LossyTypical,
    PhiloxChance,
    Rejection,
    Rule,
    speculative_sample,
)
from edgekit.runtime.llm.tree import Source, TokenTree

VOCAB = 6
START = (3, 1)
LOSSY = {"lossy-typical": {}, "lossy-ratio": {"gamma": 0.05}}
Text = tuple[int, ...]


@cache
def logits_after(text: Text, salt: int = 0) -> np.ndarray:
    return (np.random.default_rng([salt, *text]).normal(size=VOCAB) * 1.5).astype(np.float32)


def rows(tree: TokenTree, text: Text) -> np.ndarray:
    texts = [text]
    for token, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True):
        texts.append((*texts[parent], token))
    return np.stack([logits_after(text) for text in texts])


def drafted(text: Text, sampling: Sampling, depth: int = 2) -> TokenTree:
    """A chain that a draft model draws with the request's own noise, and what it drew from."""
    tokens, laws = list(text), []
    for _ in range(depth):
        row = logits_after(tuple(tokens), salt=9)
        laws.append(sampling.law(row, tuple(tokens)))
        tokens.append(sampling(row, tuple(tokens)))
    tree = TokenTree.chain(text[-1], tokens[len(text) :])
    return TokenTree(tree.tokens, tree.parents, q=np.stack([*laws, np.zeros(VOCAB)]))


def random_tree(text: Text, sampling: Sampling) -> TokenTree:
    """Any tree at all, from the text and the seed; now and then with a `q` that means nothing."""
    random = np.random.default_rng([sampling.seed & 0xFFFF, *text])
    nodes: dict[Text, int] = {(): 0}
    tokens, parents = [text[-1]], [-1]
    for _ in range(random.integers(0, 9)):
        path = (*list(nodes)[random.integers(len(nodes))], int(random.integers(VOCAB)))
        if path not in nodes:
            parents.append(nodes[path[:-1]])
            tokens.append(path[-1])
            nodes[path] = len(nodes)
    q = random.dirichlet(np.ones(VOCAB), len(tokens)) if random.random() < 0.5 else None
    return TokenTree(tuple(tokens), tuple(parents), q=q)


def bare_tree(text: Text, sampling: Sampling) -> TokenTree:
    """Any tree, guessed without probabilities."""
    return replace(random_tree(text, sampling), q=None)


def text_of(rule: Rule, sampling: Sampling, length: int, draft: Callable[..., TokenTree], ends: Text = ()) -> Text:
    text = START
    while (missing := len(START) + length - len(text)) > 0:
        tree = draft(text, sampling).pruned(depth=missing - 1, nodes=99)
        text += rule(tree, rows(tree, text), text, ends).tokens
        if text[-1] in ends:
            break
    return text[len(START) :]


def plain(sampling: Sampling, length: int) -> Text:
    text = START
    for _ in range(length):
        text += (sampling(logits_after(text), text),)
    return text[len(START) :]


def chi_square(found: Counter, law: np.ndarray, count: int) -> float:
    """Standard deviations by which Pearson's statistic is above its mean; rare outcomes are counted together."""
    cells = [(found[place], count * mass) for place, mass in np.ndenumerate(law) if count * mass >= 5]
    cells.append((count - sum(c for c, _ in cells), count - sum(e for _, e in cells)))
    statistic = sum((c - e) ** 2 / e for c, e in cells if e > 1e-9)
    freedom = len(cells) - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


def pair_law(sampling: Sampling) -> np.ndarray:
    """The joint distribution of the next two tokens."""
    first = sampling.law(logits_after(START), START)
    texts = [(*START, token) for token in range(VOCAB)]
    return np.stack([first[text[-1]] * sampling.law(logits_after(text), text) for text in texts])


@pytest.mark.parametrize(
    ("name", "draft"),
    [("own-draw", drafted), ("own-draw", random_tree), ("rejection", drafted), ("rejection", bare_tree)],
)
def test_over_seeds_the_text_has_the_models_distribution(name, draft):
    """With addressed noise: pairs of tokens over 2,000 seeds, drafts drawn with the noise of the request itself."""
    found = Counter()
    for seed in range(2000):
        sampling = Sampling(temperature=0.9, top_p=0.97, seed=seed)
        found[text_of(RULES[name](sampling), sampling, 2, draft)] += 1
    assert chi_square(found, pair_law(sampling), 2000) < 4


def test_uniforms_that_the_drafts_knew_are_found_out():
    """The draft's own noise reused for the decisions would spoil the distribution; hence a stream of their own."""

    class Shared(PhiloxChance):
        def __init__(self, seed: int, position: int, tests: int) -> None:
            own = Sampling(temperature=1.0, seed=seed)(np.zeros(VOCAB, np.float32), (0,) * position)
            self._numbers = np.full(1 + tests, (own + 0.5) / VOCAB)

    found = Counter()
    for seed in range(1000):
        sampling = Sampling(temperature=0.9, seed=seed)
        found[text_of(Rejection(sampling, chance=Shared), sampling, 2, drafted)] += 1
    assert chi_square(found, pair_law(sampling), 1000) > 20


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**64 - 1), st.sampled_from([0.0, 0.7, 1.4]))
def test_own_draw_is_plain_decoding_token_for_token(seed, temperature):
    """Whatever is drafted, with whatever q: the text of the seed."""
    sampling = Sampling(temperature=temperature, seed=seed)
    assert text_of(RULES["own-draw"](sampling), sampling, 12, random_tree) == plain(sampling, 12)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("draft", [random_tree, drafted])
def test_greedy_text_is_the_same_by_every_rule(name, draft):
    """At temperature 0 a rule accepts the best token and nothing else, and nothing is a disagreement."""
    for seed in range(8):
        sampling = Sampling(seed=seed)
        rule = RULES[name](sampling)
        assert text_of(rule, sampling, 10, draft) == plain(sampling, 10)
        assert rule.disagreements == 0


@pytest.mark.parametrize("name", RULES)
def test_a_rule_says_what_it_promises(name):
    """A rule is lossy if and only if its name says so."""
    rule = RULES[name](Sampling(temperature=1.0))
    assert rule.lossless is not name.startswith("lossy-")
    assert rule.disagreements == 0


@pytest.mark.parametrize("name", RULES)
def test_nothing_stands_after_an_end(name):
    """A walk stops at the first end token, drafted or drawn, and the text is then over."""
    for seed in range(30):
        sampling = Sampling(temperature=1.0, seed=seed)
        text = text_of(RULES[name](sampling), sampling, 12, random_tree, ends=(2,))
        assert 2 not in text[:-1]
        assert text == text_of(RULES[name](sampling), sampling, 12, random_tree)[: len(text)]


@pytest.mark.parametrize("name", RULES)
def test_accepted_tokens_carry_their_source(name):
    """The path's tokens come first, each with where it came from; the last token is the model's own."""
    lengths = set()
    for seed in range(30):
        sampling = Sampling(temperature=1.0, seed=seed)
        tree = drafted(START, sampling)
        tree = tree.from_drafter(Source("here"))
        step = RULES[name](sampling)(tree, rows(tree, START), START, ())
        assert step.tokens[:-1] == tuple(tree.tokens[node] for node in step.path[1:])
        assert step.sources == (Source("here"),) * (len(step.path) - 1) + (None,)
        lengths.add(len(step.path))
    assert lengths == {1, 2, 3}


def test_every_lossy_rule_is_tested():
    """A new row of the table needs a row here."""
    assert set(LOSSY) == {name for name in RULES if name.startswith("lossy-")}


@pytest.mark.parametrize("name", LOSSY)
def test_without_drafts_a_lossy_rule_is_plain_decoding(name):
    """There is nothing to let pass."""
    sampling = Sampling(temperature=1.2, seed=4)
    rule = RULES[name](sampling)
    assert text_of(rule, sampling, 20, lambda text, sampling: TokenTree(text[-1:], (-1,))) == plain(sampling, 20)
    assert rule.disagreements == 0


@pytest.mark.parametrize("name", LOSSY)
def test_a_lossy_text_without_disagreements_is_the_plain_one(name):
    """The count is a certificate: 0 means the text of the seed, and texts that differ have a count above 0."""
    counts = Counter()
    for seed in range(150):
        sampling = Sampling(temperature=1.0, seed=seed)
        rule = RULES[name](sampling, **LOSSY[name])
        same = text_of(rule, sampling, 4, drafted) == plain(sampling, 4)
        counts[same, rule.disagreements > 0] += 1
    assert counts[True, False] > 10
    assert counts[False, True] > 10
    assert counts[False, False] == 0


@pytest.mark.parametrize("name", LOSSY)
def test_a_lossy_rule_accepts_more(name):
    """What the loss buys: fewer steps for the same number of tokens."""

    def made(make: Callable[[Sampling], Rule]) -> int:
        count = 0
        for seed in range(100):
            sampling = Sampling(temperature=1.0, seed=seed)
            tree = drafted(START, sampling)
            count += len(make(sampling)(tree, rows(tree, START), START).tokens)
        return count

    assert made(partial(RULES[name], **LOSSY[name])) > 1.1 * made(RULES["own-draw"])


def test_typical_acceptance_follows_the_entropy():
    """A sure model asks for eps, an undecided one for delta exp(-H): a token passes among equals, not beside a peak."""
    rule = LossyTypical(Sampling(temperature=1.0), eps=0.09, delta=0.3)
    even = np.full(50, 0.02)
    assert rule.allowed(even).all()  # exp(-H) is 0.02, the threshold 0.006
    peaked = np.array([0.9, 0.06, 0.03, 0.01])
    assert rule.allowed(peaked).tolist() == [True, False, False, False]
    between = np.array([0.4, 0.4, 0.1, 0.08, 0.02])
    threshold = min(0.09, 0.3 * np.exp((between * np.log(between)).sum()))
    assert rule.allowed(between).tolist() == (between > threshold).tolist()


def test_the_ratio_is_to_the_best():
    """gamma 1 leaves the best token, a small gamma nearly all."""
    law = np.array([0.5, 0.3, 0.2, 0.0])
    sampling = Sampling(temperature=1.0)
    assert LossyRatio(sampling, gamma=1.0).allowed(law).tolist() == [True, False, False, False]
    assert LossyRatio(sampling, gamma=0.5).allowed(law).tolist() == [True, True, False, False]
    assert LossyRatio(sampling, gamma=1e-3).allowed(law).tolist() == [True, True, True, False]


def test_the_models_own_draw_goes_before_a_more_probable_sibling():
    """Among siblings the one drawn stands; the most probable only where none was drawn."""
    sampling = Sampling(temperature=1.0, seed=7)
    own, best = sampling(logits_after(START), START), int(logits_after(START).argmax())
    law = sampling.law(logits_after(START), START)
    others = [int(token) for token in np.argsort(-law) if token not in (own, best)]
    rule = LossyRatio(sampling, gamma=1e-6)
    tree = TokenTree((START[-1], best, own), (-1, 0, 0)) if own != best else TokenTree.chain(START[-1], [own])
    assert rule(tree, rows(tree, START), START).tokens[0] == own
    assert rule.disagreements == 0
    tree = TokenTree((START[-1], others[2], others[0], others[1]), (-1, 0, 0, 0))
    assert rule(tree, rows(tree, START), START).tokens[0] == others[0]
    assert rule.disagreements == 1


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (LossyTypical, {"eps": 0.0}),
        (LossyTypical, {"eps": 1.5}),
        (LossyTypical, {"delta": 0.0}),
        (LossyTypical, {"delta": float("nan")}),
        (LossyRatio, {"gamma": 0.0}),
        (LossyRatio, {"gamma": 1.01}),
    ],
)
def test_thresholds_out_of_range_are_named(make, options):
    """Refused at birth, with the rule's name, the value and the range."""
    (option,) = options
    with pytest.raises(BadRequest, match=f"{option} of lossy-.* is .*must be"):
        make(Sampling(), **options)


def test_decisions_have_an_address():
    """Number 0 draws, number k decides test k, and neither depends on how many there are."""
    numbers = uniforms(5, seed=11, position=40)
    chance = PhiloxChance(11, 40, 4)
    for test in range(1, 5):
        assert chance.accepts(numbers[test] + 1e-9, test)
        assert not chance.accepts(numbers[test], test)
    law = np.array([0.25, 0.0, 0.5, 0.25])
    drawn = chance.draws(law)
    assert drawn == PhiloxChance(11, 40, 0).draws(law)
    assert law[:drawn].sum() <= numbers[0] < law[: drawn + 1].sum()


def test_draws_follow_the_law_and_never_leave_it():
    """Frequencies over positions are the law's; a token without mass is not drawn, first, last or between."""
    law = np.array([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    found = Counter((PhiloxChance(5, position, 0).draws(law),) for position in range(3000))
    assert set(found) == {(1,), (3,), (4,)}
    assert chi_square(found, law, 3000) < 4


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (1 - 2.0**-53, 4)])
def test_the_smallest_and_the_largest_number_draw_too(number, token):
    """Rounding of the sums cannot push a draw off either end."""
    chance = PhiloxChance(0, 0, 0)
    chance._numbers = np.array([number])
    for scale in (1.0, 1 - 1e-16, 1 + 2e-16, 1e-3):
        assert chance.draws(np.array([0.0, 0.1, 0.0, 0.6, 0.3, 0.0]) * scale) == token


class Never(PhiloxChance):
    """Rejects whatever may be rejected."""

    def accepts(self, probability: float, test: int) -> bool:
        self.tests = test
        return probability >= 1


@given(st.integers(0, 2**32), st.integers(1, VOCAB), st.booleans())
def test_a_rejected_token_is_not_drawn_again(seed, count, say):
    """After siblings failed the token comes from what they left over."""
    random = np.random.default_rng(seed)
    p, q = random.dirichlet(np.ones(VOCAB), 2)
    drafts, chance = random.permutation(VOCAB)[:count].tolist(), Never(seed, 0, count)
    token = speculative_sample(p, drafts, q if say else None, chance)
    assert token not in drafts[: chance.tests - 1]
    assert token == drafts[chance.tests - 1] or chance.tests == count


def test_equal_laws_up_to_rounding_still_draw():
    """Where p - q leaves nothing, the draw is from p: rounding must not end in a division by zero."""
    p = np.array([0.5, 0.25, 0.25])
    assert speculative_sample(p, [0], np.nextafter(p, 1), Never(1, 2, 1)) in (0, 1, 2)
    assert speculative_sample(np.eye(3)[1], [1], None, PhiloxChance(1, 2, 1)) == 1
    tiny = np.array([0.5, 0.5, 5e-324])
    assert speculative_sample(p, [2], tiny, Never(1, 2, 1)) == 2
