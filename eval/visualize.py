"""`python -m eval.visualize --checkpoint runs/NAME/checkpoint_last.pt`: a contact sheet of where a network looks.

SCFS: attention of every local crop on the first global crop, at three stages, with the place where the local crop was cut.
LEWEL: alignment maps.  Any ViT: [CLS] attention of the last block, head by head.  The colours of a map run from its lowest to
its highest value, which stand above it; every position of the map is an equal part of the picture, nothing is interpolated.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont

from eval.attention_maps import CELL, SCALE, AlignmentMaps, Block, ClsAttention, LocalAttention, plain
from fastssl import checkpoint
from fastssl.augment.augmenter import Augmenter
from fastssl.augment.show import as_batch, check_out, decode, device_named
from fastssl.checkpoint import CheckpointError
from fastssl.config import ConfigError, EvalConfig, RunConfig, from_dict
from fastssl.distributed import Dist
from fastssl.files import whole
from fastssl.method import Method
from fastssl.methods import METHODS, build_method
from fastssl.methods.lewel import LEWEL
from fastssl.methods.lewel_m import LEWELM
from fastssl.methods.scfs import SCFS
from fastssl.models.backbones import MOCOV3_VITS, VITS
from fastssl.models.vit import ViT
from fastssl.models.weights import load_backbone
from fastssl.pictures import CAPTION, GAP, MARGIN
from fastssl.presets import PRESETS
from fastssl.views import CenterCrop, Photometric, View, ViewSpec
from loaders.build import EvalLoader
from loaders.errors import DataError
from loaders.geometry import Geometry
from loaders.open import open_decoder

COLUMNS = 8
"""Pictures beside each other, after the column of what was cut."""
FONT, CHARACTER = 12, 6.5
"""Pixels of the text: its size, and what a character of a paragraph takes at most on average."""
BAR = 120, 10
"""Width and height of the bar of colours, pixels."""
DRAWN = "runs of scfs (attention of local crops), lewel and lewel_m (alignment maps), and any ViT ([CLS] attention), also without its run"

Subject = LocalAttention | AlignmentMaps | ClsAttention


@dataclass(frozen=True, kw_only=True)
class Args:
    """A contact sheet of where a network looks: SCFS's local crops, LEWEL's alignment maps, or a ViT's [CLS] token."""

    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Image files; without any, some validation images of the run's data."""
    checkpoint: str
    """A run's checkpoint_last.pt; for ViTs also backbone.safetensors, a timm state dict, or random:ARCH[:SEED]."""
    data: str | None = None
    """Folder with other data to take validation images from."""
    count: int = 4
    """How many, spread evenly over the validation set."""
    out: Path | None = None
    """The sheet, a PNG; default: beside the checkpoint (for a random backbone: in the working directory)."""
    network: Literal["online", "target"] | None = None
    """Which network of a run; default: the one its method is evaluated by. SCFS: whose map of the global crop is searched."""
    size: int | None = None
    """LEWEL and ViTs: side of the centre crop, pixels; default: that of the run's evaluations, or 224."""
    maps: int | None = None
    """LEWEL: maps shown of each group; default: 2."""
    seed: int = 0
    """SCFS: decides, with an image's place on the sheet, its crops."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


# ------------------------------------------------------------------------------------------------ the checkpoint


def read_run(name: str) -> dict | None:
    """Contents of a training checkpoint; None for everything else, of which `load_backbone` knows what it is or is not."""
    try:
        return checkpoint.load(Path(name))
    except CheckpointError:
        return None


def saved_config(saved: dict, name: str) -> RunConfig:
    """The configuration of a training checkpoint.  CheckpointError when this version lacks its method, preset or an option."""
    for kind, table in (("method", METHODS), ("preset", PRESETS)):
        if saved[kind] not in table:
            raise CheckpointError(f"{name} is of the {kind} '{saved[kind]}', which this version does not know. Use the one that wrote it.")
    try:
        return from_dict(saved["config"], PRESETS[saved["preset"]]())
    except ValueError as error:  # ConfigError, or another number of views
        raise CheckpointError(f"{name} cannot be rebuilt: {str(error).rstrip('.')}. Use the version that wrote it.") from error


def load_method(saved: dict, cfg: RunConfig, name: str) -> Method:
    """The method with the weights of a training checkpoint, in eval mode on the CPU.  CheckpointError for weights that do not fit."""
    method = build_method(cfg)
    checkpoint.load_weights(method, saved, Path(name))
    if not all(bool(t.isfinite().all()) for t in method.state_dict().values()):
        raise CheckpointError(f"{name} holds weights that are not finite: the run diverged. Take an earlier checkpoint.")
    return method.eval()


def centre_crop(size: int | None, e: EvalConfig, normalisation: Photometric) -> ViewSpec:
    """The crop of evaluations; of another size it shows the same part of the image at another resolution."""
    size = e.crop if size is None else size
    if size < 1:
        raise ConfigError(f"--size must be a positive number of pixels, got {size}.")
    crop = CenterCrop(size=size, resize=round(size * e.resize / e.crop), interpolation="bicubic")
    return (View(crop=crop, photometric=plain(normalisation)),)


def open_subject(args: Args) -> tuple[Subject, str, RunConfig | None]:
    """What the checkpoint has to show, what it is in words, and its configuration when it is a run's."""
    name, saved = args.checkpoint, read_run(args.checkpoint)
    if args.maps is not None and (saved is None or saved["method"] not in (LEWEL.Config.name, LEWELM.Config.name)):
        raise ConfigError(f"--maps is for runs of lewel and lewel_m, and {name} is none: leave it out.")
    if saved is None:
        backbone, about = load_backbone(name, network=args.network or "online")
        if not isinstance(backbone, ViT):
            raise CheckpointError(f"{name} is a {about['arch']} by itself, which makes no maps. What can be drawn: {DRAWN}.")
        crop = centre_crop(args.size, EvalConfig(), Photometric(**(about["normalisation"] or {})))
        return ClsAttention(backbone, crop), f"{about['arch']}, {about['source']}", None
    cfg = saved_config(saved, name)
    kind, arch = METHODS[cfg.method.name], cfg.model.arch
    if kind not in (SCFS, LEWEL, LEWELM) and arch not in (*VITS, *MOCOV3_VITS):
        raise CheckpointError(f"{name} is a {arch} trained with {cfg.method.name}, which makes no maps. What can be drawn: {DRAWN}.")
    network = args.network or kind.evaluated
    prefix = kind.target_backbone_prefix if network == "target" else kind.backbone_prefix
    if prefix is None:
        raise CheckpointError(f"{name} is of the method {cfg.method.name}, which has no target network: take --network online.")
    if kind is SCFS and args.size is not None:
        raise ConfigError("--size is for centre crops, and SCFS is shown the crops of its training: leave it out.")
    if args.maps is not None and args.maps < 1:
        raise ConfigError(f"--maps must be at least 1, got {args.maps}.")

    method = load_method(saved, cfg, name)
    about = f"{cfg.method.name}, {arch}, step {saved['step']}, {network} network"
    if isinstance(method, SCFS):
        return LocalAttention(method, cfg.views, network, args.seed), about, cfg
    crop = centre_crop(args.size, cfg.eval, cfg.views[0].photometric)
    if isinstance(method, LEWEL | LEWELM):
        return AlignmentMaps(method.get_submodule(prefix.removesuffix(".backbone.")), crop, args.maps or 2), about, cfg
    return ClsAttention(method.get_submodule(prefix.rstrip(".")), crop), about, cfg


# ------------------------------------------------------------------------------------------------ images


def validation_images(path: str, count: int) -> tuple[list[str], list[Image.Image]]:
    """`count` images spread evenly over the validation set, fewer if it has fewer, and their names."""
    cpu = torch.device("cpu")
    try:
        decoder = open_decoder(path, "val", backend="auto", workers=1, device=cpu)
    except DataError as error:
        raise DataError(f"{error} Or name image files, or other data with --data DIR.") from error
    ids = np.unique(np.linspace(0, len(decoder) - 1, count).round().astype(np.int64))
    images = []
    for batch in EvalLoader(decoder, Geometry(()), dist=Dist(0, 1, 0, 1, cpu), batch=len(ids), prefetch=1, ids=ids):
        images += [Image.fromarray(batch.image(i).clone().numpy()) for i in range(len(batch))]
    names = [f"validation image {i}" for i in ids]
    if decoder.labels is not None:
        classes = decoder.classes
        names = [f"{n}   class {classes[c] if classes else c}" for n, c in zip(names, decoder.labels[ids], strict=True)]
    return names, images


def find_images(args: Args, cfg: RunConfig | None) -> tuple[list[str], list[Image.Image]]:
    if args.images and args.data:
        raise ConfigError("Images are named and --data says to take others: leave one of the two out.")
    if args.images:
        return [path.name for path in args.images], decode(args.images)
    if args.count < 1:
        raise ConfigError(f"--count must be at least 1, got {args.count}.")
    path = args.data or (cfg.data.path if cfg else None)
    if path is None:
        raise ConfigError(f"{args.checkpoint} does not say what it was trained on. Name image files, or a data set with --data DIR.")
    return validation_images(path, args.count)


# ------------------------------------------------------------------------------------------------ the sheet


def sheet(title: str, text: str, names: Sequence[str], images: Sequence[Image.Image], blocks: Sequence[Block]) -> Image.Image:
    """The page: title, text and bar of colours, then per image its name and its block."""
    unit, count = blocks[0].unit, len(blocks[0].panels)
    columns = unit * max(1, min(count, COLUMNS) // unit)
    lines = max(len(blocks[0].cut), -(-count // columns))
    across, down = CELL + GAP, 2 * CAPTION + CELL + GAP
    width = 2 * MARGIN + (1 + columns) * across - GAP
    head = [part for p in (title, text) for part in textwrap.wrap(p, int((width - 2 * MARGIN) / CHARACTER))]
    first = MARGIN + (len(head) + 1) * CAPTION + 2 * GAP
    page = Image.new("RGB", (width, first + len(blocks) * (CAPTION + lines * down + GAP) - 2 * GAP + MARGIN), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=FONT)

    def write_line(x: float, y: float, line: str, fill: str = "black") -> float:
        draw.text((x, y), line, fill=fill, font=font)
        return x + font.getlength(line)

    for n, line in enumerate(head):
        write_line(MARGIN, MARGIN + n * CAPTION, line)
    bar = (255 * colormaps[SCALE](np.linspace(0, 1, BAR[0]))[None, :, :3]).round().astype(np.uint8).repeat(BAR[1], 0)
    y = MARGIN + len(head) * CAPTION
    left = round(write_line(MARGIN, y, "Each map on its own scale: lowest")) + GAP // 2
    page.paste(Image.fromarray(bar), (left, y + 3))
    write_line(left + BAR[0] + GAP // 2, y, "highest value")

    for n, (name, image, block) in enumerate(zip(names, images, blocks, strict=True)):
        top = first + n * (CAPTION + lines * down + GAP)
        write_line(MARGIN, top, f"{name}   {image.width} x {image.height} px")
        places = [(0, line, panel) for line, panel in enumerate(block.cut)]
        places += [(1 + i % columns, i // columns, panel) for i, panel in enumerate(block.panels)]
        for column, line, panel in places:
            x, y = MARGIN + column * across, top + CAPTION + line * down
            write_line(x, y, panel.lines[0])
            write_line(x, y + CAPTION, panel.lines[1], "#555555")
            page.paste(panel.image, (x, y + 2 * CAPTION))
    return page


def default_out(name: str) -> Path:
    path = Path(name)
    return path.with_name(f"{path.stem}.maps.png") if path.is_file() else Path(f"{name.replace(':', '_')}.maps.png")


def visualize(args: Args) -> str:
    """Write the sheet -> one line about it.  CheckpointError, ConfigError or DataError before anything is computed."""
    device = device_named(args.device)
    out = args.out or default_out(args.checkpoint)
    check_out(out, args.images)
    subject, about, cfg = open_subject(args)
    names, images = find_images(args, cfg)

    batch = as_batch(images, subject.spec, seed=args.seed, epoch=0, device=device)
    views = Augmenter(subject.spec, device=device, dtype=torch.float32, seed=args.seed)(batch)
    subject.net.to(device)
    with torch.no_grad():
        text, blocks = subject.draw(batch, views)
    page = sheet(f"{args.checkpoint}   {about}", text, names, images, blocks)
    whole(out, lambda partial: page.save(partial, format="PNG"))
    return f"{out}: {len(blocks[0].panels)} pictures of each of {len(images)} images; {about}"


def main(argv: Sequence[str] | None = None) -> None:
    args = tyro.cli(Args, prog="python -m eval.visualize", args=argv)
    try:
        print(visualize(args))
    except (CheckpointError, ConfigError, DataError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
