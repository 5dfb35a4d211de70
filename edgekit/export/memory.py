"""How much memory this process has taken, and a hard cap on it."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from edgekit.errors import MemoryLimit

WATCH_SECONDS = 0.02


def peak_bytes() -> int:
    """The largest resident memory of this process so far.

    Linux counts it per address space in /proc; getrusage there also remembers the parent this process was forked from.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def memory_cap(limit: int | None) -> Iterator[None]:
    """Interrupt the block once this process has taken more than `limit` bytes; None is no limit.

    A watching thread raises SIGINT, so everything that cleans up after Ctrl-C cleans up after this too. Only the main
    thread can be interrupted: elsewhere the block is refused afterwards.

    Raises:
        MemoryLimit: the cap was exceeded.
    """
    if limit is None:
        yield
        return
    done, over = threading.Event(), threading.Event()
    main = threading.current_thread() is threading.main_thread()

    def watch() -> None:
        while not done.wait(WATCH_SECONDS):
            if peak_bytes() > limit:
                over.set()
                if main:
                    signal.raise_signal(signal.SIGINT)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        try:
            yield
        finally:
            done.set()
            watcher.join()  # the interrupt may arrive here as well, when the block is just done
    except KeyboardInterrupt:
        if not over.is_set():
            raise
    if over.is_set():
        raise MemoryLimit(
            f"the export took {peak_bytes() / 1e6:,.1f} MB, over --max-memory {limit / 1e6:,.1f} MB (nothing written)"
        )
