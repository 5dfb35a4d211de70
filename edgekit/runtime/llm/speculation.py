"""Putting a speculation engine together: what was asked for, the drafter, its controller, the acceptance rule.

The keys of a configuration are those of vLLM's `speculative_config` where it has them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from edgekit.bundle.store import Bundle, read_bundle
from edgekit.errors import BadRequest
from edgekit.runtime.backends import open_session
from edgekit.runtime.backends.devices import engine
from edgekit.runtime.llm.accept import Accept
from edgekit.runtime.llm.controller import Controller
from edgekit.runtime.llm.costs import Curve, measure, remembered
from edgekit.runtime.llm.drafters import Drafter, NoDraft
from edgekit.runtime.llm.drafters.by_text import ByTextDraft
from edgekit.runtime.llm.drafters.corpus import CorpusDraft, read_documents
from edgekit.runtime.llm.drafters.hybrid import HybridDraft
from edgekit.runtime.llm.drafters.lookahead import LookaheadDraft
from edgekit.runtime.llm.drafters.model import ModelDraft
from edgekit.runtime.llm.drafters.ngram import NgramDraft
from edgekit.runtime.llm.ledger import SpeculationStats
from edgekit.runtime.llm.probe import SIZES, Invariance, classify
from edgekit.runtime.llm.probs import Sampling
from edgekit.runtime.llm.rules import RULES, Rule
from edgekit.runtime.llm.verifier import LocalVerifier
from edgekit.runtime.tokenizer import Tokenizer

OPTIONS = {  # of an acceptance rule, by its key
    "posterior_threshold": "lossy-typical",
    "posterior_alpha": "lossy-typical",
    "gamma": "lossy-ratio",
}


class SpeculativeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to speculate.

    Attributes:
        method: a row of DRAFTERS; `auto` is `hybrid` where a model is given, else `ngram`.
        model: path of the draft bundle (methods `model`, `hybrid`, `auto`).
        num_speculative_tokens: drafts per step. Given alone it is kept to, as in vLLM; with `adaptive` it is the most.
        adaptive: let the controller choose how many, and whether at all.
        prompt_lookup_max: longest suffix looked up by `ngram`, in tokens.
        prompt_lookup_min: shortest.
        documents: file or folder of texts (method `corpus`).
        acceptance: a row of RULES.
        posterior_threshold: epsilon of `lossy-typical`.
        posterior_alpha: delta of `lossy-typical`.
        gamma: of `lossy-ratio`.
    """

    method: str = "auto"
    model: str | None = None
    num_speculative_tokens: int | None = None
    adaptive: bool | None = None
    prompt_lookup_max: int | None = None
    prompt_lookup_min: int | None = None
    documents: str | None = None
    acceptance: str = "own-draw"
    posterior_threshold: float | None = None
    posterior_alpha: float | None = None
    gamma: float | None = None

    def __post_init__(self) -> None:
        if self.method != "auto" and self.method not in DRAFTERS:
            raise BadRequest(f"no drafter {self.method!r}; known: auto, {', '.join(DRAFTERS)}, or a bundle's path")
        if self.acceptance not in RULES:
            raise BadRequest(f"no acceptance rule {self.acceptance!r}; known: {', '.join(RULES)}")
        if self.num_speculative_tokens is not None and not 1 <= self.num_speculative_tokens <= 64:
            raise BadRequest(f"num_speculative_tokens is {self.num_speculative_tokens}; it must be between 1 and 64")
        if self.adaptive is False and self.num_speculative_tokens is None:
            raise BadRequest("adaptive is false, so num_speculative_tokens must say how many drafts a step has")
        for name, rule in OPTIONS.items():
            if getattr(self, name) is not None and self.acceptance != rule:
                raise BadRequest(f"{name} is an option of acceptance {rule!r}; here acceptance is {self.acceptance!r}")
        low, high = self.lookup
        if not 1 <= low <= high:
            raise BadRequest(f"prompt_lookup_min is {low} and prompt_lookup_max {high}; 1 <= min <= max")

    @property
    def lookup(self) -> tuple[int, int]:
        """Shortest and longest suffix of `ngram`."""
        default = NgramDraft()
        low = default.shortest if self.prompt_lookup_min is None else self.prompt_lookup_min
        high = max(low, default.longest) if self.prompt_lookup_max is None else self.prompt_lookup_max
        return low, high

    @property
    def is_adaptive(self) -> bool:
        """Whether the controller decides."""
        return self.num_speculative_tokens is None if self.adaptive is None else self.adaptive


def read_config(draft: str, options: Mapping[str, Any] | None = None) -> SpeculativeConfig:
    """What `--draft` and `--speculative-config` ask for together.

    Args:
        draft: `auto`, a row of DRAFTERS, `corpus:PATH`, or the path of a draft bundle; `none` leaves it to the options.
        options: the keys of SpeculativeConfig.

    Raises:
        BadRequest: an unknown key or value, or two that contradict each other.
    """
    name, colon, path = draft.partition(":")
    told: dict[str, Any] = {} if draft == "none" and options else {"method": draft}
    if colon and name == "corpus":
        told = {"method": "corpus", "documents": path}
    elif draft != "auto" and draft not in DRAFTERS:
        if not Path(draft).exists():
            raise BadRequest(f"no drafter and no bundle {draft!r}; known: auto, {', '.join(DRAFTERS)}, corpus:PATH")
        told = {"method": "model", "model": draft}
    asked = dict(options or {})
    for key, value in told.items():
        if asked.get(key, value) != value and draft != "auto":
            raise BadRequest(
                f"--draft {draft} and {key}={asked[key]!r} of the speculative config contradict each other"
            )
    try:
        return msgspec.convert({**told, **asked}, SpeculativeConfig)
    except msgspec.ValidationError as why:
        known = ", ".join(SpeculativeConfig.__struct_fields__)
        raise BadRequest(f"the speculative config is not one: {why}. Its keys: {known}") from why


@dataclass(frozen=True)
class Target:
    """The model that drafts are for, and where it runs; `exact` asks that drafts change no bit.

    `report` is told when something is found out that takes seconds and is then remembered.
    """

    bundle: Bundle
    verifier: LocalVerifier
    tokenizer: Tokenizer
    exact: bool
    device: str
    threads: int
    report: Callable[[str], None]

    @property
    def key(self) -> tuple[str, ...]:
        """What is measured of the verifier depends on this."""
        return (graph_fingerprint(self.bundle, self.device), str(self.threads), str(os.cpu_count()))

    @cached_property
    def invariance(self) -> Invariance:
        """Whether rows depend on their run; found out once."""

        def find() -> Invariance:
            self.report("looking once at how rows of this graph depend on their run")
            return classify(self.verifier)

        return remembered(Invariance, self.key, find)

    @cached_property
    def curve(self) -> Curve:
        """T(n), as the verifier runs now; measured once."""

        def find() -> Curve:
            self.report("measuring once what a verification costs by its rows")
            return measure(self.verifier)

        return remembered(Curve, (*self.key, str(self.verifier.granule)), find)


def _ngram(config: SpeculativeConfig, target: Target) -> Drafter:  # noqa: ARG001
    low, high = config.lookup
    return NgramDraft(longest=high, shortest=low)


def _corpus(config: SpeculativeConfig, target: Target) -> Drafter:
    if config.documents is None:
        raise BadRequest("the corpus drafter needs texts: --draft corpus:PATH")
    return CorpusDraft(read_documents(Path(config.documents), target.tokenizer))


def _model(config: SpeculativeConfig, target: Target) -> Drafter:
    """A smaller bundle; one with another tokenizer drafts through text."""
    if config.model is None:
        raise BadRequest("the model drafter needs a bundle: --draft PATH, or model in the speculative config")
    bundle = read_bundle(Path(config.model))
    if bundle.manifest.decoding is None or "default" not in bundle.manifest.tokenizers:
        raise BadRequest(f"{config.model} generates no text; a draft model is a text-generation bundle")
    decoding, spec = bundle.manifest.decoding, bundle.manifest.tokenizers["default"]
    graph = bundle.root / bundle.manifest.parts[decoding.part].graph
    session = open_session(graph, target.device, threads=target.threads, spinning=False)
    verifier = LocalVerifier(session, decoding)
    if spec.fingerprint == target.bundle.manifest.tokenizers["default"].fingerprint:
        return ModelDraft(verifier, vocabulary=target.verifier.vocab_size, rows=config.acceptance == "rejection")
    if config.acceptance == "rejection":
        raise BadRequest(
            "a draft with another tokenizer has no probabilities over these tokens: leave rejection sampling out"
        )
    return ByTextDraft(verifier, Tokenizer.from_file(bundle.root / spec.file), target.tokenizer)


DRAFTERS: dict[str, Callable[[SpeculativeConfig, Target], Drafter]] = {
    "none": lambda config, target: NoDraft(),  # noqa: ARG005
    "ngram": _ngram,
    "corpus": _corpus,
    "lookahead": lambda config, target: LookaheadDraft(),  # noqa: ARG005
    "model": _model,
    "hybrid": lambda config, target: HybridDraft(_ngram(config, target), _model(config, target)),
}


class Speculator:
    """A drafter under its controller, and the rule that accepts."""

    def __init__(self, config: SpeculativeConfig, target: Target) -> None:
        method = config.method
        if method == "auto":
            method = "ngram" if config.model is None else "hybrid"
        self.config = config
        self._rule = _rule(config, Sampling())  # refuses its options before anything is loaded
        if target.exact and (config.num_speculative_tokens or 0) >= SIZES[-1]:
            raise BadRequest(
                f"num_speculative_tokens is {config.num_speculative_tokens}; in exact mode it is at most "
                f"{SIZES[-1] - 1}: runs of more than {SIZES[-1]} rows are not compared when a graph is loaded"
            )
        drafter = DRAFTERS[method](config, target)
        missing = sorted(set(drafter.outputs) - set(target.verifier.extra))
        if missing:
            raise BadRequest(f"drafter {method} reads {', '.join(missing)}, which this bundle's graph does not give")
        self.invariance = target.invariance
        self.invariance.check()
        self.curve = target.curve
        self._granule = target.verifier.granule
        self.drafter = Controller(
            drafter,
            self.curve,
            chains_only=target.exact or target.verifier.chains_only,
            may_prune=config.acceptance != "rejection",
            fixed=None if config.is_adaptive else config.num_speculative_tokens,
            most=config.num_speculative_tokens,
        )

    def begin(self, sampling: Sampling) -> tuple[Drafter, Accept]:
        """A new request: the drafter to ask, and the rule that accepts."""
        self.drafter.begin()
        self._rule = _rule(self.config, sampling)
        return self.drafter, self.drafter.timed(self._rule)

    def stats(self, *, total: bool = False) -> SpeculationStats:
        """Of the request since the last `begin`, or of all of them."""
        rule, invariance = self._rule, self.invariance
        return replace(
            self.drafter.stats(total=total),
            acceptance_rule=self.config.acceptance,
            granule=self._granule,
            lossless=rule.lossless,
            disagreements=rule.disagreements,
            invariance=invariance.kind,
            margin=invariance.margin,
        )


def _rule(config: SpeculativeConfig, sampling: Sampling) -> Rule:
    options = {"eps": config.posterior_threshold, "delta": config.posterior_alpha, "gamma": config.gamma}
    return RULES[config.acceptance](sampling, **{key: value for key, value in options.items() if value is not None})


def graph_fingerprint(bundle: Bundle, device: str) -> str:
    """sha256 over the decoder's files, the engine and the device: what keys, values and costs depend on."""
    manifest, found = bundle.manifest, engine()
    parts = () if manifest.decoding is None else (manifest.parts[manifest.decoding.part],)
    paths = {path for part in parts for path in (part.graph, *part.data)}
    hashes = sorted(entry.sha256 for entry in manifest.files if entry.path in paths)
    return hashlib.sha256("\n".join([*hashes, device, found.wheel, found.version]).encode()).hexdigest()
