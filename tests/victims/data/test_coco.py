"""COCO's JSON is read as it is meant, and what is wrong with it is told by file and number."""

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deepenc.errors import VictimError
from deepenc.tasks.detection import InstanceSegmentation
from deepenc.tasks.examples import Examples
from deepenc.victims.data.coco import CocoImages

SOUND = {
    "images": [
        {"id": 7, "file_name": "b.png", "width": 20, "height": 10},
        {"id": 3, "file_name": "a.png", "width": 8, "height": 8},
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 90, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 90, "bbox": [2, 3, 5, 4], "area": 12.5, "iscrowd": 0,
         "segmentation": [[2, 3, 7, 3, 7, 7, 2, 7]]},
        {"id": 2, "image_id": 7, "category_id": 1, "bbox": [0, 0, 20.5, 10], "iscrowd": 1,
         "segmentation": {"size": [10, 20], "counts": [0, 30, 170]}},
        {"id": 3, "image_id": 7, "category_id": 1, "bbox": [4, 4, 0, 3]},
    ],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for image in SOUND["images"]:
        pixels = np.full((image["height"], image["width"], 3), image["id"], dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / image["file_name"])
    return tmp_path


def read(folder, told=SOUND, **more):
    path = folder / "told.json"
    path.write_text(told if isinstance(told, str) else json.dumps(told))
    return CocoImages(folder, path, **more)


def test_images_and_objects(folder, caplog) -> None:
    pytest.importorskip("faster_coco_eval")
    data = read(folder, masks=True)
    assert len(data) == 2 and "annotation 3 has no extent" in caplog.text
    image, target = data[0]
    assert image.shape == (3, 10, 20) and torch.allclose(image, torch.tensor(7 / 255))
    assert target["boxes"].tolist() == [[2, 3, 7, 7], [0, 0, 20, 10]]  # half a pixel too wide is rounding
    assert target["labels"].tolist() == [90, 1] and target["iscrowd"].tolist() == [0, 1]
    assert target["area"].tolist() == [12.5, 205]
    expected = torch.zeros(10, 20, dtype=torch.uint8)
    expected[3:7, 2:7] = 1
    assert torch.equal(target["masks"][0], expected)
    assert torch.equal(target["masks"][1].nonzero()[:, 1].unique(), torch.arange(3))  # columns first
    _, nothing = data[1]
    assert nothing["boxes"].shape == (0, 4) and nothing["masks"].shape == (0, 8, 8)
    assert InstanceSegmentation(classes=91).misfit([target, nothing]) is None
    assert data.digest(0) != data.digest(1)


def changed(**parts):
    told = copy.deepcopy(SOUND)
    for name, value in parts.items():
        told[name] = value
    return told


def annotated(**fields):
    return changed(annotations=[SOUND["annotations"][0] | fields])


@pytest.mark.parametrize(
    ("told", "what"),
    [
        ("{", "not readable as JSON"),
        ("[]", "expected a JSON object"),
        ({"images": []}, "not in COCO's form"),
        (changed(images=[]) | {"annotations": []}, "names no images"),
        (changed(images=[{"id": 1}]), "not in COCO's form"),
        (annotated(bbox=[1, 2, 3]), "not in COCO's form"),
        (annotated(bbox=[15, 3, 10, 4]), r"annotation 1 lies outside of image 7 with 20 x 10"),
        (annotated(bbox=[-5, 3, 10, 4]), "lies outside"),
        (annotated(bbox=[float("nan"), 3, 10, 4]), "lies outside"),
        (annotated(image_id=4), "of image 4, which is not listed"),
        (annotated(category_id=2), "annotation 1 has the category 2"),
        (annotated(category_id=0) | {"categories": [{"id": 0, "name": "x"}]}, "0 is the background"),
        (changed(images=[SOUND["images"][0] | {"file_name": "c.png"}, SOUND["images"][1]]),
         r"1 of the 2 images .* missing, first .*c\.png"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(folder, told, what) -> None:
    with pytest.raises(VictimError, match=what):
        read(folder, told)


def test_a_missing_file_and_an_image_of_another_size(folder) -> None:
    with pytest.raises(VictimError, match="is missing"):
        CocoImages(folder, folder / "none.json")
    data = read(folder)
    Image.new("RGB", (5, 5)).save(folder / "b.png")
    with pytest.raises(VictimError, match=r"b\.png has 5 x 5 pixels, .*told\.json says 20 x 10"):
        data[0]
    (folder / "b.png").write_bytes(b"no image")
    with pytest.raises(VictimError, match=r"b\.png is not a readable image"):
        Examples.read(data, InstanceSegmentation().collate).batch([0])


def test_an_outline_that_cannot_be_drawn(folder) -> None:
    pytest.importorskip("faster_coco_eval")
    data = read(folder, annotated(segmentation="nonsense"), masks=True)
    with pytest.raises(VictimError, match="outline of annotation 1 cannot be drawn"):
        data[0]


@pytest.mark.skipif("DEEPENC_DATA" not in os.environ, reason="no data folder")
def test_real_images(tmp_path) -> None:
    pytest.importorskip("faster_coco_eval")
    root = Path(os.environ["DEEPENC_DATA"]) / "coco_sample"
    if not root.is_dir():
        pytest.skip("no sample of COCO")
    told = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    path = tmp_path / "told.json"
    if any(a["category_id"] > len(told["categories"]) for a in told["annotations"]):
        # The sample's numbers are COCO's own plus one, beside a list from 1 to 80: refused, mended here.
        with pytest.raises(VictimError, match="expected one of those listed"):
            CocoImages(root / "val2017", root / "annotations" / "instances_val2017.json")
        for annotation in told["annotations"]:
            annotation["category_id"] -= 1
        told["categories"] = [{"id": number, "name": str(number)} for number in range(1, 91)]
    path.write_text(json.dumps(told))
    task = InstanceSegmentation(classes=91)
    data = CocoImages(root / "val2017", path, masks=True)
    _, targets = task.collate([data[i] for i in range(12)])
    assert len(data) == 100 and task.misfit(targets) is None
    perfect = [
        {"boxes": t["boxes"], "labels": t["labels"], "scores": torch.ones(len(t["labels"])),
         "masks": t["masks"][:, None].float()}
        for t in targets
    ]  # fmt: skip
    assert task.worth(task.outcomes(perfect, targets)).value == 1
