"""Folders of images as people have them: numbered, cluttered, damaged, of all modes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepenc.errors import VictimError
from deepenc.victims.data.images import class_folders, opened


def folders(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(root / name / "0.png")
    return root


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["0", "1", "2", "10", "11"], ["0", "1", "2", "10", "11"]),
        (["2", "010", "9"], ["2", "9", "010"]),
        (["cow", "ant", "Bee"], ["Bee", "ant", "cow"]),
        (["class02", "class10", "class01"], ["class01", "class02", "class10"]),
        (["02 a", "01 b"], ["01 b", "02 a"]),
    ],
)
def test_the_order_of_classes(tmp_path: Path, names: list[str], order: list[str]) -> None:
    found = class_folders(folders(tmp_path, *reversed(names)))
    assert list(found) == order
    assert found == {name: [tmp_path / name / "0.png"] for name in order}


def test_an_order_that_is_not_that_of_imagefolder_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class_folders(folders(tmp_path / "few", "0", "1", "2"))
    assert not caplog.text
    class_folders(folders(tmp_path / "many", "0", "2", "10"))
    assert "order of the folders' numbers" in caplog.text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["class1", "class2", "class10"], "'class10' comes where by the numbers 'class2' would; write all"),
        (["2", "10", "other"], "'10' comes where by the numbers '2' would"),
        (["1", "01", "2"], "two class folders in .* have the number 1"),
    ],
)
def test_an_order_that_is_not_clear_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(VictimError, match=message):
        class_folders(folders(tmp_path, *names))


def test_what_systems_leave_behind_is_no_class_and_no_image(tmp_path: Path) -> None:
    folders(tmp_path, "cat", "dog")
    expected = class_folders(tmp_path)
    for name in (".ipynb_checkpoints", "__MACOSX", "cat/.ipynb_checkpoints", "dog/@eaDir"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"x")
    for name in (".DS_Store", "cat/.DS_Store", "cat/._0.png", "cat/Thumbs.db", "notes.txt"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    assert class_folders(tmp_path) == expected


def test_images_deeper_in_a_class_folder_and_behind_links(tmp_path: Path) -> None:
    folders(tmp_path / "elsewhere", "x")
    folders(tmp_path / "images", "cat/young", "dog")
    (tmp_path / "images" / "dog" / "linked").symlink_to(tmp_path / "elsewhere" / "x")
    names = [path.relative_to(tmp_path).as_posix() for path in class_folders(tmp_path / "images")["dog"]]
    assert names == ["images/dog/0.png", "images/dog/linked/0.png"]


def test_folders_that_are_no_class_folders(tmp_path: Path) -> None:
    with pytest.raises(VictimError, match="has no class folders; expected one folder of images a class"):
        class_folders(tmp_path)
    with pytest.raises(VictimError, match=r"no folder with one folder of images a class at .*gone"):
        class_folders(tmp_path / "gone")
    folders(tmp_path, "cat", "dog")
    (tmp_path / "backup").mkdir()
    with pytest.raises(VictimError, match=r"no images in .*backup; remove that folder, or put images"):
        class_folders(tmp_path)


RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "CMYK", "P", "palette with transparency"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_every_mode_is_what_is_seen(tmp_path: Path, mode: str, suffix: str) -> None:
    """Against the image as it was before it was saved."""
    if (mode == "CMYK" and suffix == "png") or (mode.startswith("palette") and suffix == "tif"):
        pytest.skip("the format has no such mode")
    image = Image.fromarray(PIXELS)
    expected = image.convert("L").convert("RGB") if mode in ("L", "LA") else image
    path = tmp_path / f"image.{suffix}"
    if mode.startswith("palette"):
        image.quantize(4).save(path, transparency=b"\0\x80\xff\xff")
        expected = image.quantize(4).convert("RGB")
    else:
        image.convert(mode).save(path)
        expected = (
            expected if mode in ("RGB", "RGBA", "L", "LA", "CMYK") else image.convert(mode).convert("RGB")
        )
    found = opened(path)
    assert found.mode == "RGB"
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_grey_images_of_16_bits_are_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 255, 256, 300], [1000, 32768, 65279, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"grey.{suffix}")
    found = np.asarray(opened(tmp_path / f"grey.{suffix}"))
    assert found.shape == (2, 4, 3)
    assert (found == (values // 256)[..., None]).all()


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_of_no_known_range_are_refused(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.arange(6, dtype=dtype).reshape(2, 3)).save(tmp_path / "x.tif")
    with pytest.raises(VictimError, match=r"x\.tif is not a readable image .* no known range"):
        opened(tmp_path / "x.tif")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """Nothing waits: a pipe that nobody writes to would never answer."""
    whole = tmp_path / "whole.png"
    Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(whole)
    data = whole.read_bytes()
    made = {
        "empty": b"", "text": b"no image", "cut": data[: len(data) // 2], "pointer": b"version https://git-lfs",
    }  # fmt: skip
    for name, held in made.items():
        (tmp_path / f"{name}.png").write_bytes(held)
    Image.new("1", (14_000, 14_000)).save(tmp_path / "large.png")
    (tmp_path / "link.png").symlink_to("gone.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    told = {}
    for name in (*made, "large", "link", "loop", "folder", "pipe", "device", "missing"):
        with pytest.raises(VictimError, match=rf"{name}\.png is ") as caught:
            opened(tmp_path / f"{name}.png")
        told[name] = str(caught.value)
    assert "DecompressionBombError" in told["large"] and "remove or replace it" in told["large"]
    assert "a broken link" in told["link"] and "a folder" in told["folder"] and "missing" in told["missing"]
    assert "a pipe or device" in told["pipe"] and "a pipe or device" in told["device"]


def test_damaged_images_are_images_or_refused(tmp_path: Path) -> None:
    """Bits flipped at random in files of several formats: an image comes out, or a clear error."""
    path, refused = tmp_path / "x.png", 0
    for suffix in ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "PPM"):
        Image.fromarray(RNG.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path, format=suffix)
        whole = path.read_bytes()
        for _ in range(50):
            data = bytearray(whole)
            for at in RNG.integers(0, min(200, len(data)), 4):
                data[at] ^= 1 << RNG.integers(8)
            path.write_bytes(data)
            try:
                assert opened(path).mode == "RGB"
            except VictimError:
                refused += 1
    assert 50 < refused < 300
