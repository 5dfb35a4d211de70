"""Writing is all or nothing, whoever interrupts it; reading gives what was written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from edgekit.bundle.manifest import MANIFEST_FILE
from edgekit.bundle.store import Bundle, Draft, new_bundle, read_bundle, sha256_file
from edgekit.errors import BadManifest, BadRequest, BundleError, MissingFile, UnfedInput, UnsafePath
from tests.bundle import tiny

ROOT = Path(__file__).resolve().parents[2]


def hidden(folder: Path) -> list[str]:
    """Names a writer left behind."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def seal_after(target: Path, event: Callable[[Draft], object], *, overwrite: bool = False) -> None:
    """Write a language bundle; `event` happens when all is written but nothing sealed."""
    with new_bundle(target, overwrite=overwrite) as draft:
        manifest = tiny.text_draft(draft.root)
        event(draft)
        draft.seal(manifest)


def raise_(stop: type[BaseException]) -> None:
    """An exception as an expression."""
    raise stop


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """Manifest, paths and digest come back as they went in, and no trace of the writing stays."""
    sealed = tiny.write(tmp_path / "a.bundle", tiny.image_draft)
    bundle = read_bundle(tmp_path / "a.bundle")
    assert bundle.manifest == sealed
    assert [file.path for file in sealed.files] == sorted(file.path for file in sealed.files)
    assert bundle.graph("unet") == bundle.root / "graphs/unet.onnx"
    assert bundle.tokenizer() == bundle.path("tokenizer/tokenizer.json")
    assert bundle.digest == sha256_file(bundle.root / MANIFEST_FILE)
    assert hidden(tmp_path) == []


def test_both_dialects_are_read(text_bundle: Path) -> None:
    """A language bundle of either dialect opens."""
    assert read_bundle(text_bundle).manifest.decoding is not None


def test_equal_drafts_give_equal_bundles(tmp_path: Path) -> None:
    """Two exports of the same thing have the same digest: nothing of time or place goes into a bundle."""
    for name in ("a", "b"):
        tiny.write(tmp_path / name, tiny.image_draft)
    assert read_bundle(tmp_path / "a").digest == read_bundle(tmp_path / "b").digest


def test_the_bundle_itself_may_be_a_link(image_bundle: Path, tmp_path: Path) -> None:
    """A link to a bundle is a bundle; its root is the real folder."""
    (tmp_path / "link").symlink_to(image_bundle)
    assert read_bundle(tmp_path / "link").root == image_bundle.resolve()


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (lambda bundle: bundle.graph("transformer"), BadManifest),
        (lambda bundle: bundle.tokenizer("second"), BadManifest),
        (lambda bundle: bundle.path("../secret"), MissingFile),
    ],
)
def test_what_is_not_in_the_bundle_is_refused_by_name(
    image_bundle: Path, ask: Callable[[Bundle], object], error: type[BundleError]
) -> None:
    """Asking a bundle for a part, tokenizer or file it does not have says what it has."""
    with pytest.raises(error):
        ask(read_bundle(image_bundle))


def test_verify_false_skips_hashes_alone(image_bundle: Path, tmp_path: Path) -> None:
    """Without hashing, one flipped bit passes; a missing byte does not."""
    folder = tmp_path / "b"
    shutil.copytree(image_bundle, folder)
    data = folder / "graphs/unet.onnx.data"
    data.write_bytes(b"\xff" + data.read_bytes()[1:])
    assert read_bundle(folder, verify=False).manifest.parts
    with pytest.raises(BundleError):
        read_bundle(folder)


@pytest.mark.parametrize("what", ["nothing", "a device"])
def test_no_bundle_there(tmp_path: Path, what: str) -> None:
    """A path that leads nowhere, or to a device, is refused at once."""
    path, error = (tmp_path / "nowhere", MissingFile) if what == "nothing" else (Path(os.devnull), UnsafePath)
    with pytest.raises(error):
        read_bundle(path)


def test_an_existing_target_is_refused_before_the_work(image_bundle: Path, tmp_path: Path) -> None:
    """Without `overwrite` the block is never entered."""
    target = tmp_path / "b"
    shutil.copytree(image_bundle, target)
    with pytest.raises(BadRequest, match="exists"), new_bundle(target):
        pytest.fail("the block was entered")


def test_only_bundles_are_overwritten(tmp_path: Path) -> None:
    """`overwrite` never replaces a folder that is not a bundle, nor a file."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "file").write_text("mine")
    for name in ("photos", "file"):
        with pytest.raises(BadRequest, match="not a bundle"), new_bundle(tmp_path / name, overwrite=True):
            pytest.fail("the block was entered")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "photos"]


def test_overwriting_replaces_the_whole(image_bundle: Path, tmp_path: Path) -> None:
    """The new bundle stands where the old one stood, through a link too, and nothing of the old one stays."""
    target = tmp_path / "b"
    shutil.copytree(image_bundle, target)
    (tmp_path / "link").symlink_to(target)
    tiny.write(tmp_path / "link", tiny.text_draft, overwrite=True)
    assert read_bundle(target).manifest.task == "text-generation"
    assert not (target / "graphs/unet.onnx").exists()
    assert (tmp_path / "link").is_symlink()
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, OSError, AssertionError])
def test_any_exception_leaves_what_was_there(
    image_bundle: Path, tmp_path: Path, stop: type[BaseException], overwrite: bool
) -> None:
    """Ctrl-C or any error half-way leaves no draft, and the old bundle untouched."""
    target = tmp_path / "b"
    if overwrite:
        shutil.copytree(image_bundle, target)
    with pytest.raises(stop):
        seal_after(target, lambda _draft: raise_(stop), overwrite=overwrite)
    assert hidden(tmp_path) == []
    assert target.exists() == overwrite
    if overwrite:
        assert read_bundle(target).manifest.task == "text-to-image"


def test_a_draft_that_contradicts_its_manifest_is_not_sealed(tmp_path: Path) -> None:
    """`seal` reads back as a stranger would: a part that the recipe forgets is refused and nothing appears."""
    stage = msgspec.structs.replace(tiny.image_recipe().stages[0], decode=None)
    forgetful = msgspec.structs.replace(tiny.image_recipe(), stages=(stage,))
    with pytest.raises(UnfedInput, match="nothing runs"):
        tiny.write(tmp_path / "b", lambda root: msgspec.structs.replace(tiny.image_draft(root), recipe=forgetful))
    assert list(tmp_path.iterdir()) == []


def test_a_draft_holds_no_links(tmp_path: Path) -> None:
    """A link among the files is refused at the seal, with the way out named."""
    with pytest.raises(UnsafePath, match="copy"):
        seal_after(tmp_path / "b", lambda draft: (draft.root / "extra").symlink_to("/etc/hostname"))
    assert list(tmp_path.iterdir()) == []


def test_an_unsealed_draft_is_our_own_mistake(tmp_path: Path) -> None:
    """Code that forgets to seal is told so, and its draft is gone."""
    with pytest.raises(AssertionError, match="sealed"), new_bundle(tmp_path / "b"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_appears_meanwhile_is_kept(image_bundle: Path, tmp_path: Path) -> None:
    """Two exports to one name: the second to finish is refused, the first stands."""
    target = tmp_path / "b"
    with pytest.raises(BadRequest, match="exists"):
        seal_after(target, lambda _draft: shutil.copytree(image_bundle, target))
    assert read_bundle(target).manifest.task == "text-to-image"


def test_a_failed_swap_puts_the_old_bundle_back(
    image_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the second rename fails, the first is undone."""
    target = tmp_path / "b"
    shutil.copytree(image_bundle, target)
    rename = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if to == target and self.suffix == ".edgekit-draft":
            raise OSError("disk on fire")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="fire"):
        tiny.write(target, tiny.text_draft, overwrite=True)
    assert read_bundle(target).manifest.task == "text-to-image"
    assert hidden(tmp_path) == []


# A writer that stops for good at one point of its work, says so, and waits to be killed.
WRITER = """
import sys, time
from pathlib import Path
from edgekit.bundle import files, store
from tests.bundle import tiny

target, point = Path(sys.argv[1]), sys.argv[2]

def stop(*_):
    print("reached", flush=True)
    time.sleep(60)

def rename_then_stop(self, to, rename=Path.rename):
    moved = rename(self, to)
    if Path(to).suffix == ".edgekit-old":
        stop()
    return moved

with store.new_bundle(target, overwrite=True) as draft:
    if point == "empty draft":
        stop()
    manifest = tiny.text_draft(draft.root)
    if point == "unsealed":
        stop()
    if point == "unverified":
        store.read_folder = stop
    if point == "verified":
        store.move_into_place = stop
    if point == "swapping":
        Path.rename = rename_then_stop
    draft.seal(manifest)
"""


POINTS = ["empty draft", "unsealed", "unverified", "verified"]


def come_and_go(target: Path) -> None:
    """Another writer of the same bundle, who gives up."""
    with suppress(KeyboardInterrupt), new_bundle(target, overwrite=True):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("point", "old"), [*((point, old) for point in POINTS for old in (False, True)), ("swapping", True)]
)
def test_a_killed_writer_leaves_no_bundle(image_bundle: Path, tmp_path: Path, point: str, old: bool) -> None:
    """SIGKILL at any point leaves the old bundle or none, never half of one; a living writer is let alone."""
    target = tmp_path / "b"
    if old:
        shutil.copytree(image_bundle, target)
    command = [sys.executable, "-c", WRITER, str(target), point]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"reached\n"
        drafts = hidden(tmp_path)
        assert drafts
        come_and_go(target)
        assert hidden(tmp_path) == drafts
        writer.kill()
    assert target.exists() == (old and point != "swapping")
    come_and_go(target)
    assert hidden(tmp_path) == []
    assert target.exists() == old
    if old:
        assert read_bundle(target).manifest.task == "text-to-image"
    tiny.write(target, tiny.text_draft, overwrite=True)
    assert read_bundle(target).manifest.task == "text-generation"
