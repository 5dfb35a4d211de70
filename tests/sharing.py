"""What is slow to make is made once for all test processes of a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The path that `make` fills, by whichever process comes first; it must appear complete or not at all.

    Args:
        factory: knows the folder of this run; every xdist worker has its own below it.
        name: of the file or folder.
        make: told where to put it.
    """
    import fcntl

    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    target = root / "shared" / name
    target.parent.mkdir(exist_ok=True)
    with target.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go of when the file is closed, and when the process ends
        if not target.exists():
            make(target)
    return target
