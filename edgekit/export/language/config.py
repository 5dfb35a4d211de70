"""`config.json`, read strictly: a key is modelled, known not to matter, neutral, or refused by name.

A network whose configuration is half understood exports without a word and answers wrongly past some length. So every
read is remembered, and `finish` refuses what nobody read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgekit.errors import BadSource, UnsupportedModel

# Keys that say nothing about inference.
# fmt: off
_IGNORED = frozenset((
    # bookkeeping
    "architectures", "torch_dtype", "dtype", "transformers_version", "model_type", "auto_map", "license",
    "name_or_path", "is_llama_config", "transformers.js_config", "tokenizer_class", "finetuning_task",
    "task_specific_params", "problem_type", "id2label", "label2id", "num_labels", "is_decoder", "is_encoder_decoder",
    # training
    "initializer_range", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "gradient_checkpointing", "pretraining_tp", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels", "summary_first_dropout",
    # how transformers runs it
    "use_cache", "cache_implementation", "attn_implementation", "return_dict", "output_attentions",
    "output_hidden_states", "torchscript", "chunk_size_feed_forward", "reorder_and_upcast_attn", "prefix",
    # generation, read elsewhere
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "max_length", "temperature",
    "top_k", "top_p", "do_sample", "repetition_penalty",
    # lengths and counts that nothing else refers to
    "n_ctx", "max_window_layers",
))
# fmt: on
# Keys of remote code that a family's released models carry, and the value at which they do nothing.
_NEUTRAL = {"full_attn_mod": 1, "interpolate_factor": 1}
_IGNORED_PREFIXES = ("_", "unsloth")


class Config:
    """One JSON object of a configuration; `where` names it in messages."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self.where = where
        self._read: set[str] = set()

    @classmethod
    def load(cls, folder: Path) -> Config:
        """`folder/config.json`; raises BadSource."""
        file = folder / "config.json"
        if not file.is_file():
            raise BadSource(f"{folder} has no config.json: is it the folder that save_pretrained wrote?")
        try:
            values = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as why:
            raise BadSource(f"{file} is not JSON ({why}). Download it again.") from why
        if not isinstance(values, dict):
            raise BadSource(f"{file} must hold one JSON object")
        return cls(values, str(file))

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or `default` when it is absent or null."""
        self._read.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive whole number; without a default the key must be there."""
        value = self._required(key, default)
        if type(value) is not int or value <= 0:
            raise BadSource(f"{self.where}: {key} must be a positive whole number, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; without a default the key must be there."""
        value = self._required(key, default)
        if type(value) not in (int, float) or abs(value) == float("inf") or value != value:
            raise BadSource(f"{self.where}: {key} must be a number, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(key, default)
        if type(value) is not bool:
            raise BadSource(f"{self.where}: {key} must be true or false, not {value!r}")
        return value

    def section(self, key: str) -> Config:
        """A nested object; an absent one is empty."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise BadSource(f"{self.where}: {key} must be an object, not {value!r}")
        return Config(value, f"{self.where}: {key}")

    def refuse(self, key: str, advice: str = "") -> UnsupportedModel:
        """The refusal of `key` by name, to be raised."""
        return UnsupportedModel(f"{self.where}: {key} = {self.values.get(key)!r} is not modelled. {advice}".rstrip())

    def finish(self) -> None:
        """Refuse the first key that is neither read, nor known not to matter, nor neutral.

        Raises:
            UnsupportedModel: names the key.
        """
        for key, value in self.values.items():
            known = key in self._read or key in _IGNORED or key.startswith(_IGNORED_PREFIXES)
            neutral = value is None or value is False or value in ("", [], {}) or value == _NEUTRAL.get(key, ...)
            if not known and not neutral:
                raise self.refuse(key, "If it does not change the network, delete the key and export again.")

    def _required(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is None:
            raise BadSource(f"{self.where} has no {key!r}. Is it the configuration of a language model?")
        return value
