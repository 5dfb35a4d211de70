"""A command on a pseudo-terminal, as a person sees it: what it draws, and Ctrl-C typed at a chosen moment."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.cli.conftest import ROOT, command

CTRL_C = b"\x03"
LIMIT = 90.0  # seconds until a command that does not end is given up


class Terminal:
    """`edgekit ARGS` on a terminal of its own; its stderr is the screen, its stdout the screen or a file."""

    def __init__(self, args: Sequence[object], *, stdout: Path | None = None) -> None:
        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
        with contextlib.ExitStack() as files:
            out = theirs if stdout is None else files.enter_context(stdout.open("wb"))
            self.process = subprocess.Popen(
                command(*args),
                stdin=theirs,
                stdout=out,
                stderr=theirs,
                env=environment,
                start_new_session=True,
                preexec_fn=_own_the_terminal,
            )
        os.close(theirs)
        self.screen = ""

    def read_until(self, seen: Callable[[], bool]) -> None:
        """Read what is drawn until something has happened, or the command has ended."""
        end = time.monotonic() + LIMIT
        while not seen():
            assert time.monotonic() < end, f"nothing happened; the screen shows {self.screen!r}"
            if select.select([self._ours], [], [], 0.01)[0] and not self._read():
                return

    def press(self, keys: bytes) -> None:
        """Type; Ctrl-C reaches the command as the terminal's own signal."""
        os.write(self._ours, keys)

    def finish(self) -> int:
        """Read to the end; the exit code."""
        try:
            self.read_until(lambda: False)
            return self.process.wait(LIMIT)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self._ours)

    def _read(self) -> bool:
        try:
            piece = os.read(self._ours, 65536)
        except OSError:  # Linux says EIO when the other side is closed
            return False
        self.screen += piece.decode("utf-8", "replace")
        return bool(piece)


def _own_the_terminal() -> None:
    """Make standard input the controlling terminal of the new session, so that Ctrl-C is a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
