"""The child process of an export: `python -m edgekit.export.worker`, a task as JSON on stdin, events as JSON lines out.

An export's memory is one part's because every part is traced in a process of its own, which gives all of it back; and
torch's own words go to a log, not to the user's terminal. This module is both ends of that line.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Literal

import msgspec

from edgekit import errors
from edgekit.errors import EdgekitError, MemoryLimit
from edgekit.export.families import PartJob
from edgekit.export.memory import peak_bytes
from edgekit.export.parity import Comparison

WATCH_SECONDS = 0.05
LOG_LINES = 15
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


class Lora(msgspec.Struct, frozen=True):
    """A LoRA file to fold, at a scale."""

    path: str
    scale: float = 1.0


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a child does: trace parts and save torch's answers, or compare finished graphs with those answers."""

    kind: Literal["trace", "compare"]
    jobs: tuple[PartJob, ...]
    source: str
    graphs: str
    references: str
    attention: Literal["ort", "std"] = "ort"
    loras: tuple[Lora, ...] = ()
    max_memory: int | None = None


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line from a child: where it is, what it found, or why it ended; its peak memory up to then."""

    part: str = ""
    stage: str = ""
    comparison: Comparison | None = None
    peak_bytes: int = 0
    error: str = ""
    message: str = ""


def run_task(task: Task, listen: Callable[[Event], None]) -> None:
    """Run a task in a child process, passing its events on; the child never outlives this call.

    Raises:
        EdgekitError: the child's own error, by its class; MemoryLimit also where the system killed it for memory.
    """
    with tempfile.TemporaryFile() as log, _child(log) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(msgspec.json.encode(task))
            child.stdin.close()
        failed: Event | None = None
        for line in child.stdout:
            event = msgspec.json.decode(line, type=Event)
            failed = event if event.error else failed
            listen(event)
        status = child.wait()
        if failed is not None:
            kind = getattr(errors, failed.error, EdgekitError)
            raise kind(failed.message if kind is not EdgekitError else f"{failed.message}\n{_tail(log)}")
        if status in (-9, 137):
            raise MemoryLimit(
                f"the system killed the process that exports {_names(task)}, as it does when memory runs out; close "
                f"other programs or use a machine with more"
            )
        if status != 0:
            raise EdgekitError(f"the process that exports {_names(task)} ended with status {status}:\n{_tail(log)}")


@contextlib.contextmanager
def _child(log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    package = str(Path(errors.__file__).parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    child = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env={**os.environ, **OFFLINE, "PYTHONPATH": path},
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()


def _names(task: Task) -> str:
    return ", ".join(job.part for job in task.jobs)


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    return "\n".join(log.read().decode(errors="replace").splitlines()[-LOG_LINES:])


def _watch(task: Task, tell: Callable[[Event], None]) -> None:
    """End this process when its parent is gone or its memory is above the cap; a thread of the child."""
    parent = os.getppid()
    while os.getppid() == parent:
        used = peak_bytes() if task.max_memory is not None else 0
        if task.max_memory is not None and used > task.max_memory:
            text = (
                f"exporting {_names(task)} took {used / 2**30:.2f} GiB, over the cap of {task.max_memory / 2**30:.2f}; "
                f"raise --max-memory (see --dry-run for what is needed)"
            )
            tell(Event(error="MemoryLimit", message=text, peak_bytes=used))
            os._exit(MemoryLimit.exit_code)
        time.sleep(WATCH_SECONDS)
    os._exit(1)


def main() -> int:
    """Read a task, do it, say how it went; whatever else is printed goes to the log."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    lock = threading.Lock()

    def tell(event: Event) -> None:
        with lock:
            out.write(msgspec.json.encode(event) + b"\n")

    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    threading.Thread(target=_watch, args=(task, tell), daemon=True).start()
    try:
        _do(task, tell)
    except EdgekitError as why:
        tell(Event(error=type(why).__name__, message=str(why)))
        return why.exit_code
    except MemoryError as why:
        tell(Event(error="MemoryLimit", message=f"{_names(task)}: {why or 'out of memory'}"))
        return MemoryLimit.exit_code
    tell(Event(peak_bytes=peak_bytes()))
    return 0


def _do(task: Task, tell: Callable[[Event], None]) -> None:
    if task.kind == "compare":
        from edgekit.export.parity import compare

        for job in task.jobs:
            tell(Event(job.part, "compare"))
            graph, references = Path(task.graphs) / f"{job.part}.onnx", Path(task.references) / f"{job.part}.npz"
            tell(Event(job.part, comparison=compare(job, graph, references), peak_bytes=peak_bytes()))
        return
    from edgekit.export.trace import trace

    for job in task.jobs:
        trace(job, task, lambda stage, part=job.part: tell(Event(part, stage, peak_bytes=peak_bytes())))  # type: ignore[misc]


if __name__ == "__main__":
    sys.exit(main())
