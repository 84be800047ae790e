"""Penn-Fudan's files, and the generated shapes: images with the right boxes and masks."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deepenc.errors import VictimError
from deepenc.tasks.detection import InstanceSegmentation
from deepenc.victims.data.pennfudan import PennFudan, boxes_of, mirrored
from deepenc.victims.data.shapes import Shapes


@pytest.fixture
def folder(tmp_path):
    for part in ("PNGImages", "PedMasks"):
        (tmp_path / part).mkdir()
    ids = np.zeros((10, 12), dtype=np.uint8)
    ids[2:7, 1:4], ids[0:10, 6:7] = 1, 3  # a number may be missing
    Image.fromarray(np.full((10, 12, 3), 51, dtype=np.uint8)).save(tmp_path / "PNGImages" / "One.png")
    Image.fromarray(ids).save(tmp_path / "PedMasks" / "One_mask.png")
    return tmp_path


def test_an_image_with_its_people(folder) -> None:
    data = PennFudan(folder, masks=True)
    image, target = data[0]
    assert len(data) == 1 and image.shape == (3, 10, 12) and torch.allclose(image, torch.tensor(0.2))
    assert target["boxes"].tolist() == [[1, 2, 4, 7], [6, 0, 7, 10]] and target["labels"].tolist() == [1, 1]
    assert target["masks"].sum((1, 2)).tolist() == [15, 10]
    assert "masks" not in PennFudan(folder)[0][1]
    turned, other = mirrored(data[0])
    assert torch.equal(turned.flip(-1), image)
    assert other["boxes"].tolist() == [[8, 2, 11, 7], [5, 0, 6, 10]]
    assert torch.equal(boxes_of(other["masks"]), other["boxes"])


def test_bad_folders(folder) -> None:
    with pytest.raises(VictimError, match="no Penn-Fudan images at"):
        PennFudan(folder / "elsewhere")
    data = PennFudan(folder)
    mask = folder / "PedMasks" / "One_mask.png"
    for pixels, what in (
        (np.zeros((10, 12), dtype=np.uint8), "shows no pedestrian"),
        (np.ones((5, 12), dtype=np.uint8), "12 x 5 pixels, its image 12 x 10"),
        (np.ones((10, 12, 3), dtype=np.uint8), "one 8-bit channel"),
    ):
        Image.fromarray(pixels).save(mask)
        with pytest.raises(VictimError, match=what):
            data[0]
    mask.write_bytes(b"nothing")
    with pytest.raises(VictimError, match="not a readable mask"):
        data[0]
    mask.unlink()
    with pytest.raises(VictimError, match=r"One_mask\.png is missing"):
        PennFudan(folder)
    (folder / "PNGImages" / "One.png").unlink()
    with pytest.raises(VictimError, match="no images in"):
        PennFudan(folder)


@pytest.mark.skipif("DEEPENC_DATA" not in os.environ, reason="no data folder")
def test_real_images() -> None:
    root = Path(os.environ["DEEPENC_DATA"]) / "pennfudan"
    if not root.is_dir():
        pytest.skip("no Penn-Fudan")
    data = PennFudan(root, masks=True)
    _, targets = InstanceSegmentation().collate([data[i] for i in range(0, 170, 17)])
    assert len(data) == 170 and InstanceSegmentation(classes=2).misfit(targets) is None


def test_shapes_are_what_they_are_called() -> None:
    data = Shapes(30, masks=True)
    kinds = []
    for i in range(len(data)):
        image, target = data[i]
        assert image.shape == (3, 64, 64) and 0 <= float(image.min()) <= float(image.max()) <= 1
        assert int(target["masks"].sum(0).max()) == 1  # they do not overlap
        assert torch.equal(boxes_of(target["masks"]), target["boxes"])
        widths = target["boxes"][:, 2:] - target["boxes"][:, :2]
        filled = target["masks"].sum((1, 2)) / widths.prod(1)
        kinds += target["labels"].tolist()
        for label, share in zip(target["labels"].tolist(), filled.tolist(), strict=True):
            assert share == 1 if label == 1 else share == pytest.approx(np.pi / 4, abs=0.06)
    assert set(kinds) == {1, 2} and len(kinds) > 40
    assert torch.equal(data[3][0], Shapes(1, first=3)[0][0])
    assert data.digest(3) == Shapes(1, first=3).digest(0) != data.digest(4)
    with pytest.raises(IndexError):
        data[30]
