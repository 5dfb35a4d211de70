"""The hard memory cap: it ends what goes over it, leaves alone what does not, and gives signals back as they were."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekit.errors import MemoryLimit
from edgekit.export import memory
from edgekit.export.memory import memory_cap, peak_bytes

ROOT = Path(__file__).resolve().parents[2]
LONG = 10**7  # rounds of a loop that is always interrupted before its end


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the memory that this process has taken, as the watching thread sees it."""
    monkeypatch.setattr(memory, "WATCH_SECONDS", 0.001)
    now = [0]
    monkeypatch.setattr(memory, "peak_bytes", lambda: now[0])
    return lambda value: now.__setitem__(0, value)


def work() -> None:
    """Python that runs until it is interrupted."""
    for _ in range(LONG):
        threading.Event().wait(0.0005)


def test_going_over_the_cap_ends_the_block(taken: Callable[[int], None]) -> None:
    """MemoryLimit with both figures, what the block cleans up is cleaned up, and Ctrl-C means Ctrl-C again."""
    before, cleaned, threads = signal.getsignal(signal.SIGINT), [], threading.active_count()

    def block() -> None:
        try:
            taken(2_000_000)
            work()
        finally:
            cleaned.append(True)

    with pytest.raises(MemoryLimit, match=r"2\.0 MB, over --max-memory 1\.0 MB"), memory_cap(1_000_000):
        block()
    assert cleaned == [True]
    assert signal.getsignal(signal.SIGINT) is before
    assert threading.active_count() == threads
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_below_the_cap_nothing_happens(taken: Callable[[int], None]) -> None:
    """Exactly the cap is allowed; the watching thread is gone afterwards."""
    threads = threading.active_count()
    with memory_cap(1_000_000):
        taken(1_000_000)
        threading.Event().wait(0.02)
    assert threading.active_count() == threads


@pytest.mark.parametrize("limit", [None, 10**15])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_the_blocks_own_errors_pass_through(limit: int | None, error: type[BaseException]) -> None:
    """A real Ctrl-C is no memory limit, nor is any other exception."""
    with pytest.raises(error), memory_cap(limit):
        raise error


def test_an_error_caused_by_the_interrupt_is_still_shown(taken: Callable[[int], None]) -> None:
    """A block that turns the interrupt into an error of its own keeps it: nothing is hidden."""

    def block() -> None:
        try:
            taken(2)
            work()
        except KeyboardInterrupt as why:
            raise RuntimeError("gave up") from why

    with pytest.raises(RuntimeError, match="gave up"), memory_cap(1):
        block()


def test_a_block_that_ends_as_the_cap_is_passed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt may find the block already done: MemoryLimit all the same, never a bare KeyboardInterrupt."""
    looking, ended = threading.Event(), threading.Event()

    def late() -> int:
        looking.set()
        ended.wait(5)
        threading.Event().wait(0.02)  # by now the block has been left
        return 2

    monkeypatch.setattr(memory, "peak_bytes", late)
    with pytest.raises(MemoryLimit), memory_cap(1):
        ended.set() if looking.wait(5) else pytest.fail("nobody watches")


def test_another_thread_is_refused_afterwards(taken: Callable[[int], None]) -> None:
    """Off the main thread nobody can be interrupted: the block ends and is then refused; the main thread is let be."""
    caught: list[BaseException] = []

    def block() -> None:
        try:
            with memory_cap(1):
                taken(2)
                threading.Event().wait(0.05)
                caught.append(ValueError("it ran to its end"))
        except MemoryLimit as why:
            caught.append(why)

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert [type(error) for error in caught] == [ValueError, MemoryLimit]


def test_where_interrupts_are_ignored_the_block_is_refused_afterwards(taken: Callable[[int], None]) -> None:
    """A shell's background job ignores SIGINT: the cap still refuses what the block made."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        taken(2)
        with pytest.raises(MemoryLimit), memory_cap(1):
            threading.Event().wait(0.05)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_peak_counts_what_was_touched() -> None:
    """Memory written to raises the peak by about its size, and giving it back does not lower it."""
    script = (
        "import numpy as np\nfrom edgekit.export.memory import peak_bytes\n"
        "a = peak_bytes()\nx = np.ones(2**26, np.uint8)\nb = peak_bytes()\ndel x\nprint(b - a, peak_bytes() - b)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    grown, after = map(int, out.split())
    assert 0.9 * 2**26 < grown < 1.2 * 2**26
    assert after > -(2**20)  # the kernel counts a few pages late


def test_really_taking_too_much_is_caught() -> None:
    """With real memory and the real thread: a block that goes on taking is ended soon after 16 MB more than now."""
    kept: list[np.ndarray] = []

    def block() -> None:
        while len(kept) < 600:
            kept.append(np.ones(2**20, np.uint8))
            threading.Event().wait(0.001)

    with pytest.raises(MemoryLimit), memory_cap(peak_bytes() + 2**24):
        block()
    assert len(kept) < 600
