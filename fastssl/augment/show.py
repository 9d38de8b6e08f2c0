"""`python -m fastssl.augment.show --recipe dino photo.jpg`: a contact sheet of a recipe, our views next to Pillow's.

Per image: the source with every view's box, then for each view what training gets, what Pillow and torchvision make of the
same draws, and the difference between the two.  A wrong box, flip or order of operations is seen at a glance.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import PIL
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastssl.augment import Augmenter, patches, pillow
from fastssl.augment.draws import HUE, ColourDraws, ColourParams
from fastssl.batch import ImageBatch
from fastssl.cli import check_name
from fastssl.config import ConfigError
from fastssl.files import whole
from fastssl.pictures import CAPTION, COLOURS, FRAME, GAP, MARGIN, denormalise, framed, picture, pixels_of_views, with_boxes
from fastssl.recipes import RECIPES
from fastssl.views import PatchCrop, ViewSpec
from loaders.errors import DataError
from loaders.geometry import Geometry
from loaders.images import open_image, to_rgb

AMPLIFIED = 16
"""Factor of the differences on the sheet."""
CELL = 224 + 2 * FRAME
"""Side of a picture with its frame, pixels: a view of 224 is shown one to one."""
SOURCE = 448
"""Longest side of the source image on the sheet, pixels."""
CARD = 3 * CELL + 2 * FRAME, 4 * CAPTION + CELL
"""Width and height of one picture's card: four lines above ours, Pillow's and the difference."""
ONE_COLUMN_UP_TO = 3
"""Cards of an image that lie one below the other; more take two columns."""
FONT, TAG = 12, (6, 15)
"""Pixels of the text; what a tag adds to the width of its text, and its height."""


@dataclass(frozen=True)
class Card:
    """One picture of a view, the view or a patch of it, by us and by Pillow."""

    name: str
    """Number of the view, and of the patch."""
    view: int
    box: Sequence[float]
    """What the picture shows: top, left, height, width in source pixels."""
    drawn: tuple[str, str, str]
    """Where it was cut, its jitter, its other operations."""
    ours: Tensor
    """float32 [s, s, 3] in grey levels, not rounded; theirs alike."""
    theirs: Tensor

    @property
    def difference(self) -> Tensor:
        return (self.ours - self.theirs).abs()


def decode(paths: Sequence[Path]) -> list[Image.Image]:
    """Image files -> 8-bit RGB as a loader gives it.  DataError names every file that is no image."""
    images, bad = [], []
    for path in paths:
        try:
            with open_image(path) as image:
                images.append(to_rgb(image))
        except FileNotFoundError:
            bad.append(f"{path} does not exist")
        except IsADirectoryError:
            bad.append(f"{path} is a folder")
        except Exception as error:  # Pillow raises whatever a broken file leads to
            bad.append(f"{path} cannot be read as an image ({error})")
    if bad or not paths:
        raise DataError(f"{'; '.join(bad) or 'No image was given'}. Name one or more image files, such as JPEGs or PNGs.")
    return images


def as_batch(images: Sequence[Image.Image], spec: ViewSpec, *, seed: int, epoch: int, device: torch.device) -> ImageBatch:
    """Images -> the batch a loader would deliver if these were samples 0, 1, ... of its data set."""
    arrays = [np.asarray(image) for image in images]
    height, width = (np.array([a.shape[axis] for a in arrays], np.int32) for axis in (0, 1))
    boxes, flips = Geometry(spec, seed).draw(np.arange(len(arrays)), epoch, height, width)
    return ImageBatch.of(arrays, boxes, flips, epoch=epoch, device=device)


def cards(images: Sequence[Image.Image], batch: ImageBatch, spec: ViewSpec, augment: Augmenter, seed: int) -> list[list[Card]]:
    """The pictures of every image, in the views' order: by `augment`, which has that seed, and by Pillow with the same draws."""
    key = batch.key.cpu()
    params = ColourDraws(spec, device=key.device, seed=seed)(batch.epoch, key)
    corners = {
        v: patches.draw(view.crop, seed=seed, epoch=batch.epoch, key=key, view=v).tolist()
        for v, view in enumerate(spec)
        if isinstance(view.crop, PatchCrop)
    }
    boxes, flips = batch.boxes.tolist(), batch.flips.tolist()
    ours = [denormalise(x, spec[v].photometric) for v, x in pixels_of_views(augment(batch))]
    out = []
    for i, image in enumerate(images):
        out.append([])
        for v, view in enumerate(spec):
            crop, box, flip = view.crop, boxes[i][v], flips[i][v]
            whole = pillow.colour(pillow.cut(image, crop, box, flip), params, v, i)
            cut = f"{crop.size} px {crop.interpolation}   box {box[3]:.5g} x {box[2]:.5g} at left {box[1]:.5g}, top {box[0]:.5g}"
            cut += "   flipped" if flip else ""
            names, windows = [f"{v + 1}"], [(0, 0, crop.size)]
            if v in corners:
                windows = [(*corner[i], crop.patch_size) for corner in corners[v]]
                names = [f"{v + 1}.{p + 1}" for p in range(len(windows))]
            for name, (y, x, side) in zip(names, windows, strict=True):
                part = f"{side} px at left {x}, top {y} of " if v in corners else ""
                out[i].append(
                    Card(
                        name=name,
                        view=v,
                        box=in_source(box, flip, crop.size, y, x, side),
                        drawn=(part + cut, *colour_text(params, v, i)),
                        ours=ours[len(out[i])][i],
                        theirs=torch.from_numpy(np.array(whole.crop((x, y, x + side, y + side)))).float(),
                    )
                )
    return out


def in_source(box: Sequence[float], flip: bool, size: int, y: int, x: int, side: int) -> tuple[float, float, float, float]:
    """The box, in source pixels, of the square at y, x of a view of `size` that shows `box`, perhaps mirrored."""
    top, left, height, width = box
    x = size - side - x if flip else x
    return top + y * height / size, left + x * width / size, side * height / size, side * width / size


def colour_text(params: ColourParams, v: int, i: int) -> tuple[str, str]:
    """What was drawn for one picture: the jitter's factors in their order, and the other operations."""
    steps = []
    for op in params.order[v, i].tolist() if params.jitter[v, i] else ():
        name = pillow.ADJUST[op][1]
        amount = float(getattr(params, name)[v, i])
        steps.append(f"{name} {amount:+.3f}" if op == HUE else f"{name} x {amount:.2f}")
    sigma = float(params.sigma[v, i])
    others = (
        "grey" if params.grey[v, i] else "not grey",
        f"blur {sigma:.2f} px" if sigma > 0 else "no blur",
        "solarised" if params.solarize[v, i] else "not solarised",
    )
    return ", ".join(steps) or "no jitter", ", ".join(others)


# ------------------------------------------------------------------------------------------------ the sheet


def sheet(title: str, names: Sequence[str], images: Sequence[Image.Image], of_images: Sequence[Sequence[Card]]) -> Image.Image:
    """The page: `title`, then per image its name, the source with the cards' boxes, and the cards."""
    columns = 1 if len(of_images[0]) <= ONE_COLUMN_UP_TO else 2
    rows = math.ceil(len(of_images[0]) / columns)
    scales = [SOURCE / max(image.size) for image in images]
    heights = [CAPTION + max(rows * (CARD[1] + GAP) - GAP, round(scale * im.height)) for scale, im in zip(scales, images, strict=True)]
    width = 2 * MARGIN + SOURCE + columns * (2 * GAP + CARD[0])
    page = Image.new("RGB", (width, 2 * MARGIN + CAPTION + sum(heights) + 2 * GAP * len(images)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=FONT)

    draw.text((MARGIN, MARGIN), title, fill="black", font=font)
    top = MARGIN + CAPTION + 2 * GAP
    for name, image, scale, height, of_image in zip(names, images, scales, heights, of_images, strict=True):
        draw.text((MARGIN, top), f"{name}   {image.width} x {image.height} px", fill="black", font=font)
        source = with_boxes(image, scale, [(card.view, card.box) for card in of_image])
        tag_boxes(source, scale, of_image)
        page.paste(source, (MARGIN, top + CAPTION))
        for n, card in enumerate(of_image):
            row, column = divmod(n, columns)
            left = MARGIN + SOURCE + 2 * GAP + column * (2 * GAP + CARD[0])
            page.paste(draw_card(card), (left, top + CAPTION + row * (CARD[1] + GAP)))
        top += height + 2 * GAP
    return page


def tag(draw: ImageDraw.ImageDraw, x: float, y: float, card: Card) -> None:
    """The card's name on its view's colour."""
    draw.rectangle((x, y, x + tag_width(card) - 1, y + TAG[1] - 1), fill=COLOURS[card.view % len(COLOURS)])
    draw.text((x + TAG[0] / 2, y), card.name, fill="white", font=ImageFont.load_default(size=FONT))


def tag_width(card: Card) -> int:
    return TAG[0] + math.ceil(ImageFont.load_default(size=FONT).getlength(card.name))


def tag_boxes(source: Image.Image, scale: float, of_image: Sequence[Card]) -> None:
    """A tag inside the upper left corner of each card's box, moved right past those that are there already."""
    draw = ImageDraw.Draw(source)
    taken: list[tuple[float, float, float]] = []
    for card in of_image:
        x, width = max(scale * card.box[1], 0), tag_width(card)
        y = min(max(scale * card.box[0], 0), max(source.height - TAG[1], 0))
        for begin, end, other_y in sorted(taken):
            if begin < x + width and x < end and abs(other_y - y) < TAG[1]:
                x = end
        taken.append((x, x + width, y))
        tag(draw, x, y, card)


def draw_card(card: Card) -> Image.Image:
    out = Image.new("RGB", CARD, "white")
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(size=FONT)
    tag(draw, 0, 0, card)
    for line, text in enumerate(card.drawn):
        draw.text((0 if line else tag_width(card) + TAG[0], line * CAPTION), text, fill="black", font=font)
    error = f"difference x {AMPLIFIED}: mean {card.difference.mean():.2f}, largest {card.difference.max():.1f}"
    of_card = (("ours", card.ours), ("Pillow", card.theirs), (error, AMPLIFIED * card.difference))
    for n, (text, levels) in enumerate(of_card):
        left = n * (CELL + FRAME)
        draw.text((left, 3 * CAPTION), text, fill="#555555", font=font)
        out.paste(framed(picture(levels), CELL, card.view), (left, 4 * CAPTION))
    return out


# ------------------------------------------------------------------------------------------------ the command


@dataclass(frozen=True)
class Args:
    """A contact sheet of a recipe: each image with its boxes, and every view by us and by Pillow from the same draws."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files."""
    recipe: Annotated[str, tyro.conf.arg(metavar="NAME", help=" | ".join(RECIPES))]
    out: Path | None = None
    """The sheet, a PNG; default: views_RECIPE.png in the working directory."""
    seed: int = 0
    """With the epoch and an image's place on the command line it decides every draw."""
    epoch: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where our views are made."""


def device_named(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """auto: CUDA where torch can use it.  ConfigError for a CUDA that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("There is no CUDA device that torch can use here. Leave --device out, or take --device cpu.")
    return torch.device("cuda" if torch.cuda.is_available() and name != "cpu" else "cpu")


def check_out(out: Path, images: Sequence[Path]) -> None:
    """ConfigError when the sheet of these images cannot go to `out`."""
    if out.suffix.lower() != ".png" or out.resolve() in [path.resolve() for path in images]:
        raise ConfigError(f"The sheet cannot be {out}: choose another file with --out FILE.png, not one of the images.")
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(f"The sheet cannot be written to {out}: its folder is missing or read-only. Choose another with --out FILE.png.")


def show(args: Args) -> str:
    """Write the sheet -> one line about it.  ConfigError or DataError before anything is computed."""
    spec = check_name("recipe", args.recipe, RECIPES)()
    device = device_named(args.device)
    out = args.out or Path(f"views_{args.recipe}.png")
    check_out(out, args.images)
    images = decode(args.images)

    batch = as_batch(images, spec, seed=args.seed, epoch=args.epoch, device=device)
    augment = Augmenter(spec, device=device, dtype=torch.float32, seed=args.seed)
    of_images = cards(images, batch, spec, augment, args.seed)
    title = (
        f"recipe {args.recipe}   seed {args.seed}, epoch {args.epoch}   "
        f"ours by {augment.implementation} on {device.type}   Pillow {PIL.__version__}   "
        f"absolute differences in grey levels of 0..255, drawn {AMPLIFIED} times as large"
    )
    page = sheet(title, [path.name for path in args.images], images, of_images)
    whole(out, lambda partial: page.save(partial, format="PNG"))
    differences = [card.difference for of_image in of_images for card in of_image]
    mean, largest = sum(float(d.mean()) for d in differences) / len(differences), max(float(d.max()) for d in differences)
    return f"{out}: {len(differences)} pictures; Pillow's differ by {mean:.2f} grey levels in the mean, {largest:.1f} at most"


def main(argv: Sequence[str] | None = None) -> None:
    args = tyro.cli(Args, prog="python -m fastssl.augment.show", args=argv)
    try:
        print(show(args))
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
