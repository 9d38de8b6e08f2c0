"""Parts of a stored data set, chosen when it is read, so that one file serves every subset.

1percent, 10percent   the ImageNet lists of semi-supervised evaluations (SimCLR's, which SFRIK and LEWEL use), shipped here
first:N               the first N images of each class in stored order: first:260 is the IN20% of OBoW and SFRIK
after:N               the N images of each class that follow first:N, one left out in between: SFRIK's separate validation
                      set, whose code starts at N + 1 (methods/sfrik.md, 9)
random:N, random:N:S  N images of each class drawn by the seed S (0); the same whatever the seed of the training
PATH                  a text file with the name of an image on each line: FILE, or CLASS/FILE as stored
"""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from loaders.class_folders import listed
from loaders.errors import DataError
from loaders.order import draw

IMAGENET = {
    "1percent": "71e82a48ba78252683ae334c4d019ebd5c6e855b9599c1389fbe83eb9549cf17",
    "10percent": "6d09de11e7bdaf5b1f3b1f249b6183695f97310cdd20f0c03e7235b6b9392091",
}
"""The shipped lists, and the SHA-256 of each: lines in the published order, a line feed after every one."""

_RULES = (
    "1percent or 10percent (ImageNet's lists), first:N, after:N, random:N or random:N:SEED (N images of each class), or the path of a "
    "text file of image names"
)


def imagenet_list(name: str) -> list[str]:
    """File names of a list of `IMAGENET`, nWWWWWWWW_ID.JPEG, in the published order.  DataError when the shipped file is damaged."""
    file = Path(__file__).parent / "imagenet_subsets" / f"{name}.txt.xz"
    try:
        text = lzma.decompress(file.read_bytes())
    except (OSError, lzma.LZMAError) as e:
        raise DataError(f"{file}, ImageNet's list {name}, cannot be read ({e}). Install fastssl again.") from e
    if hashlib.sha256(text).hexdigest() != IMAGENET[name]:
        raise DataError(f"{file} is not ImageNet's published list {name}: its SHA-256 differs. Install fastssl again.")
    return text.decode().splitlines()


def select(
    rule: str,
    *,
    labels: np.ndarray | None,
    names: Callable[[], Sequence[str] | None],
    classes: Sequence[str] | None,
    path: Path,
) -> np.ndarray:
    """Sorted ids of the samples a rule chooses, int64 [M].

    labels: int64 [N] or None.  names: gives the stored path of every sample, or None where it is not known; called when a rule
    needs it.  path: the data set, for messages.  Raises DataError for an unknown rule, for a class with too few images, for
    names that are missing or not unique, and without the labels or names that a rule needs.
    """
    kind, _, rest = rule.partition(":")
    if rule in IMAGENET:
        return _named(imagenet_list(rule), names(), rule, path)
    if kind in ("first", "after", "random"):
        numbers = rest.split(":")
        if len(numbers) > 1 + (kind == "random") or not all(n.isdecimal() for n in numbers) or int(numbers[0]) < 1:
            raise DataError(f"'{rule}' is no subset: {kind} takes a number of images per class, {kind}:260. Write {_RULES}.")
        if labels is None:
            raise DataError(
                f"The subset {rule} counts the images of each class, and {path} has no labels. Give labelled data, or the path of a text "
                "file of image names."
            )
        count, seed = int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0
        return _of_each_class(kind, count, seed, labels, classes, rule, path)
    if not Path(rule).is_file():
        raise DataError(f"'{rule}' is no subset and no file. Write {_RULES}.")
    text = Path(rule).read_text("utf-8", "surrogateescape")
    return _named([line for raw in text.splitlines() if (line := raw.strip())], names(), rule, path)


def _of_each_class(
    kind: str, count: int, seed: int, labels: np.ndarray, classes: Sequence[str] | None, rule: str, path: Path
) -> np.ndarray:
    order = np.argsort(labels, kind="stable")
    present, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    start = count + 1 if kind == "after" else 0
    if (poor := sizes < start + count).any():
        few = [f"{classes[c] if classes else f'class {c}'} has {n}" for c, n in zip(present[poor], sizes[poor], strict=True)]
        most = (int(sizes.min()) - 1) // 2 if kind == "after" else int(sizes.min())
        way_out = f"Choose at most {kind}:{most}, or another part" if most > 0 else "Choose another part"
        raise DataError(
            f"The subset {rule} takes {count} images of each class{f' from number {start + 1} on' * (kind == 'after')}, and {len(few)} of "
            f"the {len(present)} classes of {path} are too small: {listed(few)}. {way_out}."
        )
    if kind == "random":
        chosen = np.concatenate([s + draw(count, int(n), seed, int(c)) for c, s, n in zip(present, starts, sizes, strict=True)])
    else:
        chosen = (starts[:, None] + np.arange(start, start + count)).ravel()
    return np.sort(order[chosen])


def _named(wanted: Sequence[str], stored: Sequence[str] | None, rule: str, path: Path) -> np.ndarray:
    """Samples by their stored path or its last part; each of `wanted` must be there once."""
    if stored is None:
        raise DataError(
            f"The subset {rule} is a list of names, and {path} has no sidecar that tells its images' names. Convert the images again "
            "with python -m convert.imagenet, or choose a subset by count, such as random:13."
        )
    if not wanted:
        raise DataError(f"The subset {rule} names no image. Write one name on each line.")
    found: dict[str, int | None] = dict.fromkeys(wanted)
    twice = []
    for i, name in enumerate(stored):
        for key in {name, name.rpartition("/")[2]}:
            if key in found:
                if found[key] is not None:
                    twice.append(key)
                found[key] = i
    if twice:
        raise DataError(
            f"The subset {rule} names {listed(twice, 3)}, and {path} has several images of that name in different folders. Write "
            "CLASS/FILE on each line."
        )
    if missing := [name for name, i in found.items() if i is None]:
        raise DataError(
            f"{len(missing):,} of the {len(found):,} images of the subset {rule} are not in {path}: {listed(missing, 3)}. Use the data set "
            "that the list was made for, complete."
        )
    return np.array(sorted(set(found.values())), np.int64)
