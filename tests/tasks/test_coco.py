"""AP from what is kept of each image is what the evaluator says of the images themselves."""

import numpy as np
import pytest
import torch

from deepenc.arena.outcomes import pack, unpack
from deepenc.tasks.coco import Objects, averages, length, table
from deepenc.tasks.detection import Detection, InstanceSegmentation

evaluator = pytest.importorskip("faster_coco_eval")

HEIGHT = WIDTH = 200


def squares(rng, count, most):
    """Boxes with whole corners, so that overlaps on a threshold and equal ones occur."""
    left, top = rng.integers(0, WIDTH - most, (2, count))
    width, height = rng.integers(6, most, (2, count))
    return np.stack([left, top, left + width, top + height], axis=1).astype(np.float32)


def scene(rng, most=150):
    """Objects of three classes, some of them crowds, and detections near to them and elsewhere."""
    real = squares(rng, rng.integers(0, 8), most)
    near = real[rng.integers(0, len(real), 12)] if len(real) else squares(rng, 12, most)
    found = np.concatenate([near + rng.integers(-4, 5, near.shape), squares(rng, 5, most)])
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    target = {
        "boxes": torch.from_numpy(real),
        "labels": torch.from_numpy(rng.integers(1, 4, len(real))),
        "iscrowd": torch.from_numpy((rng.random(len(real)) < 0.2).astype(np.int64)),
    }
    output = {
        "boxes": torch.from_numpy(found.astype(np.float32)).clamp(0, WIDTH),
        "labels": torch.from_numpy(rng.integers(1, 4, len(found))),
        "scores": torch.from_numpy(rng.integers(1, 20, len(found)) / np.float32(20)),  # ties
    }
    return output, target


def drawn(boxes):
    masks = torch.zeros(len(boxes), HEIGHT, WIDTH, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
        mask[(top + bottom) // 2 : bottom, left : (left + right) // 2] = 0
    return masks


def plainly(outputs, targets, kind):
    """The evaluator on the boxes or masks themselves: its first six figures."""
    images = [{"id": i, "height": HEIGHT, "width": WIDTH} for i in range(len(outputs))]
    categories = [{"id": label, "name": str(label)} for label in (1, 2, 3)]
    truths, results = [], []
    for image, (output, target) in enumerate(zip(outputs, targets, strict=True)):
        for of, into in ((target, truths), (output, results)):
            for i, (left, top, right, bottom) in enumerate(of["boxes"].double().tolist()):
                told = {"image_id": image, "category_id": int(of["labels"][i]), "id": len(into) + 1}
                if kind == "segm":
                    mask = of["masks"][i, 0] > 0.5 if of["masks"].ndim == 4 else of["masks"][i]
                    told["segmentation"] = evaluator.mask.encode(
                        np.asfortranarray(mask.numpy().astype(np.uint8))
                    )
                    told["area"] = float(mask.sum())
                else:
                    told["area"] = (right - left) * (bottom - top)
                    told["bbox"] = [left, top, right - left, bottom - top]
                if "scores" in of:
                    into.append(told | {"score": float(of["scores"][i])})
                else:
                    into.append(told | {"iscrowd": int(of["iscrowd"][i])})
    truth = evaluator.COCO({"images": images, "categories": categories, "annotations": truths})
    found = evaluator.COCOeval_faster(truth, truth.loadRes(results), iouType=kind)
    found.run()
    return found.stats[:6]


@pytest.mark.parametrize("seed", range(6))
def test_boxes_as_the_evaluator_itself(seed) -> None:
    rng = np.random.default_rng(seed)
    outputs, targets = map(list, zip(*[scene(rng) for _ in range(25)], strict=True))
    expected = plainly(outputs, targets, "bbox")
    task = Detection()
    outcomes = unpack(pack(task.outcomes(outputs, targets)))
    worth = task.worth(outcomes)
    assert 0.02 < worth.value < 0.9
    found = [worth.value, *(worth.further[name] for name in ("AP50", "AP75", "APs", "APm", "APl"))]
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_masks_as_the_evaluator_itself_and_boxes_beside_them(seed) -> None:
    rng = np.random.default_rng(100 + seed)
    outputs, targets = map(list, zip(*[scene(rng) for _ in range(12)], strict=True))
    for output, target in zip(outputs, targets, strict=True):
        output["masks"] = drawn(output["boxes"])[:, None] * 0.9
        target["masks"] = drawn(target["boxes"])
    task = InstanceSegmentation()
    worth = task.worth(unpack(pack(task.outcomes(outputs, targets))))
    names = ("AP50", "AP75", "APs", "APm", "APl")
    assert [worth.value, *(worth.further[n] for n in names)] == pytest.approx(
        plainly(outputs, targets, "segm"), abs=1e-12
    )
    assert worth.further["box AP"] == pytest.approx(plainly(outputs, targets, "bbox")[0], abs=1e-12)


def objects(*boxes, scores=None):
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    count = len(corners)
    areas = corners[:, 2] * corners[:, 3]
    told = np.zeros(count) if scores is None else np.array(scores, dtype=np.float64)
    return Objects(corners, np.ones(count, dtype=np.int64), areas, told)


def test_by_hand() -> None:
    # Overlap 80 / 100 = 0.8: right for 7 of the 10 thresholds; the second object is never found, so that
    # precision is 1 up to a recall of 1/2, which is 51 of the evaluator's 101 points.
    kept = table(objects((0, 0, 10, 8), scores=[0.9]), objects((0, 0, 10, 10), (50, 50, 10, 10)))
    found = averages([kept])
    assert found["AP"] == pytest.approx(0.7 * 51 / 101)
    assert found["AP50"] == found["AP75"] == pytest.approx(51 / 101)
    assert found["APs"] == found["AP"] and "APl" not in found  # no large object


def test_of_two_objects_the_nearer_is_matched() -> None:
    # The first detection overlaps both objects, by 81 / 119 and 80 / 120, between the same two thresholds;
    # the second is the second object itself. Both are right up to 0.65; from 0.7 on the first is wrong.
    found = objects((19, 0, 100, 100), (39, 0, 100, 100), scores=[0.9, 0.8])
    kept = table(found, objects((0, 0, 100, 100), (39, 0, 100, 100)))
    assert averages([kept])["AP"] == pytest.approx((4 + 6 * 0.5 * 51 / 101) / 10)


def test_an_object_between_two_sizes_is_of_both() -> None:
    between = averages([table(objects((0, 0, 32, 32), scores=[0.5]), objects((0, 0, 32, 32)))])
    assert between["APs"] == between["APm"] == 1 and "APl" not in between
    smaller = averages([table(objects((0, 0, 32, 31), scores=[0.5]), objects((0, 0, 32, 31)))])
    assert smaller["APs"] == 1 and "APm" not in smaller
    larger = averages([table(objects((0, 0, 96, 97), scores=[0.5]), objects((0, 0, 96, 97)))])
    assert larger["APl"] == 1 and "APm" not in larger


def test_what_is_nowhere_is_not_averaged_and_nothing_found_is_zero() -> None:
    assert averages([table(objects(scores=[]), objects())]) == {}
    assert averages([table(objects(scores=[]), objects((0, 0, 10, 10)))])["AP"] == 0
    assert Detection().worth([table(objects(scores=[]), objects())]) == (0.0, {})


def test_a_table_says_its_length_and_holds_no_more_than_it_needs() -> None:
    rng = np.random.default_rng(0)
    outputs, targets = map(list, zip(*[scene(rng) for _ in range(5)], strict=True))
    for kept, output, target in zip(Detection().outcomes(outputs, targets), outputs, targets, strict=True):
        found, real = len(output["boxes"]), len(target["boxes"])
        assert length(kept) == len(kept) == 2 + 3 * (found + real) + found * real


def test_the_order_of_images_does_not_matter_without_ties_and_missing_an_object_costs() -> None:
    right = table(objects((0, 0, 40, 40), scores=[0.9]), objects((0, 0, 40, 40)))
    wrong = table(objects((60, 60, 40, 40), scores=[0.8]), objects((0, 0, 40, 40)))
    assert averages([right, wrong])["AP"] == averages([wrong, right])["AP"] == pytest.approx(51 / 101)
    assert averages([right])["AP"] == 1
