"""`training/emoji/features.py` and the weights of it that are kept with the benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")

from training.emoji.features import FEATURES, Trunk, augment, load_trunk, save_trunk  # noqa: E402

KEPT = Path(__file__).resolve().parents[2] / "benchmarks" / "data" / "emoji_features.safetensors"
SMALL = 400_000  # bytes


def test_kept_weights_are_read() -> None:
    """The kept file is small, fits the network, says how it was made, and its features tell pictures apart."""
    trunk, notes = load_trunk(KEPT)
    with torch.no_grad():
        made = trunk(torch.rand(3, 3, 32, 32) * 2 - 1)
    assert KEPT.stat().st_size < SMALL
    assert notes["classes"] == "747"
    assert made.shape == (3, FEATURES)
    assert made.isfinite().all()
    assert (made[0] - made[1]).abs().max() > 1e-3


def test_features_are_standardised() -> None:
    """Over the pictures it was standardised by, every feature has mean 0 and deviation 1, however often it is done."""
    torch.manual_seed(0)
    trunk, pictures = Trunk(), torch.rand(40, 3, 32, 32) * 2 - 1
    for _ in range(2):
        trunk.standardise(pictures)
        with torch.no_grad():
            made = trunk(pictures)
        torch.testing.assert_close(made.mean(0), torch.zeros(FEATURES), atol=1e-3, rtol=0)
        torch.testing.assert_close(made.std(0, correction=0), torch.ones(FEATURES), atol=1e-3, rtol=0)


def test_saved_weights_come_back(tmp_path: Path) -> None:
    """A trunk that was written and read answers as before, and is the same bytes each time it is written."""
    torch.manual_seed(1)
    trunk, pictures = Trunk(), torch.rand(40, 3, 32, 32) * 2 - 1
    trunk.standardise(pictures)
    for half in (trunk.layers, trunk.out):
        half.half().float()
    for name in ("trunk", "same"):
        save_trunk(trunk, tmp_path / f"{name}.safetensors", {"seed": "1", "steps": "0"})
    again, notes = load_trunk(tmp_path / "trunk.safetensors")
    assert notes == {"seed": "1", "steps": "0"}
    assert (tmp_path / "trunk.safetensors").read_bytes() == (tmp_path / "same.safetensors").read_bytes()
    with torch.no_grad():
        torch.testing.assert_close(again(pictures), trunk(pictures))


def test_no_augmentation_changes_nothing() -> None:
    """By amount 0 a picture stays what it is; by amount 1 it does not, and stays in range."""
    pictures = torch.rand(4, 3, 32, 32) * 2 - 1
    same = augment(pictures, torch.Generator().manual_seed(0), 0.0)
    moved = augment(pictures, torch.Generator().manual_seed(0), 1.0)
    torch.testing.assert_close(same, pictures, atol=1e-5, rtol=1e-4)
    assert (moved - pictures).abs().mean() > 0.1
    assert moved.abs().max() <= 1


def test_what_comes_into_view_is_white() -> None:
    """A white picture stays white wherever it is moved, but for its change of colour."""
    moved = augment(torch.ones(16, 3, 32, 32), torch.Generator().manual_seed(0))
    assert moved.min() >= 1 - 0.1 - 1e-5
