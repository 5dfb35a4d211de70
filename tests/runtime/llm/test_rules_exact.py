"""Speculative sampling is lossless, shown by enumeration: every branch of every step, with its exact probability.

Single tokens are not enough, since some mistakes keep the first token's distribution, so whole texts are compared. What
must be shown to fail fails here too: each of the well-known mistakes is far above the tolerance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest

from edgekit.runtime.llm import rules
from edgekit.runtime.llm.probs import Sampling
from edgekit.runtime.llm.rules import LossyRatio, LossyRule, LossyTypical, OwnDraw, Rejection
from edgekit.runtime.llm.tree import TokenTree

Text = tuple[int, ...]
EXACT, BROKEN = 1e-12, 2e-3
START = (0,)
SOFTMAX = Sampling(temperature=1.0)


class Branch:
    """Chance that follows one branch of a program: its probability so far, and the branches it passed by."""

    def __init__(self, script: tuple[int, ...]) -> None:
        self.script, self.taken, self.weight = script, (), 1.0
        self.passed: list[tuple[int, ...]] = []

    def choose(self, weights: Sequence[float]) -> int:
        turn = len(self.taken)
        if turn < len(self.script):
            pick = self.script[turn]
        else:
            pick, *others = [index for index, weight in enumerate(weights) if weight > 0]
            self.passed += [(*self.taken, other) for other in others]
        self.taken += (pick,)
        self.weight *= weights[pick]
        return pick

    def accepts(self, probability: float, test: int) -> bool:
        return self.choose((probability, 1 - probability)) == 0

    def draws(self, law: np.ndarray) -> int:
        return self.choose(law)


def outcomes(program: Callable[[Branch], object]) -> Counter:
    """What a program gives, and with which probability."""
    found, scripts = Counter(), [()]
    while scripts:
        branch = Branch(scripts.pop())
        found[program(branch)] += branch.weight
        scripts += branch.passed
    return found


class Tabular:
    """A model given by a table: the row after a text is a fixed random function of the text, in float64."""

    def __init__(self, seed: int, size: int, spread: float = 1.3, sampling: Sampling = SOFTMAX):
        self.size, self.sampling = size, sampling
        self.logits = cache(lambda text: np.random.default_rng([seed, *text]).normal(size=size) * spread)
        self.known = cache(lambda text: sampling.law(self.logits(text), text))

    def law(self, text: Text) -> np.ndarray:
        return self.known(text).copy()


Drafter = Callable[[Tabular, Branch, Text], TokenTree]


def grow(draft: Tabular, branch: Branch, text: Text, widths: Sequence[int], *, say: bool = True) -> TokenTree:
    """A tree drawn from `draft`, `widths[d]` siblings at depth d without replacement, first drawn first."""
    tokens, parents, texts, layer = [text[-1]], [-1], [text], [0]
    for width in widths:
        nodes, layer = layer, []
        for node in nodes:
            law = draft.law(texts[node])
            for _ in range(min(width, int((law > 0).sum()))):
                token = branch.draws(law / law.sum())
                law[token] = 0
                tokens.append(token)
                parents.append(node)
                texts.append((*texts[node], token))
                layer.append(len(tokens) - 1)
    laws = np.stack([draft.law(text) for text in texts])
    return TokenTree(tuple(tokens), tuple(parents), q=laws if say else None)


def chain(draft: Tabular, branch: Branch, text: Text) -> TokenTree:
    """Two tokens, one after the other."""
    return grow(draft, branch, text, (1, 1))


def siblings(draft: Tabular, branch: Branch, text: Text) -> TokenTree:
    """Three different guesses of the next token."""
    return grow(draft, branch, text, (3,))


def bush(draft: Tabular, branch: Branch, text: Text) -> TokenTree:
    """Two different guesses, and one more after each."""
    return grow(draft, branch, text, (2, 1))


def chosen(draft: Tabular, branch: Branch, text: Text) -> TokenTree:
    """No randomness: the two best tokens, the two best after the first of them, and no q."""
    first, second = np.argsort(-draft.law(text))[:2].tolist()
    below = np.argsort(-draft.law((*text, first)))[:2].tolist()
    return TokenTree((text[-1], first, second, *below), (-1, 0, 0, 1, 1))


def unsaid(draft: Tabular, branch: Branch, text: Text) -> TokenTree:
    """Drawn, but without saying from what."""
    return grow(draft, branch, text, (1, 1), say=False)


def mixed(draft: Tabular, branch: Branch, text: Text) -> TokenTree:
    """A guess that was looked up, then one that was drawn from what is left."""
    law = draft.law(text)
    looked_up = (3 * text[-1] + len(text)) % draft.size
    law[looked_up] = 0
    law /= law.sum()
    token = branch.draws(law)
    return TokenTree((text[-1], looked_up, token), (-1, 0, 0), q=np.stack([law, law, law]))


def text_law(step: Callable[[Text], Counter], size: int, length: int) -> np.ndarray:
    """The joint distribution of the next `length` tokens when text is made step by step; shape (size,) * length."""

    @cache
    def after(text: Text) -> Counter:
        missing = len(START) + length - len(text)
        if missing <= 0:
            return Counter({text: 1.0})
        found = Counter()
        for tokens, weight in step(text).items():
            for whole, rest in after((*text, *tokens[:missing])).items():
                found[whole] += weight * rest
        return found

    joint = np.zeros((size,) * length)
    for text, weight in after(START).items():
        joint[text[len(START) :]] = weight
    return joint


def plain_law(target: Tabular, length: int) -> np.ndarray:
    """The same for ordinary decoding, by the chain rule."""
    return text_law(lambda text: Counter({(v,): p for v, p in enumerate(target.law(text))}), target.size, length)


def rejection_law(target: Tabular, draft: Tabular, drafter: Drafter, length: int) -> np.ndarray:
    """The same for speculative sampling, over all drafts and all decisions."""

    def step(text: Text) -> Counter:
        def program(branch: Branch) -> Text:
            tree = drafter(draft, branch, text)
            rule = Rejection(target.sampling, chance=lambda seed, position, tests: branch)
            return rule(tree, rows(target, tree, text), text).tokens

        return outcomes(program)

    return text_law(step, target.size, length)


def rows(target: Tabular, tree: TokenTree, text: Text) -> np.ndarray:
    """The target's row at every node."""
    texts = [text]
    for token, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True):
        texts.append((*texts[parent], token))
    return np.stack([target.logits(text) for text in texts])


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Total variation."""
    return float(np.abs(one - other).sum() / 2)


SAMPLINGS = {
    "softmax": SOFTMAX,
    "filtered": Sampling(temperature=0.8, top_k=3, top_p=0.9),
    "penalised": Sampling(temperature=1.3, repetition_penalty=1.5),
}


@pytest.mark.parametrize(
    ("drafter", "size"), [(chain, 4), (siblings, 4), (bush, 3), (chosen, 4), (unsaid, 3), (mixed, 4)]
)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_speculative_sampling_keeps_the_joint_distribution(drafter, sampling, size):
    """Three tokens, made over several steps, have the probabilities of plain decoding to the last digits."""
    target = Tabular(1, size, sampling=SAMPLINGS[sampling])
    joint = rejection_law(target, Tabular(2, size), drafter, 3)
    assert joint.sum() == pytest.approx(1, abs=EXACT)
    assert distance(joint, plain_law(target, 3)) < EXACT


@pytest.mark.parametrize("seed", range(10, 15))
@pytest.mark.parametrize("drafter", [chain, siblings, mixed])
def test_five_tokens_and_sparse_drafts(drafter, seed):
    """Vocabulary five, and a draft distribution that knows only three of the tokens."""
    target, draft = Tabular(seed, 5, 2.0), Tabular(seed + 50, 5, 2.0, Sampling(temperature=1.0, top_k=3))
    assert distance(rejection_law(target, draft, drafter, 2), plain_law(target, 2)) < EXACT


def test_a_draft_equal_to_the_target_is_always_accepted():
    """The best case: no test fails, so every chain stands whole."""
    model = Tabular(1, 4)

    def program(branch: Branch) -> int:
        tree = chain(model, branch, START)
        rule = Rejection(model.sampling, chance=lambda seed, position, tests: branch)
        return len(rule(tree, rows(model, tree, START), START).path)

    found = outcomes(program)
    assert found[3] == pytest.approx(1, abs=EXACT)


def test_acceptance_is_what_the_papers_say():
    """A drawn draft stands with probability sum min(p, q); one that does not say its q with sum p q, which is less."""
    target, draft = Tabular(1, 4), Tabular(2, 4)
    p, q = target.law(START), draft.law(START)

    def rate(say: bool) -> float:
        def program(branch: Branch) -> bool:
            tree = grow(draft, branch, START, (1,), say=say)
            rule = Rejection(target.sampling, chance=lambda seed, position, tests: branch)
            return len(rule(tree, rows(target, tree, START), START).path) > 1

        return outcomes(program)[True]

    assert rate(True) == pytest.approx(np.minimum(p, q).sum(), abs=EXACT)
    assert rate(False) == pytest.approx(p @ q, abs=EXACT)
    assert rate(False) < rate(True)


def norm(mass: np.ndarray) -> np.ndarray:
    return mass / mass.sum()


def residual(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    left = np.maximum(p - q, 0)
    return norm(left) if left.sum() > 0 else p


def rest(q: np.ndarray, token: int) -> np.ndarray:
    left = np.where(np.arange(len(q)) == token, 0.0, q)
    return norm(left) if left.sum() > 0 else q


def twin(left: Callable = residual, renew: Callable = rest) -> Callable:
    """The rule as its papers write it, with two parts to exchange: p and q after a rejection."""

    def sample(law, drafts, q, chance):
        for test, token in enumerate(drafts, start=1):
            if chance.accepts(min(1.0, law[token] / q[token]) if q[token] > 0 else 1.0, test):
                return token
            law, q = left(law, q), renew(q, token)
        return chance.draws(law)

    return sample


def unrenormalised(q: np.ndarray, token: int) -> np.ndarray:
    return np.where(np.arange(len(q)) == token, 0.0, q)


MISTAKES = {
    "none": (chain, twin()),
    "none, siblings": (siblings, twin()),
    "a new draw from p itself": (chain, twin(left=lambda p, q: p)),
    "q not renormalised": (siblings, twin(renew=unrenormalised)),
    "the first q for every sibling": (siblings, twin(renew=lambda q, token: q)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_broken_rule_is_found_out(name, monkeypatch):
    """The mistakes of the literature are far outside the tolerance; the same code without a mistake is within."""
    drafter, sample = MISTAKES[name]
    monkeypatch.setattr(rules, "speculative_sample", sample)
    target, draft = Tabular(1, 4), Tabular(2, 4)
    found = distance(rejection_law(target, draft, drafter, 2), plain_law(target, 2))
    assert found < EXACT if name.startswith("none") else found > BROKEN


def choosy(draft: Tabular, branch: Branch, text: Text) -> TokenTree:
    """Drops a draft it has drawn because it was improbable."""
    tree = grow(draft, branch, text, (1,))
    return tree if tree.q[0, tree.tokens[1]] > 0.3 else tree.keep([0])


def quantised(draft: Tabular, branch: Branch, text: Text) -> TokenTree:
    """Draws from q and sends q in few bits."""
    tree = chain(draft, branch, text)
    coarse = np.maximum(np.round(tree.q * 8), 0.25)
    return TokenTree(tree.tokens, tree.parents, q=coarse / coarse.sum(1, keepdims=True))


def backwards(draft: Tabular, branch: Branch, text: Text) -> TokenTree:
    """Fixes the second token before the first, as a masked diffusion model may, and gives the rows it used."""
    second_row = draft.law((*text, draft.size))
    second = branch.draws(second_row)
    first_row = draft.law((*text, draft.size, second))
    first = branch.draws(first_row)
    return TokenTree((text[-1], first, second), (-1, 0, 1), q=np.stack([first_row, second_row, second_row]))


@pytest.mark.parametrize("drafter", [choosy, quantised, backwards])
def test_a_drafter_that_breaks_its_promise_is_found_out(drafter):
    """`q` must be the law the drafts were drawn from, exactly, in reading order, and with every draft drawn kept."""
    target, draft = Tabular(1, 3), Tabular(2, 3)
    assert distance(rejection_law(target, draft, drafter, 2), plain_law(target, 2)) > BROKEN


def test_one_token_is_not_enough_to_test():
    """Drafts fixed out of order keep the first token's distribution and spoil the second's."""
    target, draft = Tabular(1, 3), Tabular(2, 3)
    joint, plain = rejection_law(target, draft, backwards, 2), plain_law(target, 2)
    assert distance(joint.sum(1), plain.sum(1)) < EXACT
    assert distance(joint, plain) > BROKEN


@pytest.mark.parametrize("drafter", [chain, bush, choosy, quantised, backwards])
def test_own_draw_forgives_every_drafter(drafter):
    """Where the model draws its own tokens no drafter can change the distribution, not even a dishonest one."""
    target, draft = Tabular(1, 3), Tabular(2, 3)

    def step(text: Text) -> Counter:
        def program(branch: Branch) -> Text:
            tree = drafter(draft, branch, text)
            return OwnDraw(Enumerated(target, branch))(tree, rows(target, tree, text), text).tokens

        return outcomes(program)

    assert distance(text_law(step, 3, 3), plain_law(target, 3)) < EXACT


class Enumerated:
    """A Sampling that draws along a branch."""

    def __init__(self, model: Tabular, branch: Branch) -> None:
        self.law, self.branch = model.sampling.law, branch

    def __call__(self, logits: np.ndarray, text: Text) -> int:
        return self.branch.draws(self.law(logits, text))


@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize(
    "make",
    [
        lambda sampling: LossyTypical(sampling),
        lambda sampling: LossyTypical(sampling, eps=0.3, delta=0.6),
        lambda sampling: LossyRatio(sampling),
        lambda sampling: LossyRatio(sampling, gamma=0.9),
    ],
)
def test_a_lossy_text_is_as_far_off_as_it_says_at_most(make, seed):
    """The total variation of whole texts is at most the expected number of disagreements, and it is not nothing."""
    target, draft, length = Tabular(seed, 3), Tabular(seed + 20, 3), 3

    def program(branch: Branch) -> tuple[Text, int]:
        rule: LossyRule = make(Enumerated(target, branch))
        text = START
        while missing := len(START) + length - len(text):
            tree = chosen(draft, branch, text).pruned(depth=missing - 1, nodes=9)
            text += rule(tree, rows(target, tree, text), text).tokens
        return text[len(START) :], rule.disagreements

    joint, expected = np.zeros((3,) * length), 0.0
    for (text, disagreements), weight in outcomes(program).items():
        joint[text] += weight
        expected += weight * disagreements
    found = distance(joint, plain_law(target, length))
    assert found <= expected + EXACT
    assert (found > BROKEN) == (expected > BROKEN)
