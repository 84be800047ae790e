"""Detectors as victims: trained or read from files, in parts that share nothing."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deepenc.arena.metrics import judge
from deepenc.errors import VictimError
from deepenc.network.calling import call
from deepenc.victims.data.shapes import Shapes
from deepenc.victims.data.splits import shared
from deepenc.victims.detectors import mobilenet_rcnn
from deepenc.victims.sources.detectors.coco import CocoDetector
from deepenc.victims.sources.detectors.pennfudan import PennFudanFasterRcnn, PennFudanMaskRcnn
from deepenc.victims.sources.detectors.shapes import ShapesDetector
from deepenc.victims.validation import validated


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_the_shapes_detector_finds_shapes_and_is_trained_once(cache, monkeypatch) -> None:
    pytest.importorskip("faster_coco_eval")
    victim = validated(ShapesDetector().load(cache))
    assert judge(victim.model, victim.judge, victim.task, who="the test").value > 0.4
    assert not shared(victim.attacker, victim.judge) and not shared(victim.defender, victim.judge)
    monkeypatch.setattr("deepenc.victims.sources.detectors.shapes.fit", None)  # it would be called again
    again = ShapesDetector().load(cache)
    assert again.fingerprint == victim.fingerprint
    built = ShapesDetector().structure().build(allow=(ShapesDetector().structure().name,))
    assert built.state_dict().keys() == victim.model.state_dict().keys()
    network, example = ShapesDetector().network(cache)
    assert len(call(network, example)) == 1


def test_parts_of_shapes_are_read_again_the_same() -> None:
    assert all(torch.equal(Shapes(2)[i][0], Shapes(2)[i][0]) for i in range(2))


@pytest.mark.parametrize("masks", [False, True])
def test_the_larger_network_runs_and_has_the_structure_it_says(masks) -> None:
    source = PennFudanMaskRcnn() if masks else PennFudanFasterRcnn()
    with torch.random.fork_rng(devices=[]):
        network = mobilenet_rcnn(2, masks, 64)
    structure = source.structure()
    assert structure.build(allow=(structure.name,)).state_dict().keys() == network.state_dict().keys()
    with torch.no_grad():
        outputs = source.task.run(network, [torch.rand(3, 50, 70), torch.rand(3, 70, 50)])
    assert source.task.complaint(outputs, [0, 0]) is None
    if masks and len(outputs[0]["masks"]):
        assert outputs[0]["masks"].shape[1:] == (1, 50, 70)


def test_a_folder_without_the_trunks_weights_says_what_is_missing(tmp_path) -> None:
    with pytest.raises(VictimError, match="no Penn-Fudan images at"):
        PennFudanFasterRcnn(folder=tmp_path).load(tmp_path)


@pytest.fixture
def sample(tmp_path):
    rng = np.random.default_rng(0)
    told = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    for number in range(10):
        name = f"{number}.png"
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(tmp_path / name)
        told["images"].append({"id": number, "file_name": name, "width": 64, "height": 48})
        told["annotations"].append(
            {"id": number, "image_id": number, "category_id": 1, "bbox": [5, 5, 20, 20]}
        )
    (tmp_path / "told.json").write_text(json.dumps(told))
    return {"images": tmp_path, "annotations": tmp_path / "told.json"}


def test_torchvisions_detectors_on_coco_with_weights_of_a_file(sample, tmp_path) -> None:
    source = CocoDetector(model="fasterrcnn_mobilenet_v3_large_320_fpn", classes=2, side=64, **sample)
    network = source._network()
    with torch.no_grad():
        network.roi_heads.box_predictor.cls_score.bias[1] = 3.0
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    victim = validated(source.model_copy(update={"weights": str(tmp_path / "weights.pth")}).load(tmp_path))
    assert victim.model.state_dict()["roi_heads.box_predictor.cls_score.bias"][1] == 3
    assert victim.scope == "backbone"
    assert [len(part) for part in (victim.defender, victim.attacker, victim.judge)] == [2, 4, 4]
    assert not shared(victim.attacker, victim.judge)
    image, target = victim.judge.batch([0])
    assert image[0].shape == (3, 48, 64) and target[0]["boxes"].tolist() == [[5, 5, 25, 25]]
    assert source.random and not CocoDetector(weights="a.pth").random
    with pytest.raises(VictimError, match="classes"):
        source.model_copy(update={"weights": str(tmp_path / "weights.pth"), "classes": 5}).network(tmp_path)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"model": "fasterrcnn_resnet5_fpn"}, "no detector 'fasterrcnn_resnet5_fpn'"),
        ({"images": None}, "give `images`"),
        ({"shares": (0.01, 0.5, 0.49)}, "too few for three parts"),
        (
            {"weights": "nowhere.pth", "model": "fasterrcnn_mobilenet_v3_large_320_fpn"},
            "nowhere.pth is missing",
        ),
    ],
)
def test_what_is_wrong_with_a_detector_is_told(sample, tmp_path, given, what) -> None:
    with pytest.raises(VictimError, match=what):
        CocoDetector(**sample | given).load(tmp_path)


@pytest.mark.long
@pytest.mark.skipif("DEEPENC_DATA" not in os.environ, reason="no data folder")
@pytest.mark.parametrize("kind", [PennFudanFasterRcnn, PennFudanMaskRcnn])
def test_pennfudan_detectors_learn_and_stay_apart(kind) -> None:
    from deepenc.victims.data.cache import cache_folder

    if not (Path(os.environ["DEEPENC_DATA"]) / "pennfudan").is_dir():
        pytest.skip("no Penn-Fudan")
    victim = validated(kind().load(cache_folder()))
    assert sum(len(part) for part in (victim.defender, victim.attacker, victim.judge)) == 170
    assert judge(victim.model, victim.judge, victim.task, who="the test").further["AP50"] > 0.4
