"""Detectors by torchvision's convention: what is run, lost, compared and learned from."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD

import deepenc
from deepenc.errors import ConfigError
from deepenc.network.calling import call_with
from deepenc.network.find import find_sites
from deepenc.network.gates import Gated
from deepenc.tasks.dense import dense
from deepenc.tasks.detection import Detection, InstanceSegmentation, alike_in_shape
from deepenc.victims.data.shapes import Shapes
from deepenc.victims.detectors import PlainTrunk, small_rcnn

TASK = Detection(classes=3)


def seeded(make, *args, **more):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make(*args, **more)


@pytest.fixture(scope="module")
def network():
    return seeded(small_rcnn).eval()


@pytest.fixture(scope="module")
def batch():
    data = Shapes(4, masks=True)
    return InstanceSegmentation().collate([data[i] for i in range(4)])


class Padding(nn.Module):
    """The small detector, which does not bring images to one shape itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        inner.transform.fixed_size = None

    def forward(self, images, targets=None):
        return self.inner(images, targets)


def same(first, second):
    return all(
        torch.equal(one[part], other[part]) for one, other in zip(first, second, strict=True) for part in one
    )


def test_an_answer_does_not_hang_on_the_images_beside_it(network) -> None:
    padding = Padding(copy.deepcopy(network))
    images = [torch.rand(3, 64, 64), torch.rand(3, 24, 64), torch.rand(3, 64, 64)]
    with torch.no_grad():
        alone = [TASK.run(padding, [image])[0] for image in images]
        together = TASK.run(padding, images)
        plainly = padding(images)
    assert alike_in_shape(padding, images) == [[0, 2], [1]] and alike_in_shape(network, images) == [[0, 1, 2]]
    assert all(TASK.alike(alone, together, 0.01))
    assert not same(plainly[1:2], alone[1:2])  # or the test would show nothing
    torch.testing.assert_close(TASK.response(padding, images)[1:2], TASK.response(padding, images[1:2]))


def test_the_loss_is_the_sum_of_the_detectors_own(network, batch) -> None:
    images, targets = batch
    plain = copy.deepcopy(network).train()
    for layer in plain.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the regions that a detector in eval mode learns from
        expected = sum(plain(images, targets).values())
    state = torch.random.get_rng_state()
    modes = [module.training for module in network.modules()]
    loss = TASK.loss(network, images, targets)
    assert torch.equal(loss, expected) and torch.equal(loss, TASK.loss(network, images, targets))
    assert torch.equal(state, torch.random.get_rng_state())
    assert [module.training for module in network.modules()] == modes
    gradients = torch.autograd.grad(loss, network.backbone.convs[0].weight)
    assert float(gradients[0].abs().sum()) > 0


def test_batchnorm_and_targets_stay_as_they_are(network, batch) -> None:
    images, targets = batch
    before = copy.deepcopy(network.state_dict())
    boxes = [target["boxes"].clone() for target in targets]
    TASK.loss(network, images, targets)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(torch.equal(one, target["boxes"]) for one, target in zip(boxes, targets, strict=True))
    training = copy.deepcopy(network).train()
    TASK.loss(training, images, targets)
    assert not torch.equal(training.backbone.norms[0].running_mean, before["backbone.norms.0.running_mean"])


def test_the_loss_passes_through_wrappers(network, batch) -> None:
    images, targets = batch
    expected = TASK.loss(network, images, targets)
    sites = find_sites(network, ([images[0]],))
    gated = Gated(copy.deepcopy(network), sites)
    loss = TASK.loss(gated, images, targets)
    torch.testing.assert_close(loss, expected)
    slopes = torch.autograd.grad(loss, list(gated.gates.values()))
    assert all(float(slope.abs().sum()) > 0 for slope in slopes)
    doubled = {"backbone.convs.0.weight": network.backbone.convs[0].weight * 2}
    changed = call_with(network, doubled, images, lambda part, given: TASK.loss(part, given, targets))
    assert not torch.allclose(changed, expected)


def one_stage(kind):
    trunk = PlainTrunk(16)
    more = {"min_size": 64, "max_size": 64, "num_classes": 3}
    if kind is SSD:
        trunk.out_channels = [32]
        boxes = DefaultBoxGenerator([[2]], scales=[0.2, 0.4], steps=[8])
        return SSD(trunk, boxes, (64, 64), 3)
    return kind(trunk, anchor_generator=AnchorGenerator(((16,),), ((1.0,),)), **more)


@pytest.mark.parametrize("kind", [RetinaNet, FCOS, SSD])
def test_detectors_without_regions(kind, batch) -> None:
    images, targets = batch
    network = seeded(one_stage, kind).eval()
    loss = TASK.loss(network, images, targets)
    assert not network.training and float(
        torch.autograd.grad(loss, network.backbone.convs[0].weight)[0].abs().sum()
    )
    with torch.no_grad():
        assert TASK.complaint(TASK.run(network, images), images) is None
    response = TASK.response(network, images)
    assert response.shape[0] == 4 and response.requires_grad
    assert len(TASK.head(network)) == 2


@pytest.mark.parametrize("masks", [False, True])
def test_encrypted_detectors_decrypt_bit_for_bit_and_can_be_compared(masks, batch) -> None:
    images, _ = batch
    network = seeded(small_rcnn, masks=masks).eval()
    task = InstanceSegmentation() if masks else TASK
    encrypted, key = deepenc.encrypt(network, ([images[0]],), "paper-init", seed=0)
    assert sum(key.allocation.values())
    with torch.no_grad():
        clean, changed = task.response(network, images), task.response(encrypted, images)
        assert clean.shape == changed.shape and not torch.allclose(clean, changed)
        # 3 anchors and 16 boxes of 3 classes, on 16 cells each; masks of 3 classes for each box.
        assert clean.shape[1] == 16 * (3 + 12) + 16 * (3 + 12) + (16 * 3 * 16 if masks else 0)
        opened = deepenc.decrypt(encrypted, key)
        assert all(torch.equal(t, network.state_dict()[n]) for n, t in opened.state_dict().items())
        assert same(task.run(opened, images), task.run(network, images))


def test_optimised_confusion_weights_raise_the_response(network) -> None:
    data = Shapes(12)
    inputs, _ = TASK.collate([data[i] for i in range(12)])

    def change(hardening):
        defense = {
            "name": "own",
            "placement": {"name": "proportional", "proportion": 0.1},
            "weights": "samp",
            "hardening": hardening,
        }
        encrypted, _ = deepenc.encrypt(network, ([inputs[0]],), defense, seed=1, data=inputs, task=TASK)
        with torch.no_grad():
            clean = TASK.response(network, inputs)
            return float((TASK.response(encrypted, inputs) - clean).square().sum() / clean.square().sum())

    optimised = {"name": "optimise", "steps": 12, "batch_size": 6, "path": "encrypted"}
    assert change([optimised]) > 1.5 * change([])


def test_what_is_no_detector_is_told() -> None:
    with pytest.raises(ConfigError, match="no detector of torchvision's form"):
        dense(nn.Sequential(nn.Flatten()), [torch.zeros(3, 4, 4)])


def detections(*rows):
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return {"boxes": table[:, :4], "labels": table[:, 4].long(), "scores": table[:, 5]}


BOTH = detections((0, 0, 10, 10, 1, 0.9), (20, 20, 40, 40, 2, 0.8))


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (BOTH, True),
        (detections((20, 20, 40, 40, 2, 0.8), (0, 0, 10, 10, 1, 0.9)), True),
        (detections((0, 0, 10, 10.5, 1, 0.9), (20, 20, 40, 40, 2, 0.8), (50, 50, 60, 60, 1, 0.1)), True),
        (detections((0, 0, 10, 10, 1, 0.9)), False),
        (detections((0, 0, 10, 10, 1, 0.9), (20, 20, 40, 40, 1, 0.8)), False),
        (detections((0, 0, 10, 10, 1, 0.5), (20, 20, 40, 40, 2, 0.8)), False),
        (detections((5, 5, 15, 15, 1, 0.9), (20, 20, 40, 40, 2, 0.8)), False),
        (detections(), False),
    ],
)
def test_detections_are_compared_as_sets_by_weight(other, expected) -> None:
    assert TASK.alike([BOTH], [other], 0.01) == TASK.alike([other], [BOTH], 0.01) == [expected]


def test_answers_are_the_sure_detections() -> None:
    weak = detections((0, 0, 10, 10, 1, 0.9), (20, 20, 40, 40, 2, 0.4), (5, 5, 5, 9, 1, 0.9))
    weak["masks"] = torch.full((3, 1, 8, 8), 0.7)
    weak["masks"][0, 0, 0] = 0.2
    (target,) = Detection().answers([weak])
    assert target["boxes"].tolist() == [[0, 0, 10, 10]] and target["labels"].tolist() == [1]
    (target,) = InstanceSegmentation().answers([weak])
    assert target["masks"].shape == (1, 8, 8) and int(target["masks"].sum()) == 56
    assert InstanceSegmentation(classes=3).misfit([target]) is None
    assert len(Detection(sure=0.3).answers([weak])[0]["labels"]) == 2


def test_an_image_with_a_nan_has_no_detections() -> None:
    target = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([1])}
    output = detections((0, 0, 10, 10, 1, 0.9))
    assert TASK.worth(TASK.outcomes([output], [target])).value == 1
    output["scores"][0] = torch.nan
    assert TASK.unreadable([output]) == [True]
    assert TASK.worth(TASK.outcomes([output], [target])).value == 0


BOXES, LABELS = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([1])


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ({"labels": LABELS}, r"expected boxes \(objects, 4\)"),
        ({"boxes": BOXES, "labels": LABELS.float()}, "a label for each of 1 boxes"),
        ({"boxes": BOXES, "labels": torch.tensor([1, 1])}, "a label for each of 1 boxes"),
        ({"boxes": BOXES[:, [2, 1, 0, 3]], "labels": LABELS}, "left < right"),
        ({"boxes": BOXES * torch.nan, "labels": LABELS}, "left < right"),
        ({"boxes": BOXES, "labels": LABELS - 1}, "0 is the background"),
        ({"boxes": BOXES, "labels": LABELS + 2}, "below 3, the number of classes, got 3 to 3"),
    ],
)
def test_targets_that_do_not_fit(target, what) -> None:
    good = {"boxes": BOXES, "labels": LABELS}
    assert TASK.misfit([good]) is None
    with pytest.raises(AssertionError, match=f"(?s){what}.*image 1 of the batch"):
        raise AssertionError(TASK.misfit([good, target]))


def test_images_without_objects_tell_nothing() -> None:
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert TASK.misfit([nothing]) is None and "no image" in TASK.uninformative([nothing, nothing])
    assert TASK.uninformative([nothing, {"boxes": BOXES, "labels": LABELS}]) is None


def test_masks_that_do_not_fit() -> None:
    task = InstanceSegmentation()
    target = {"boxes": BOXES, "labels": LABELS, "masks": torch.zeros(1, 8, 8)}
    assert task.misfit([target]) is None
    assert "expected masks (1, height, width)" in task.misfit([target | {"masks": torch.zeros(2, 8, 8)}])
    assert "of 0 and 1" in task.misfit([target | {"masks": torch.full((1, 8, 8), 255)}])
    assert "boxes and labels for each image" in task.misfit(torch.zeros(3))


@pytest.mark.parametrize(
    ("outputs", "what"),
    [
        (torch.zeros(2, 4), "here 1, got float32"),
        ([BOTH, BOTH], "here 1"),
        ([{"boxes": BOXES}], "for image 0"),
        ([BOTH | {"labels": LABELS}], "expected 2 labels for image 0"),
    ],
)
def test_outputs_of_another_form(outputs, what) -> None:
    assert TASK.complaint([BOTH], [torch.zeros(3, 8, 8)]) is None
    assert what in TASK.complaint(outputs, [torch.zeros(3, 8, 8)])
    assert "masks" not in BOTH and "for image 0" in InstanceSegmentation().complaint(
        [BOTH], [torch.zeros(3, 8, 8)]
    )
