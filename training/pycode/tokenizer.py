"""Train the byte-level BPE tokenizer that target and draft share.

    python -m training.pycode.tokenizer --data DATA --out TOKENIZER

Runs of spaces, runs of newlines and single digits are their own pieces, so a prompt may end after a newline or
after its indentation and still be cut as the training text was.
"""

import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from training.pycode.corpus import read_split

VOCAB_SIZE = 4096
CONTEXT = 1024  # tokens
END_OF_TEXT = "<|endoftext|>"  # id 0: separates documents, begins and ends a text
PIECES = r" {2,}|\n+| ?_*\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}_]+| ?_+|\s"


def train_tokenizer(texts: list[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE of `vocab_size` entries; `decode(encode(text)) == text` for any text."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` for `AutoTokenizer`."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    config = folder / "tokenizer_config.json"  # the class name that every transformers release knows
    fields = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(fields, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    save_tokenizer(train_tokenizer(read_split(arguments.data / "train.jsonl")), arguments.out)
