"""The child process: its cap, its end, its errors, and what a comparison refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgekit.bundle.manifest import TensorSpec
from edgekit.errors import BadSource, EdgekitError, MemoryLimit, ParityFailed, SessionFailed
from edgekit.export.families import PartJob
from edgekit.export.families.export import DiffusionOptions, export_diffusion
from edgekit.export.memory import peak_bytes
from edgekit.export.parity import LIMIT, Comparison, compare, difference, probe, save_references
from edgekit.export.sources import read_source
from edgekit.export.worker import Event, Task, run_task
from tests.export.diffusion.tiny_pipelines import FOREIGN

pytestmark = FOREIGN

MIB = 2**20
REPOSITORY = Path(__file__).parents[3]
DOUBLE = PartJob(
    part="double",
    network="edgekit.export.families.emoji_networks:Unfold",
    folder="",
    inputs=(TensorSpec("x", "float32", ("batch", 4)),),
    outputs=(TensorSpec("y", "float32", ("batch", 4)),),
    sizes={"batch": (2, 1)},
)


def doubling(path: Path, factor: float) -> Path:
    """A graph y = factor x."""
    x = onnx_ir.Value(name="x", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT), shape=onnx_ir.Shape(["batch", 4]))
    scale = onnx_ir.tensor(np.array(factor, np.float32), name="factor")
    constant = onnx_ir.node("Constant", [], {"value": scale})
    product = onnx_ir.node("Mul", [x, constant.outputs[0]])
    y = product.outputs[0]
    y.name, y.type, y.shape = "y", x.type, x.shape
    graph = onnx_ir.Graph([x], [y], nodes=[constant, product], opset_imports={"": 20}, name="double")
    onnx_ir.save(onnx_ir.Model(graph, ir_version=10), path)
    return path


def task(tmp_path: Path, **changes: Any) -> Task:
    """Compare DOUBLE, found in tmp_path."""
    here = str(tmp_path)
    given = {"kind": "compare", "jobs": (DOUBLE,), "source": here, "graphs": here, "references": here}
    return Task(**{**given, **changes})


def answers() -> dict[str, np.ndarray]:
    """What a module that doubles would say to every probe."""
    return {f"{number}.y": 2 * probe(DOUBLE, number)["x"] for number in range(DOUBLE.probes)}


def test_a_child_compares_and_reports(tmp_path: Path) -> None:
    """The comparison and the child's own peak memory come back as events."""
    doubling(tmp_path / "double.onnx", 2)
    save_references(tmp_path / "double.npz", answers())
    heard: list[Event] = []
    run_task(task(tmp_path), heard.append)
    (found,) = (event.comparison for event in heard if event.comparison is not None)
    assert found.error == 0
    assert found.gate().limit == LIMIT
    assert 20 * MIB < heard[-1].peak_bytes < 500 * MIB


@pytest.mark.parametrize(("factor", "error"), [(2 + 2e-5, 1e-5), (2 + 2e-3, 1e-3)])
def test_a_difference_is_measured_against_the_largest_value(tmp_path: Path, factor: float, error: float) -> None:
    """A graph that is off by a part in n is found to be; beyond the limit there is no bundle."""
    save_references(tmp_path / "double.npz", answers())
    found = compare(DOUBLE, doubling(tmp_path / "double.onnx", factor), tmp_path / "double.npz")
    assert found.error == pytest.approx(error, rel=0.02)
    if error > LIMIT:
        with pytest.raises(ParityFailed, match="double"):
            found.gate()


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_an_empty_reference_proves_nothing(value: float) -> None:
    """Zeros against zeros, or NaN against NaN, is refused as no comparison."""
    with pytest.raises(ParityFailed, match="nothing can be compared"):
        difference("part", np.full(3, value, np.float32), np.full(3, value, np.float32))


def test_an_answer_that_is_not_finite_or_of_another_shape_never_passes() -> None:
    """NaN compares with nothing, so it must count as infinitely far."""
    reference = np.ones(3, np.float32)
    for given_ in (np.array([1, np.nan, 1], np.float32), np.ones(4, np.float32)):
        assert difference("part", reference, given_) == float("inf")
    with pytest.raises(ParityFailed):
        Comparison("part", float("nan"), ()).gate()


@given(arrays(np.float32, 5, elements=st.floats(-1e3, 1e3, width=32)), st.floats(0.125, 1024, width=32))
def test_a_difference_does_not_depend_on_the_scale(x: np.ndarray, scale: float) -> None:
    """Both sides times anything: the same relative error."""
    reference = x + np.float32(1e3 + 1)
    once, scaled = (difference("p", k * reference, k * (reference + 1)) for k in (np.float32(1), np.float32(scale)))
    assert scaled == pytest.approx(once, rel=1e-2)


def test_probes_are_the_same_everywhere_and_differ(tmp_path: Path) -> None:
    """Inputs depend on part, input and probe alone, so that two processes need not exchange them."""
    one, again, other = probe(DOUBLE, 0)["x"], probe(DOUBLE, 0)["x"], probe(DOUBLE, 1)["x"]
    assert np.array_equal(one, again)
    assert one.shape == (2, 4)
    assert other.shape == (1, 4)
    assert not np.array_equal(one[:1], other)


def test_an_error_of_the_child_is_raised_by_its_class(tmp_path: Path) -> None:
    """What the child refuses is refused here, with its words and exit code."""
    (tmp_path / "double.onnx").write_bytes(b"nonsense")
    save_references(tmp_path / "double.npz", answers())
    with pytest.raises(SessionFailed, match=r"double\.onnx"):
        run_task(task(tmp_path), lambda _: None)


def test_a_defect_of_the_child_shows_its_last_words(tmp_path: Path) -> None:
    """An exception nobody planned for ends in an error with the traceback's tail, not in silence."""
    doubling(tmp_path / "double.onnx", 2)
    with pytest.raises(EdgekitError, match=r"FileNotFoundError[^$]*double\.npz"):
        run_task(task(tmp_path), lambda _: None)


def test_the_memory_cap_ends_the_child(tmp_path: Path) -> None:
    """Above --max-memory the child stops itself; the error says how much it took and what to do."""
    with pytest.raises(MemoryLimit, match="raise --max-memory"):
        run_task(task(tmp_path, kind="trace", max_memory=60 * MIB), lambda _: None)


def test_weights_above_the_cap_are_refused_before_loading(folders: dict[str, tuple[Any, Path]], tmp_path: Path) -> None:
    """What surely cannot fit is refused from the headers, with the amount that would."""
    with pytest.raises(MemoryLimit, match="weights alone"):
        export_diffusion(
            read_source(folders["lcm"][1]),
            tmp_path,
            options=DiffusionOptions(max_memory=1000),
            progress=lambda *_: None,
        )


def test_peak_memory_counts_this_process_alone() -> None:
    """A large array raises the peak by its size; a child does not inherit it."""
    before = peak_bytes()
    block = np.ones(200 * MIB // 8)
    assert peak_bytes() - before > 100 * MIB or before > block.nbytes
    code = "from edgekit.export.memory import peak_bytes; print(peak_bytes())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=REPOSITORY)
    assert int(child.stdout) < 150 * MIB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, waits on a FIFO")
def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    """Killing the exporting process leaves no child behind, even one that waits for ever."""
    doubling(tmp_path / "double.onnx", 2)
    os.mkfifo(tmp_path / "double.npz")  # opening it to read waits for a writer, who never comes
    (tmp_path / "task.json").write_bytes(msgspec.json.encode(task(tmp_path)))
    code = (
        "import msgspec, sys; from pathlib import Path; from edgekit.export.worker import Task, run_task;"
        "asked = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Task);"
        "run_task(asked, lambda event: print(event.part, flush=True))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "task.json")], stdout=subprocess.PIPE, cwd=REPOSITORY
    )
    assert parent.stdout is not None
    with parent.stdout:
        assert parent.stdout.readline().strip() == b"double"
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert children
    assert all(_gone(int(child)) for child in children)


def _gone(pid: int) -> bool:
    """Ended within ten seconds; a zombie that nobody has collected yet counts."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_folder_without_the_component_is_a_bad_source(tmp_path: Path) -> None:
    """The upscaler's builder refuses weights that do not fit its config, in the child."""
    (tmp_path / "upscaler").mkdir()
    (tmp_path / "upscaler" / "config.json").write_text("{}")
    job = PartJob("up", "edgekit.export.families.emoji_networks:load_upscaler", "upscaler", (), (), {})
    with pytest.raises(BadSource, match="upscaler"):
        run_task(task(tmp_path, kind="trace", jobs=(job,)), lambda _: None)
