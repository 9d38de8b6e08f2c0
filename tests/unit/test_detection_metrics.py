"""Average precision of COCO and VOC on detections that are known: methods/transfer.md section 9, M2 to M4, on made-up data."""

from dataclasses import replace

import numpy as np
import pytest
from pycocotools import mask as rle

from eval.detection.annotations import DetectionSet, Object, Photo
from eval.detection.results import Found, as_coco, coco_ap
from eval.detection.voc_ap import average_precision, matched, recall_precision, voc_ap

HEIGHT, WIDTH = 300, 400


def made_up(seed: int = 0) -> DetectionSet:
    """Eight images, the last without objects; three classes, of which the last has none; all sizes of objects, 40 pixels apart."""
    rng = np.random.default_rng(seed)
    photos = []
    for i in range(8):
        objects = []
        for j in range(0 if i == 7 else 3):
            low = np.array([20 + 130 * j, 20 + 10 * i])
            side = np.array([[20, 15], [60, 50], [90, 190]][j]) + rng.integers(0, 8, 2)
            x0, y0, x1, y1 = box = np.concatenate([low, low + side]).astype(float)
            objects.append(Object(box, j % 2, [np.array([x0, y0, x1, y0, x1, y1, x0, y1])]))
        photos.append(Photo(i + 1, None, HEIGHT, WIDTH, objects))
    return DetectionSet(photos, ["cat", "dog", "cow"], [3, 5, 9])


def as_found(data: DetectionSet, shift: float = 0.0) -> list[Found]:
    """The annotations, every box shifted by a part of its width."""
    found = []
    for photo in data.photos:
        boxes = np.array([o.box for o in photo.objects]).reshape(-1, 4)
        boxes[:, [0, 2]] += shift * (boxes[:, 2] - boxes[:, 0])[:, None]
        masks = [rle.merge(rle.frPyObjects([p.tolist() for p in o.mask], HEIGHT, WIDTH)) for o in photo.objects]
        found.append(Found(boxes, np.ones(len(boxes)), np.array([o.label for o in photo.objects], int), masks))
    return found


def with_masks(data: DetectionSet) -> DetectionSet:
    """Its annotation file with polygons."""
    dataset = as_coco(data)
    masks = [o.mask for p in data.photos for o in p.objects]
    for annotation, mask in zip(dataset["annotations"], masks, strict=True):
        annotation["segmentation"] = [p.tolist() for p in mask]
    return replace(data, dataset=dataset)


def test_perfect_detections_reach_100():
    data = with_masks(made_up())
    result = coco_ap(data, as_found(data), masks=True)
    for kind in ("box", "mask"):
        numbers = {k: v for k, v in result[kind].items() if k != "per_class"}
        assert numbers == pytest.approx(dict.fromkeys(numbers, 100.0)) and len(numbers) == 6, kind
        assert result[kind]["per_class"] == pytest.approx({"cat": 100.0, "dog": 100.0})


@pytest.mark.parametrize("ids", [range(21), [7] * 21], ids=["from 0", "equal"])
def test_ids_of_annotations_do_not_count(ids):
    data = with_masks(made_up())
    for annotation, number in zip(data.dataset["annotations"], ids, strict=True):
        annotation["id"] = number
    result = coco_ap(data, as_found(data), masks=True)
    assert [result[kind]["AP"] for kind in ("box", "mask")] == pytest.approx([100, 100])
    assert [a["id"] for a in data.dataset["annotations"]] == list(ids)


def test_boxes_shifted_by_a_quarter_are_found_at_half_overlap_only():
    """Their IoU is 0.6, which the third of ten thresholds may or may not let pass: it is rounded."""
    data = made_up()
    result = coco_ap(data, as_found(data, 0.25), masks=False)["box"]
    assert result["AP50"] == pytest.approx(100) and result["AP75"] == 0
    assert 19.9 < result["AP"] < 30.1


def test_without_detections_coco_gives_0():
    data = made_up()
    nothing = [Found(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))] * len(data.photos)
    assert coco_ap(data, nothing, masks=False)["box"]["AP"] == 0
    assert voc_ap(data, nothing, eleven_points=True)["AP"] == 0


@pytest.mark.parametrize("eleven_points", [True, False])
def test_voc_averages_over_classes_that_occur(eleven_points):
    data = made_up()
    result = voc_ap(data, as_found(data), eleven_points=eleven_points)
    assert result["AP"] == pytest.approx(100) and result["AP75"] == pytest.approx(100)
    assert result["classes_with_objects"] == 2 and set(result["per_class"]) == {"cat", "dog"}


def test_voc_rounds_scores_and_keeps_the_order_of_equal_ones():
    """Two detections of one object whose scores agree to three decimals: the first is right, whichever was higher."""
    objects = np.array([[0, 11, 11, 50, 50, 0]], float)
    near, far = [0, 0.9, 11, 11, 50, 50], [0, 0.9, 200, 200, 250, 250]
    for order, first in (([near, far], 1.0), ([far, near], 0.0)):
        _, precision = recall_precision(np.zeros(1, bool), matched(objects, np.array(order)), 0.5)
        assert precision[0] == first


def test_voc_passes_over_difficult_objects_and_counts_doubles_as_wrong():
    objects = np.array([[0, 1, 1, 40, 40, 0], [0, 100, 1, 140, 40, 1]], float)
    detections = np.array([[0, 0.9, 1, 1, 40, 40], [0, 0.8, 100, 1, 140, 40], [0, 0.7, 1, 1, 40, 41], [1, 0.6, 1, 1, 40, 40]])
    recall, precision = recall_precision(objects[:, 5].astype(bool), matched(objects, detections), 0.5)
    assert recall.tolist() == [1, 1, 1, 1]
    assert precision.tolist() == pytest.approx([1, 1, 1 / 2, 1 / 3])
    assert average_precision(recall, precision, eleven_points=True) == pytest.approx(1)
