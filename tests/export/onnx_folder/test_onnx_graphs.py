"""Graph files as people have them: found, and refused before anything is loaded, with what to do about it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgekit.errors import BadSource, UnsupportedModel
from edgekit.export.onnx_folder.graphs import find_graph, graph_names
from tests.bundle.tiny import model
from tests.export.onnx_folder.folders import FOLDERS, edit

X, Y = ("x", "float32", ("batch", 4)), ("y", "float32", ("batch", 4))
WEIGHTS = {"w": np.linspace(-1, 1, 4 * 4, dtype=np.float32).reshape(4, 4)}


def product(opset: int = 18, kind: str = "MatMul", domain: str = "") -> onnx.ModelProto:
    """y = x @ w, or another operator in its place."""
    made = model([helper.make_node(kind, ["x", "w"], ["y"], domain=domain)], [X], [Y], WEIGHTS, opset)
    if domain:
        made.opset_import.append(helper.make_opsetid(domain, 1))
    return made


def saved(folder: Path, made: onnx.ModelProto, name: str = "model.onnx", data: str | None = None) -> Path:
    """The graph's folder, its weights in a file of their own where that has a name."""
    folder.mkdir(exist_ok=True)
    options = {"save_as_external_data": True, "location": data, "size_threshold": 0} if data else {}
    onnx.save(made, folder / name, **options)
    return folder


def test_a_graph_is_found_with_its_signature_and_bytes(tmp_path: Path) -> None:
    """One file of any name, or model.onnx among several; its weights count, wherever they lie."""
    found = find_graph(saved(tmp_path / "one", product(), "decoder.onnx"), "ort")
    assert (found.path.name, found.bytes) == ("decoder.onnx", found.path.stat().st_size)
    assert found.input("x") is not None
    assert found.input("y") is None
    assert found.output("y") is not None
    folder = saved(saved(tmp_path / "more", product(), "model_q4.onnx"), product(), data="model.onnx_data")
    found = find_graph(folder, "ort")
    assert found.path.name == "model.onnx"
    assert found.bytes == found.path.stat().st_size + 4 * 16
    assert graph_names(folder) == ("model.onnx", "model_q4.onnx")
    assert graph_names(tmp_path / "nowhere") == ()


def test_a_hub_snapshot_of_links_is_read_where_the_links_are(tmp_path: Path) -> None:
    """The hub's cache keeps graph and data under other names: the data is looked for beside the link."""
    folder = saved(tmp_path / "real", product(), data="model.onnx_data")
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    snapshot.mkdir()
    blobs.mkdir()
    for number, name in enumerate(("model.onnx", "model.onnx_data")):
        shutil.move(folder / name, blobs / str(number))
        (snapshot / name).symlink_to(blobs / str(number))
    assert find_graph(snapshot, "ort").bytes > 4 * 16


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), "holds no .*download complete"),
        (("decoder_model.onnx", "decoder_with_past_model.onnx"), "decoder in two halves.*optimum-cli export onnx"),
        (("model_fp16.onnx", "model_q4.onnx"), "no model.onnx.*leave one file"),
    ],
)
def test_no_graph_and_several_are_refused(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    """The message names what is there and says how to get one graph per part."""
    for name in names:
        saved(tmp_path, product(), name)
    with pytest.raises(BadSource, match=words) as caught:
        find_graph(tmp_path, "ort")
    assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize("spoil", [lambda raw: raw[: len(raw) // 2], lambda raw: b"", lambda raw: b"<html>" + raw])
def test_a_broken_file_is_a_bad_source(tmp_path: Path, spoil) -> None:
    """A truncated download, an empty file and an error page saved as a graph: one clear error."""
    folder = saved(tmp_path, product())
    file = folder / "model.onnx"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(BadSource, match=r"model\.onnx.*download complete"):
        find_graph(folder, "ort")


@pytest.mark.parametrize("opset", [9, 10, 27])
def test_an_opset_outside_the_range_is_refused(tmp_path: Path, opset: int) -> None:
    """Older ones resize otherwise, newer ones nothing here knows; the message says both ends of the range."""
    with pytest.raises(UnsupportedModel, match=rf"opset {opset}; 11 to 26 .*--opset 18"):
        find_graph(saved(tmp_path, product(opset)), "ort")


@pytest.mark.parametrize(
    ("domain", "dialect", "fine"),
    [
        ("com.microsoft", "ort", True),
        ("com.microsoft", "std", False),
        ("ai.onnx.contrib", "ort", False),
        ("my.own", "std", False),
    ],
)
def test_operators_are_those_of_the_device(tmp_path: Path, domain: str, dialect: str, fine: bool) -> None:
    """ONNX Runtime's own run there and nowhere else; nobody else's are run at all."""
    folder = saved(tmp_path, product(kind="Special", domain=domain))
    if fine:
        assert find_graph(folder, dialect).file.operators == {"com.microsoft::Special"}
        return
    with pytest.raises(UnsupportedModel, match=f"{domain}::Special"):
        find_graph(folder, dialect)


def test_a_graph_that_draws_noise_is_refused(tmp_path: Path) -> None:
    """An encoder that samples inside answers differently every time; the message says which export does not."""
    noise = helper.make_node("RandomNormalLike", ["x"], ["y"])
    with pytest.raises(UnsupportedModel, match=r"RandomNormalLike.*latent_parameters"):
        find_graph(saved(tmp_path, model([noise], [X], [Y], {}, 18)), "ort")


@pytest.mark.parametrize("location", ["../model.onnx_data", "data/w", "c:w", "..", "model\\w"])
def test_data_elsewhere_is_refused(tmp_path: Path, location: str) -> None:
    """Weights lie beside their graph; a graph from the net does not choose what else is read."""
    folder = saved(tmp_path, product(), data="model.onnx_data")

    def move(made: onnx.ModelProto) -> None:
        tensor = made.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        del tensor.external_data[:]
        tensor.external_data.add(key="location", value=location)

    edit(folder / "model.onnx", move)
    with pytest.raises(BadSource, match="data lies beside its graph"):
        find_graph(folder, "ort")


def test_data_that_is_missing_or_short_is_named(tmp_path: Path) -> None:
    """A download without its .onnx_data, or with half of it."""
    folder = saved(tmp_path, product(), data="model.onnx_data")
    data = folder / "model.onnx_data"
    data.write_bytes(data.read_bytes()[:10])
    with pytest.raises(BadSource, match=r"model\.onnx_data has 10 bytes where the graph reads 64"):
        find_graph(folder, "ort")
    data.unlink()
    with pytest.raises(BadSource, match=r"model\.onnx_data is missing"):
        find_graph(folder, "ort")


@pytest.mark.parametrize("part", ["lcm/unet", "sdxl-turbo/text_encoder_2", "llama"])
def test_what_optimum_wrote_passes(part: str) -> None:
    """Its graphs are standard operators alone, so they go to either kind of engine."""
    for dialect in ("ort", "std"):
        assert find_graph(FOLDERS / part, dialect).bytes > 10_000
