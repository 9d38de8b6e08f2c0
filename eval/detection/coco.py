"""COCO's annotation files (methods/transfer.md section 7): DIR/annotations/instances_SPLIT.json, images in DIR/SPLIT."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from pycocotools import mask as rle

from eval.detection.annotations import DetectionSet, Object, Photo, check_images, checked_box
from eval.detection.config import ObjectMask
from loaders.errors import DataError


def read_coco(folder: Path, split: str) -> DetectionSet:
    """One split.  Crowds are no objects; the evaluator finds them in `dataset`.  DataError for annotations that cannot be used."""
    path = folder / "annotations" / f"instances_{split}.json"
    if not path.is_file():
        raise DataError(f"There is no {path}. --data is COCO's folder: annotations, train2017 and val2017 are in it.")
    try:
        dataset = json.loads(path.read_text())
        images = {image["id"]: image for image in dataset["images"]}
        categories = sorted((c["id"], c["name"]) for c in dataset["categories"])
        annotations = dataset["annotations"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no annotation file of COCO's ({type(error).__name__}: {error}): it is a JSON object with images, annotations and "
            f"categories. Download it again."
        ) from error
    labels = {category: label for label, (category, _) in enumerate(categories)}
    objects: dict[int, list[Object]] = defaultdict(list)
    for annotation in annotations:
        try:
            image, found = _object(annotation, images, labels, path)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"Annotation {annotation.get('id', '?')} of {path} cannot be read ({type(error).__name__}: {error}). Correct it, or "
                f"download the file again."
            ) from error
        if found is not None:
            objects[image].append(found)
    try:
        photos = [
            Photo(number, folder / split / image["file_name"], image["height"], image["width"], objects[number])
            for number, image in sorted(images.items())
        ]
    except (KeyError, TypeError) as error:
        raise DataError(f"An image of {path} has no {error}. Download the file again.") from error
    check_images(photos, path)
    return DetectionSet(photos, [name for _, name in categories], [number for number, _ in categories], dataset)


def _object(annotation: dict, images: dict, labels: dict[int, int], path: Path) -> tuple[int, Object | None]:
    """The image of an annotation and its object, None for a crowd."""
    image, category = annotation["image_id"], annotation["category_id"]
    where = f"Annotation {annotation['id']} of {path}"
    if image not in images:
        raise DataError(f"{where} is of the image {image}, which the file does not list. Take annotations and images of one download.")
    if category not in labels:
        raise DataError(f"{where} is of the category {category}, which the file does not list. Its categories are {sorted(labels)}.")
    height, width = images[image]["height"], images[image]["width"]
    x, y, w, h = annotation["bbox"]
    box = checked_box((x, y, x + w, y + h), height, width, where)
    crowd, _ = annotation["iscrowd"], annotation["area"]  # the evaluator needs both
    if crowd:
        return image, None
    mask = _mask(annotation["segmentation"], height, width, where) if "segmentation" in annotation else None
    return image, Object(box, labels[category], mask)


def with_masks(dataset: dict, where: str) -> dict:
    """The annotation file with polygons of three corners or more alone: pycocotools takes two corners for a box.

    where: what the annotations are of.  DataError for an annotation without a mask, crowds included.
    """
    annotations = []
    for annotation in dataset["annotations"]:
        mask = annotation.get("segmentation")
        mask = polygons(mask) if isinstance(mask, list) else mask
        if not mask:
            raise DataError(
                f"Annotation {annotation['id']} of {where} has no segmentation, or no polygon of three corners, and masks are measured. "
                f"Correct the annotation, or take a preset without masks."
            )
        annotations.append(annotation | {"segmentation": mask})
    return dataset | {"annotations": annotations}


def polygons(segmentation: list) -> list[list[float]]:
    """Those with at least three corners."""
    return [polygon for polygon in segmentation if len(polygon) % 2 == 0 and len(polygon) >= 6]


def _mask(segmentation: list | dict, height: int, width: int, where: str) -> ObjectMask:
    if isinstance(segmentation, list):
        return [np.array(polygon, np.float64) for polygon in polygons(segmentation)]
    if list(segmentation["size"]) != [height, width]:
        raise DataError(
            f"{where} has a mask of {segmentation['size']} pixels, and its image has {[height, width]}. Correct the annotation."
        )
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, height, width)
    return segmentation
