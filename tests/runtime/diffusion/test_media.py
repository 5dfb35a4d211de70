"""Files of every kind: what is written reads back, and an ending nobody can write is refused by name."""

from __future__ import annotations

import json
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekit.errors import BadRequest, MissingPackage
from edgekit.runtime.diffusion import media
from edgekit.runtime.diffusion.image import read_png_metadata

TOLD = {"prompt": "a red äpple", "seed": 3}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (17, 24, 3), dtype=np.uint8))
FRAMES = [Image.new("RGB", (16, 10), (60 * k, 200 - 50 * k, 30)) for k in range(4)]


@pytest.mark.parametrize("ending", [".png", ".webp", ".PNG"])
def test_a_lossless_picture_reads_back(tmp_path: Path, ending: str) -> None:
    """Every pixel of a PNG or WebP comes back."""
    path = tmp_path / f"a{ending}"
    media.save_picture(PICTURE, path, TOLD)
    with Image.open(path) as back:
        assert np.array_equal(np.asarray(back.convert("RGB")), np.asarray(PICTURE))


def test_metadata_is_in_every_format(tmp_path: Path) -> None:
    """PNG has it in its chunk; JPEG and WebP in the EXIF comment, as ASCII JSON."""
    for ending in (".png", ".webp", ".jpg"):
        media.save_picture(PICTURE, tmp_path / f"a{ending}", TOLD)
    assert read_png_metadata(tmp_path / "a.png") == TOLD
    for ending in (".webp", ".jpg"):
        with Image.open(tmp_path / f"a{ending}") as image:
            comment = image.getexif()[0x9286]
        assert json.loads(comment if isinstance(comment, str) else bytes(comment)) == TOLD


@pytest.mark.parametrize("ending", [".gif", ".webp", ".png"])
def test_a_video_has_its_frames_and_its_rate(tmp_path: Path, ending: str) -> None:
    """Four frames at eight a second: four frames of 125 ms (GIF counts hundredths)."""
    path = tmp_path / f"v{ending}"
    media.save_video(FRAMES, 8, path, TOLD)
    with Image.open(path) as video:
        assert video.n_frames == 4
        for number, frame in enumerate(FRAMES):
            video.seek(number)
            shown = np.asarray(video.convert("RGB")).astype(int)
            assert np.abs(shown - np.asarray(frame)).max() <= (0 if ending != ".gif" else 8)
            assert abs(video.info["duration"] - 125) <= 5


def test_mp4_is_written_by_pyav(tmp_path: Path) -> None:
    """H.264 at the rate asked for, an odd side cut to an even one, colours as they were but for compression."""
    av = pytest.importorskip("av")
    frames = [frame.resize((65, 40)) for frame in FRAMES]
    media.save_video(frames, 8, tmp_path / "v.mp4", TOLD)
    with av.open(str(tmp_path / "v.mp4")) as container:
        stream = container.streams.video[0]
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 8)
    assert len(shown) == 4
    for given, back in zip(frames, shown, strict=True):
        assert back.shape == (40, 64, 3)
        assert np.abs(back.astype(int).mean((0, 1)) - np.asarray(given).mean((0, 1))).max() < 8


def test_mp4_without_pyav_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named, and so is the way without it; no file appears."""
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingPackage, match=r"edgekit\[video\].*gif"):
        media.save_video(FRAMES, 8, tmp_path / "v.mp4", TOLD)
    assert not list(tmp_path.iterdir())


def test_sound_reads_back(tmp_path: Path) -> None:
    """Two channels at 16 kHz in 16 bits: within half a step, and what is too loud is bounded."""
    sound = np.stack([np.sin(np.arange(1600) / 9), np.linspace(-2, 2, 1600)]).astype(np.float32)
    media.save_audio(sound, 16000, tmp_path / "a.wav", TOLD)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 16000, 1600)
        back = np.frombuffer(file.readframes(1600), "<i2").reshape(1600, 2).T / 32767
    assert np.abs(back - np.clip(sound, -1, 1)).max() <= 0.6 / 32767


def test_an_array_reads_back(tmp_path: Path) -> None:
    """Numbers and dtype of a .npy file are the array's."""
    array = np.arange(6, dtype=np.int64).reshape(2, 3)
    media.save_array(array, tmp_path / "a.npy")
    back = np.load(tmp_path / "a.npy", allow_pickle=False)
    assert back.dtype == array.dtype
    assert np.array_equal(back, array)


def test_another_ending_is_refused_with_those_there_are(tmp_path: Path) -> None:
    """Each kind of result names its own endings, and nothing is written."""
    with pytest.raises(BadRequest, match=r"a picture is written as \.png"):
        media.save_picture(PICTURE, tmp_path / "a.gif", TOLD)
    with pytest.raises(BadRequest, match=r"\.mp4"):
        media.save_video(FRAMES, 8, tmp_path / "a.jpg", TOLD)
    with pytest.raises(BadRequest, match=r"\.wav"):
        media.save_audio(np.zeros((1, 4), np.float32), 8000, tmp_path / "a.mp3", TOLD)
    with pytest.raises(BadRequest, match=r"\.npy"):
        media.save_array(np.zeros(3), tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("count", "columns", "size"), [(1, None, (24, 17)), (4, None, (50, 36)), (5, 5, (128, 17))])
def test_a_contact_sheet_is_as_square_as_it_goes(count: int, columns: int | None, size: tuple[int, int]) -> None:
    """Pictures stand row by row with two pixels between them, each unchanged in its place."""
    sheet = media.grid([PICTURE] * count, columns)
    assert sheet.size == size
    last = count - 1
    across = columns or int(np.ceil(np.sqrt(count)))
    row, column = divmod(last, across)
    box = (column * 26, row * 19, column * 26 + 24, row * 19 + 17)
    assert np.array_equal(np.asarray(sheet.crop(box)), np.asarray(PICTURE))
