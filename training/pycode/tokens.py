"""Token streams: every document of a split as `<|endoftext|> document`, one after the other, in one uint16 array."""

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from training.pycode.corpus import read_split
from training.pycode.tokenizer import END_OF_TEXT

Stream = npt.NDArray[np.uint16]
LANES = 64
SPLITS = ("train", "heldout", "heldout_package")


def encode_documents(texts: list[str], tokenizer: Tokenizer) -> list[Stream]:
    """One array per text, `<|endoftext|>` first, so that a document's beginning is a context the model knows."""
    separator = tokenizer.token_to_id(END_OF_TEXT)
    return [np.array([separator, *one.ids], np.uint16) for one in tokenizer.encode_batch(texts)]


class Windows:
    """Endless batches of windows over shuffled documents.

    An epoch concatenates all documents in an order drawn from `(seed, epoch)` and cuts them into `LANES` lanes, each
    read from its beginning to its end; a batch takes the least read ones. So rows of a batch come from different
    files, windows start mid-file or at a file's start alike, and a resumed run goes on where it was.
    """

    def __init__(self, documents: list[Stream], seed: int) -> None:
        self.documents, self.seed = documents, seed
        self.lane_length = sum(map(len, documents)) // LANES
        self.restore([0] * (LANES + 1))

    def state(self) -> list[int]:
        """The epoch and how far each lane is read."""
        return [self.epoch, *self.read.tolist()]

    def restore(self, state: list[int]) -> None:
        """Go on from a saved `state`."""
        self.epoch, self.read = state[0], np.array(state[1:], np.int64)
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.documents))
        self.stream = np.concatenate([self.documents[i] for i in order])

    def batch(self, rows: int, columns: int) -> torch.Tensor:
        """int64 `[rows, columns + 1]`: inputs and, shifted by one, their targets."""
        lanes = np.argsort(self.read, kind="stable")[:rows]
        if self.read[lanes[-1]] + columns >= self.lane_length:
            self.restore([self.epoch + 1, *[0] * LANES])
            lanes = np.arange(rows)
        starts = lanes * self.lane_length + self.read[lanes]
        self.read[lanes] += columns
        return torch.from_numpy(self.stream[starts[:, None] + np.arange(columns + 1)].astype(np.int64))


def load_documents(data: Path, split: str) -> list[Stream]:
    """The encoded documents of one split, as written by `write_streams`."""
    packed = np.load(data / f"{split}.npz")
    return np.split(packed["tokens"], np.cumsum(packed["lengths"])[:-1])


def write_streams(data: Path, tokenizer_folder: Path) -> None:
    """Encode the three splits of `data` and write `SPLIT.npz` with arrays `tokens` and `lengths`."""
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    for split in SPLITS:
        documents = encode_documents(read_split(data / f"{split}.jsonl"), tokenizer)
        np.savez(data / f"{split}.npz", tokens=np.concatenate(documents), lengths=np.array([*map(len, documents)]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    arguments = parser.parse_args()
    write_streams(arguments.data, arguments.tokenizer)
