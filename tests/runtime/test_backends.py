"""The session suite: what every backend promises, run over all of them on tiny graphs."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from edgekit.bundle.manifest import TensorSpec
from edgekit.errors import DeviceMissing, SessionFailed, UnknownDevice
from edgekit.runtime.backends import BACKENDS, Session, devices, open_session
from edgekit.runtime.backends.fake import FakeSession

onnx = pytest.importorskip("onnx")

INPUTS = (
    ("x", "float32", (1, "n")),
    ("at", "int64", (1, "n", 1)),
    ("scale", "float16", ()),
    ("past", "float32", (1, "slots")),
)
OUTPUTS = (("y", "float32", (1, "n")), ("half", "float16", ()), ("present", "float32", (1, "slots")))


def counting_graph(path: Path) -> Path:
    """`present` is `past` with `x` written at slots `at`; `y` is x plus slot 0 of that; `half` is scale + scale.

    As in a decoder, nothing reads `past` once `present` is written: the two may be one buffer.
    """
    node, tensor = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [
        node("Squeeze", ["at", "last"], ["flat"]),
        node("ScatterElements", ["past", "flat", "x"], ["present"], axis=1),
        node("Gather", ["present", "first"], ["held"], axis=1),
        node("Add", ["x", "held"], ["y"]),
        node("Add", ["scale", "scale"], ["half"]),
    ]
    types = {"float32": 1, "float16": 10, "int64": 7}
    graph = onnx.helper.make_graph(
        nodes,
        "counting",
        [tensor(name, types[dtype], shape) for name, dtype, shape in INPUTS],
        [tensor(name, types[dtype], shape) for name, dtype, shape in OUTPUTS],
        [onnx.numpy_helper.from_array(np.array([value]), name) for name, value in (("last", 2), ("first", 0))],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    return path


def counting(feeds):
    """The same in numpy."""
    present = feeds["past"].copy()
    np.put_along_axis(present, feeds["at"][..., 0], feeds["x"], axis=1)
    return {"y": feeds["x"] + present[:, :1], "half": feeds["scale"] * 2, "present": present}


def specs(table) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(*row) for row in table)


@pytest.fixture(params=["cpu", "fake", "fake-device"])
def session(request, tmp_path) -> Session:
    """ONNX Runtime on the CPU, the fake, and a fake whose buffers the host cannot address."""
    if request.param == "cpu":
        return open_session(counting_graph(tmp_path / "counting.onnx"), "cpu", threads=1)
    return FakeSession(counting, specs(INPUTS), specs(OUTPUTS), live=request.param == "fake")


def feeds(values: list[float], slots: list[int], scale: float = 0.5) -> dict[str, np.ndarray]:
    return {
        "x": np.array([values], np.float32),
        "at": np.array([slots])[..., None],
        "scale": np.array(scale, np.float16),
    }


def test_a_session_knows_its_signature(session):
    """Names, types and axes as the graph declares them."""
    assert session.inputs == specs(INPUTS)
    assert session.outputs == specs(OUTPUTS)


def test_a_run_gives_every_output(session):
    """Arrays in, arrays out, scalars and halves included."""
    past = np.arange(5, dtype=np.float32)[None]
    out = session.run({**feeds([10, 20], [4, 1]), "past": past})
    assert list(out) == ["y", "half", "present"]
    np.testing.assert_array_equal(out["y"], [[10, 20]])
    np.testing.assert_array_equal(out["present"], [[0, 20, 2, 3, 10]])
    assert (out["half"].dtype, out["half"].shape, float(out["half"])) == (np.float16, (), 1.0)


def test_a_shared_buffer_stays_in_place(session):
    """One buffer is past and present: it starts at zero, every run sees the last one's, and the others come out."""
    binding = session.bind()
    binding.share("past", "present", (1, 4), np.float32)
    np.testing.assert_array_equal(binding.read("past"), np.zeros((1, 4)))
    assert set(binding.run(feeds([1, 2], [0, 1]))) == {"y", "half"}
    np.testing.assert_array_equal(binding.run(feeds([5, 5], [2, 1]))["y"], [[6, 6]])
    np.testing.assert_array_equal(binding.read("past"), [[1, 5, 5, 0]])
    binding.write("past", np.array([[9, 8, 7, 6]], np.float32))
    np.testing.assert_array_equal(binding.run(feeds([0], [3]))["y"], [[9]])
    np.testing.assert_array_equal(binding.read("past"), [[9, 8, 7, 0]])


def test_a_live_view_is_the_buffer_itself(session):
    """Where a binding says it is live, writing to what `read` gave is writing to the buffer; elsewhere it is a copy."""
    binding = session.bind()
    binding.share("past", "present", (1, 4), np.float32)
    binding.read("past")[0, 0] = 7
    assert binding.run(feeds([1], [2]))["y"][0, 0] == (8 if binding.live else 1)


def test_a_kept_array_is_read_anew(session):
    """Feeding the same object again feeds its present content."""
    binding = session.bind()
    binding.share("past", "present", (1, 4), np.float32)
    kept = feeds([1], [0])
    assert binding.run(kept)["y"][0, 0] == 2
    kept["x"][0, 0], kept["at"][0, 0, 0], kept["scale"][...] = 30, 1, 4
    out = binding.run(kept)
    assert (out["y"][0, 0], out["half"]) == (31, 8)
    np.testing.assert_array_equal(binding.read("past"), [[1, 30, 0, 0]])


def test_results_of_earlier_runs_are_not_overwritten(session):
    """An output without a place of its own is fresh each time, whatever its shape was before."""
    binding = session.bind()
    binding.share("past", "present", (1, 4), np.float32)
    first = binding.run(feeds([1], [0]))["y"]
    second = binding.run(feeds([2], [1]))["y"]
    third = binding.run(feeds([3, 4], [2, 3]))["y"]
    assert (first.tolist(), second.tolist(), third.tolist()) == ([[2]], [[3]], [[4, 5]])


def test_an_output_lands_where_it_is_sent(session):
    """`into` is written in place, run after run, and can be taken back."""
    binding = session.bind()
    binding.share("past", "present", (1, 4), np.float32)
    place = np.zeros((1, 2), np.float32)
    for turn in range(3):
        out = binding.run(feeds([turn, 5], [0, 1]), {"y": place})
        assert out["y"] is place
    np.testing.assert_array_equal(place, [[4, 7]])
    np.testing.assert_array_equal(binding.run(feeds([0, 0], [2, 3]))["y"], [[2, 2]])
    np.testing.assert_array_equal(place, [[4, 7]])


def test_two_bindings_do_not_meet(session):
    """Each has buffers of its own."""
    one, two = session.bind(), session.bind()
    for binding, value in ((one, 1.0), (two, 2.0)):
        binding.share("past", "present", (1, 2), np.float32)
        binding.run(feeds([value], [0]))
    assert (one.read("past")[0, 0], two.read("past")[0, 0]) == (1, 2)


def test_an_array_that_is_not_contiguous_is_fed_all_the_same(session):
    """A strided view means its elements, not the memory it lies in, also when it changes."""
    binding = session.bind()
    binding.share("past", "present", (1, 4), np.float32)
    memory = np.arange(4, dtype=np.float32)[None]
    given = {**feeds([0, 0], [0, 1]), "x": memory[:, ::2]}
    np.testing.assert_array_equal(binding.run(given)["y"], [[0, 2]])
    memory[...] = 5
    np.testing.assert_array_equal(binding.run(given)["y"], [[10, 10]])


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": np.zeros((1, 1), np.float64)},
        {"x": np.zeros((2, 1), np.float32)},
        {"x": np.zeros(1, np.float32)},
    ],
)
def test_wrong_feeds_are_an_error_of_ours(session, wrong):
    """Type, size and rank: SessionFailed with the engine's words, and the session goes on working."""
    given = {**feeds([1], [0]), "past": np.zeros((1, 2), np.float32)}
    with pytest.raises(SessionFailed):
        session.run({**given, **wrong})
    assert session.run(given)["y"][0, 0] == 2


def test_a_missing_feed_is_an_error_of_ours(session):
    """Run or bound."""
    with pytest.raises(SessionFailed):
        session.run(feeds([1], [0]))
    with pytest.raises(SessionFailed):
        session.bind().run(feeds([1], [0]))


@pytest.mark.parametrize("device", ["gpu", "cpu:0", "cuda:", "cuda:x", "", "cpu "])
def test_device_names_are_exact(tmp_path, device):
    """A name that no backend has is refused before anything is loaded."""
    with pytest.raises(UnknownDevice):
        open_session(tmp_path / "absent.onnx", device)


@pytest.mark.parametrize("content", [None, b"", b"no graph"])
def test_a_graph_the_engine_refuses_is_an_error_of_ours(tmp_path, content):
    """Absent, empty or nonsense: SessionFailed, which names the file."""
    path = tmp_path / "bad.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SessionFailed, match=r"bad\.onnx on cpu failed"):
        open_session(path, "cpu")


def test_no_silent_cpu(tmp_path, monkeypatch):
    """A wheel that lists CUDA and a session that landed on the CPU: DeviceMissing, not a slow success."""
    import onnxruntime

    graph = counting_graph(tmp_path / "counting.onnx")
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(DeviceMissing, match=r"onnxruntime-gpu"):
            open_session(graph, "cuda")
    real = onnxruntime.InferenceSession

    def falls_back(path, options, providers, **rest):
        return real(path, options, providers=["CPUExecutionProvider"], **rest)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    monkeypatch.setattr(onnxruntime, "InferenceSession", falls_back)
    with pytest.raises(DeviceMissing, match=r"cuda:1 was asked for and ONNX Runtime gave CPUExecutionProvider"):
        open_session(graph, "cuda:1")


def test_two_wheels_are_one_too_many(tmp_path, monkeypatch):
    """Installed together they overwrite each other: named, with the way out."""
    monkeypatch.setattr(devices, "installed_wheels", lambda: {"onnxruntime": "1.32", "onnxruntime-gpu": "1.31"})
    with pytest.raises(DeviceMissing, match=r"onnxruntime and onnxruntime-gpu are both installed"):
        open_session(counting_graph(tmp_path / "counting.onnx"), "cpu")


def test_every_backend_of_the_table_is_there():
    """Each row names a module that opens sessions."""
    for module in set(BACKENDS.values()):
        assert callable(import_module(f"edgekit.runtime.backends.{module}").open_session)


@pytest.mark.parametrize("spinning", [True, False])
def test_waiting_threads_do_as_they_are_told(tmp_path, spinning):
    """The option reaches the engine, where a draft beside its target needs it off."""
    session = open_session(counting_graph(tmp_path / "counting.onnx"), "cpu", threads=2, spinning=spinning)
    entry = session._engine.get_session_options().get_session_config_entry("session.intra_op.allow_spinning")
    assert entry == str(int(spinning))
