"""Reading COCO and VOC, what the detector sees of an image, and the order of images."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

from eval.detection.coco import read_coco
from eval.detection.command import evaluate, read
from eval.detection.data import TrainingPhotos, decode, moved, order, sample
from eval.detection.presets import DETECTION_PRESETS, changed
from eval.detection.results import Found
from eval.detection.voc import read_voc
from loaders.errors import DataError
from tests.detection import SIZES, write_detection_data


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_detection_data(tmp_path_factory.mktemp("detection"))


@pytest.fixture
def copy(tmp_path) -> Path:
    return write_detection_data(tmp_path)


def change(folder: Path, edit, split: str = "train2017") -> None:
    path = folder / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_coco_labels_are_the_sorted_ids(data):
    found = read_coco(data, "train2017")
    assert found.classes == ["dog", "cat"] and found.category_ids == [3, 7]
    assert [(p.height, p.width) for p in found.photos] == list(SIZES)
    assert [o.label for o in found.photos[0].objects] == [1, 0]
    assert found.photos[0].objects[0].box.tolist() == [4, 6, 34, 36]


def test_voc_boxes_are_those_of_coco(data):
    coco, voc = read_coco(data, "val2017"), read_voc(data, ["2012/val"])
    assert voc.classes[7] == "cat" and len(voc.classes) == 20
    for a, b in zip(coco.photos, voc.photos, strict=True):
        assert (a.height, a.width) == (b.height, b.width)
        np.testing.assert_array_equal([o.box for o in a.objects], [o.box for o in b.objects])
        assert [voc.classes[o.label] for o in b.objects] == ["cat", "dog"]


def test_what_cannot_be_learned_is_left_out(copy):
    """Crowds, boxes without an area, and where masks are learned objects without one; the evaluator sees all."""

    def edit(content):
        crowd, empty, bare = content["annotations"][:3]
        crowd["iscrowd"], crowd["segmentation"] = 1, {"size": [60, 90], "counts": [10, 5390]}
        empty["bbox"][2] = 0
        bare["segmentation"] = [[1, 2, 3, 4]]  # two corners

    change(copy, edit)
    found = read_coco(copy, "train2017")
    assert [len(p.objects) for p in found.photos] == [1, 2, 2, 2] and len(found.dataset["annotations"]) == 8
    assert [p.name for p in found.learnable(masks=False)] == [2, 3, 4]
    assert [len(p.objects) for p in found.learnable(masks=True)] == [1, 2, 2]


@pytest.mark.parametrize("box", [[90, 10, 0, 20], [5, 60, 20, 0], [0, 10, 0, 20], [-4, 10, 4, 20]])
def test_an_empty_box_on_the_border_is_left_out(copy, box):
    change(copy, lambda c: c["annotations"][0].update(bbox=box))
    found = read_coco(copy, "train2017")
    assert len(found.photos[0].objects) == 2 and [len(p.objects) for p in found.learnable(masks=True)] == [1, 2, 2, 2]


@pytest.mark.parametrize(
    "edit, said",
    [
        (lambda c: c["annotations"][1].update(category_id=5), "Annotation 11 .* category 5"),
        (lambda c: c["annotations"][1].update(image_id=77), "Annotation 11 .* image 77"),
        (lambda c: c["annotations"][1].update(bbox=[400, 3, 5, 5]), "outside its image of 90 x 60"),
        (lambda c: c["annotations"][1].update(bbox=[4, 3, -5, 5]), "not four finite numbers"),
        (lambda c: c["annotations"][1].update(bbox=[4, 3]), "Annotation 11 .* cannot be read"),
        (lambda c: c["annotations"][1].update(segmentation={"size": [9, 9], "counts": [81]}), r"mask of \[9, 9\] pixels"),
        (lambda c: c["images"][1].update(file_name="none.jpg"), "1 of the 4 images .*none.jpg first"),
        (lambda c: c["images"][0].pop("file_name"), "An image of .* has no 'file_name'"),
        (lambda c: c.pop("categories"), "no annotation file of COCO"),
    ],
)
def test_bad_coco_annotations_are_named(copy, edit, said):
    change(copy, edit)
    with pytest.raises(DataError, match=said):
        read_coco(copy, "train2017")


@pytest.mark.parametrize(
    "edit",
    [
        {"segmentation": []},
        {"segmentation": [[1, 2, 3, 4]]},
        {"segmentation": [[1, 2, 3, 4, 5]]},
        {"segmentation": [], "iscrowd": 1},
        {},
    ],
)
def test_what_is_measured_has_masks(copy, edit):
    """Refused before the training: pycocotools fails on some, and takes others for something else."""
    change(copy, lambda c: (c["annotations"][2].pop("segmentation"), c["annotations"][2].update(edit)), "val2017")
    with pytest.raises(DataError, match="Annotation 1020 of val2017 in .* has no segmentation.*Correct the annotation"):
        read(DETECTION_PRESETS["coco_fpn_mini"], str(copy))
    preset = changed(DETECTION_PRESETS["coco_fpn_mini"], mask=False)
    assert len(read(preset, str(copy))[1].photos) == 4


def test_polygons_of_two_corners_are_not_measured(copy):
    """The others of their object are."""
    change(copy, lambda c: c["annotations"][2]["segmentation"].insert(0, [1, 2, 3, 4]), "val2017")
    preset = DETECTION_PRESETS["coco_fpn_mini"]
    _, test = read(preset, str(copy))
    found = []
    for p in test.photos:
        masks = [rle.merge(rle.frPyObjects([m.tolist() for m in o.mask], p.height, p.width)) for o in p.objects]
        found.append(Found(np.array([o.box for o in p.objects]), np.ones(2), np.array([o.label for o in p.objects]), masks))
    assert [evaluate(preset, test, found)[kind]["AP"] for kind in ("box", "mask")] == pytest.approx([100, 100])


def test_a_set_without_objects_measures_nothing(copy):
    change(copy, lambda c: c["annotations"].clear(), "val2017")
    with pytest.raises(DataError, match="No image of val2017 in .* has an object to measure with"):
        read(DETECTION_PRESETS["coco_fpn_mini"], str(copy))


def test_bad_files_are_named(copy):
    with pytest.raises(DataError, match="There is no .*instances_test2017.json"):
        read_coco(copy, "test2017")
    (copy / "annotations" / "instances_val2017.json").write_text("{")
    with pytest.raises(DataError, match="no annotation file of COCO"):
        read_coco(copy, "val2017")
    with pytest.raises(DataError, match="There is no .*VOC2007.*trainval.txt"):
        read_voc(copy, ["2007/trainval"])


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("</annotation>", "", "no annotation file of VOC"),
        ("<name>dog</name>", "<name>unicorn</name>", "class 'unicorn'"),
        ("<xmin>5</xmin>", "<xmin>95</xmin>", r"\[94.0, 6.0, 34.0, 36.0\], which is not"),
        ("<xmin>5</xmin>", "", "no annotation file of VOC"),
        ("<width>90</width>", "<width>20</width>", "outside its image of 20 x 60"),
    ],
)
def test_bad_voc_annotations_are_named(copy, old, new, said):
    path = copy / "VOC2012" / "Annotations" / "000001.xml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=said):
        read_voc(copy, ["2012/train"])


def test_missing_voc_files_are_named(copy):
    (copy / "VOC2012" / "JPEGImages" / "000002.jpg").unlink()
    with pytest.raises(DataError, match="1 of the 4 images .*000002.jpg"):
        read_voc(copy, ["2012/train"])
    (copy / "VOC2012" / "Annotations" / "000003.xml").unlink()
    with pytest.raises(DataError, match="000003.xml"):
        read_voc(copy, ["2012/train"])


def test_images_that_do_not_fit_their_annotation(copy):
    photo = read_coco(copy, "train2017").photos[0]
    Image.new("RGB", (60, 90)).save(photo.path)
    with pytest.raises(DataError, match="60 x 90 pixels, and its annotation says 90 x 60"):
        decode(photo)
    photo.path.write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot be decoded"):
        decode(photo)


def test_exif_turns_the_image(copy):
    """Annotations are of the upright image (methods/transfer.md section 7)."""
    photo = read_coco(copy, "train2017").photos[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photo.path).transpose(Image.Transpose.ROTATE_90).save(photo.path, exif=exif)
    assert decode(photo).size == (90, 60)


def test_objects_follow_the_image(data):
    """Rectangles of light: resized and flipped, boxes and polygons lie where the light is."""
    photo = read_coco(data, "train2017").photos[0]
    for flip in (False, True):
        got = sample(photo, side=120, longest=1000, flip=flip, masks=True)
        assert got.pixels.shape == (3, 120, 180) and got.pixels.dtype == torch.uint8
        for box, label, polygons in zip(got.target.boxes, got.target.classes, got.target.polygons, strict=True):
            x0, y0, x1, y1 = box.round().int().tolist()
            light = got.pixels[1 - int(label)]  # the first class, "cat", has label 1 and is red
            assert light[y0 + 3 : y1 - 3, x0 + 3 : x1 - 3].float().mean() > 200
            assert light[:, max(x0 - 20, 0) : max(x0 - 3, 1)].float().mean() < 150
            drawn = rle.decode(rle.merge(rle.frPyObjects([p.tolist() for p in polygons], 120, 180)))
            ys, xs = np.nonzero(drawn)
            assert np.abs(np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) - box.numpy()).max() <= 1


def test_boxes_are_cut_at_the_border_and_polygons_are_not(copy):
    change(copy, lambda c: c["annotations"][0].update(bbox=[-6, -4, 300, 40], segmentation=[[-6, -4, 294, -4, 294, 36]]))
    got = sample(read_coco(copy, "train2017").photos[0], side=60, longest=1000, masks=True)
    assert got.target.boxes[0].tolist() == [0, 0, 90, 36]
    assert got.target.polygons[0][0].tolist() == [-6, -4, 294, -4, 294, 36]


def test_bitmaps_move_with_the_image():
    bitmap = np.zeros((10, 20), np.uint8)
    bitmap[2:6, 1:5] = 1
    got = moved(rle.encode(np.asfortranarray(bitmap)), scale=np.array([2.0, 2.0]), height=20, width=40, flip=True)
    ys, xs = np.nonzero(rle.decode(got))
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == (30, 37, 4, 11)


def test_batches_are_of_one_orientation_and_passes_are_whole():
    wide = [True] * 5 + [False] * 3
    first = list(islice(order(wide, batch=2, rank=0, world=1, seed=0), 40))
    assert all(len({wide[i] for _, i in batch}) == 1 for batch in first)
    seen = [i for batch in first for epoch, i in batch if epoch == 3]
    assert sorted(seen) == list(range(8))
    assert first != list(islice(order(wide, batch=2, rank=0, world=1, seed=1), 40))


def test_ranks_share_every_pass():
    ranks = [list(islice(order([True] * 7, batch=1, rank=rank, world=2, seed=0), 14)) for rank in range(2)]
    assert sorted(i for batches in ranks for ((epoch, i),) in batches if epoch == 1) == list(range(7))


def test_training_images_go_on_where_they_stopped(data):
    photos = read_coco(data, "train2017").learnable(masks=True)
    options = {"masks": True, "batch": 2, "rank": 0, "world": 1, "seed": 0, "threads": 1}
    images = TrainingPhotos(photos, (40, 48, 56), 1000, **options)
    all_batches, later = list(islice(images.from_step(0), 5)), list(islice(images.from_step(3), 2))
    for a, b in zip([s for batch in all_batches[3:] for s in batch], [s for batch in later for s in batch], strict=True):
        assert torch.equal(a.pixels, b.pixels) and torch.equal(a.target.boxes, b.target.boxes)
    assert len({min(s.pixels.shape[1:]) for batch in all_batches for s in batch}) > 1
