"""Where a network looks, and pictures of it: a ViT's [CLS] attention, LEWEL's alignment maps, SCFS's feature search.

Networks are given in eval mode: BatchNorm normalises with its running statistics, so a map does not depend on the other
images.  B images, maps of h x w positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image, ImageDraw
from timm.layers import Attention
from torch import Tensor

from fastssl.batch import ImageBatch, Views
from fastssl.config import ConfigError
from fastssl.methods.lewel import AlignedNet, alignment_maps
from fastssl.methods.scfs import SCFS, STAGES, StageNet
from fastssl.models.stage_heads import feature_search
from fastssl.models.vit import ViT
from fastssl.pictures import COLOURS, FRAME, denormalise, framed, picture, pixels_of_views, with_boxes
from fastssl.views import Photometric, ViewSpec

SIDE = 196
"""Side of a picture without its frame, pixels: 7, 14 and 28 positions divide it."""
CELL = SIDE + 2 * FRAME
GREY = COLOURS.index("#7f7f7f")
"""Frame of what is no view of the training."""
SCALE, STRENGTH = "viridis", 0.6
"""matplotlib's name of the colours of maps; their share of the picture, the rest is the image in grey."""


def attention_weights(attention: Attention, x: Tensor, queries: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) of the first `queries` tokens on all T.  x: [B, T, D] -> [B, heads, queries, T].

    What the fused attention of the block never writes out.
    """
    q, k, _ = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(q[:, :, :queries]), attention.k_norm(k)
    return torch.softmax(attention.scale * q @ k.transpose(-2, -1), dim=-1)


def cls_attention(vit: ViT, x: Tensor) -> Tensor:
    """Attention of [CLS] on the patches in the last block.  x: [B, 3, H, W] -> [B, heads, h, w].

    What a head's map lacks to a sum of 1 is [CLS]'s attention on itself.
    """
    rows, columns = (side // vit.patch_size for side in x.shape[-2:])
    x = vit.embed(x)
    for block in vit.blocks[:-1]:
        x = block(x)
    last = vit.blocks[-1]
    return attention_weights(last.attn, last.norm1(x), 1)[:, :, 0, 1:].unflatten(-1, (rows, columns))


def aligned_maps(net: AlignedNet, x: Tensor) -> Tensor:
    """LEWEL's alignment maps.  x: [B, 3, H, W] -> [B, K, h, w]; each map sums to 1."""
    features = net.backbone(x).map
    maps = alignment_maps(net.projector.rows(features.flatten(2).transpose(1, 2)), net.scale)
    return maps.transpose(1, 2).unflatten(-1, features.shape[2:])


def choose_maps(maps: Tensor, heads: int, count: int) -> list[list[int]]:
    """Which `count` of LEWEL's maps in each of its groups to look at, by their numbers.  maps: [B, K, h, w], each sums to 1.

    First the most peaked (lowest entropy), then each time the one that is farthest from those taken, by the distance (total
    variation) to the nearest of them; both as means over the images, so that a number means the same map on all of them.
    """
    chosen = []
    for p in maps.flatten(2).transpose(0, 1).chunk(heads):  # [n, B, N]
        distance = torch.cdist(p.flatten(1), p.flatten(1), p=1) / (2 * p.shape[1])
        taken = [int(torch.special.entr(p).sum(-1).mean(1).argmin())]
        while len(taken) < min(count, len(p)):
            far = distance[taken].amin(0)
            far[taken] = -1  # never twice, also of maps that are all alike
            taken.append(int(far.argmax()))
        chosen.append([len(p) * len(chosen) + j for j in taken])
    return chosen


def searched_attention(student: StageNet, searched: StageNet, global_crops: Tensor, local_crops: Tensor) -> dict[str, Tensor]:
    """SCFS's attention of local crops on the global crop of their image, at every stage (methods/scfs.md section 3).

    global_crops: [B, 3, H, W], seen by `searched`: the teacher in training.  local_crops: [K B, 3, s, s], crop-major, seen by
    the student.  -> cosines [K, B, h, w] by stage.
    """
    queries, maps = student.backbone(local_crops).stages, searched.backbone(global_crops).stages
    return {s: feature_search(queries[s].mean((2, 3)), maps[s]) for s in STAGES}


# ------------------------------------------------------------------------------------------------ pictures


@dataclass(frozen=True)
class Panel:
    """A picture of at most CELL x CELL pixels and the two lines above it."""

    image: Image.Image
    lines: tuple[str, str]


@dataclass(frozen=True)
class Block:
    """One image of the sheet: what was cut from it, below each other, and the pictures to the right of it."""

    cut: list[Panel]
    panels: list[Panel]
    unit: int = 1
    """So many pictures in a row belong together."""


def heat(levels: Tensor, values: Tensor) -> Image.Image:
    """levels: grey levels [s, s, 3] of a crop; values: [h, w] -> the crop in grey below the map's colours, SIDE x SIDE.

    Position i of a convolutional map is drawn on pixels i s / h to (i + 1) s / h; its receptive field is centred on the first.
    """
    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny)
    squares = F.interpolate(scaled[None, None], size=(SIDE, SIDE), mode="nearest-exact")[0, 0]
    colours = torch.from_numpy(255 * colormaps[SCALE](squares.numpy())[..., :3])
    grey = np.asarray(picture(levels).convert("L").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return picture(STRENGTH * colours + (1 - STRENGTH) * torch.from_numpy(grey.astype(np.float64))[..., None])


def box_in_view(box: Sequence[float], view: Sequence[float], flip: bool) -> tuple[float, float, float, float] | None:
    """Where a view shows `box`: the common part's top, left, height, width as fractions of the view's sides; None without one.

    box, view: top, left, height, width in the source; flip: the view is mirrored.
    """
    top, left = max(box[0], view[0]), max(box[1], view[1])
    height, width = min(box[0] + box[2], view[0] + view[2]) - top, min(box[1] + box[3], view[1] + view[3]) - left
    if height <= 0 or width <= 0:
        return None
    x = (left - view[1]) / view[3]
    x = 1 - x - width / view[3] if flip else x
    return (top - view[0]) / view[2], x, height / view[2], width / view[3]


def outlined(image: Image.Image, place: Sequence[float]) -> Image.Image:
    """The image with the outline of top, left, height, width (fractions of its sides), white on black: seen on every colour."""
    top, left, height, width = place
    x0, y0, x1, y1 = (round(SIDE * t) for t in (left, top, left + width, top + height))
    draw = ImageDraw.Draw(image)
    for colour, inset, stroke in (("black", 0, 4), ("white", 1, 2)):
        draw.rectangle((x0 + inset, y0 + inset, max(x1 - 1, x0 + 4) - inset, max(y1 - 1, y0 + 4) - inset), outline=colour, width=stroke)
    return image


def whole_source(batch: ImageBatch, i: int, views: Sequence[int]) -> Image.Image:
    """Image i, as large as a cell holds it, with the boxes of the given views."""
    image = Image.fromarray(batch.image(i).cpu().numpy())
    return with_boxes(image, CELL / max(image.size), [(v, batch.boxes[i, v].tolist()) for v in views])


def times_even(values: Tensor, positions: int) -> str:
    """The range of a map of weights as multiples of 1 / positions."""
    return f"{values.min() * positions:.2f} to {values.max() * positions:.2f}"


# ------------------------------------------------------------------------------------------------ of each kind of network


@dataclass(frozen=True)
class LocalAttention:
    """SCFS's feature search.  `searched`: the network whose map of the first global crop is searched."""

    net: SCFS
    views: ViewSpec
    network: str
    seed: int

    @property
    def spec(self) -> ViewSpec:
        """The crops of the training without its colours."""
        return tuple(replace(view, photometric=plain(view.photometric)) for view in self.views)

    def draw(self, batch: ImageBatch, views: Views) -> tuple[str, list[Block]]:
        global_crops, local_crops = (group.pixels for group in views.groups)
        searched = self.net.teacher if self.network == "target" else self.net.student
        by_stage = searched_attention(self.net.student, searched, global_crops.chunk(2)[0], local_crops)
        crops = [denormalise(x, self.spec[v].photometric) for v, x in pixels_of_views(views)]
        whose = "teacher" if self.network == "target" else "student"
        text = (
            f"Attention of each local crop (its pooled student feature) on every position of view 1, the first global crop "
            f"({whose}'s map): their cosine, as the training searches with it. The outline is where the local crop was cut. Crops as in "
            f"training, drawn with seed {self.seed}, without colour augmentation; BatchNorm with running statistics."
        )
        return text, [self.block(batch, i, crops, {s: maps[:, i].cpu() for s, maps in by_stage.items()}) for i in range(len(batch))]

    def block(self, batch: ImageBatch, i: int, crops: list[Tensor], attention: dict[str, Tensor]) -> Block:
        """crops: [B, s, s, 3] of every view; attention: [K, h, w] of this image by stage."""
        boxes, flips = batch.boxes[i].tolist(), batch.flips[i].tolist()

        def about(v: int) -> str:
            return f"view {v + 1}   {self.spec[v].crop.size} px" + ("   flipped" if flips[v] else "")

        source = whole_source(batch, i, [0, *range(2, len(boxes))])
        cut = [Panel(source, ("source", "boxes of the views shown")), Panel(framed(picture(crops[0][i]), CELL, 0), (about(0), "global"))]
        panels = []
        for k, v in enumerate(range(2, len(boxes))):
            place = box_in_view(boxes[v], boxes[0], flips[0])
            share = place[2] * place[3] * boxes[0][2] * boxes[0][3] / (boxes[v][2] * boxes[v][3]) if place else 0.0
            panels.append(Panel(framed(picture(crops[v][i]), CELL, v), (about(v), f"local, {share:.0%} of it in view 1")))
            for stage, maps in attention.items():
                values = maps[k]
                shown = outlined(heat(crops[0][i], values), place) if place else heat(crops[0][i], values)
                grid = f"{stage}   {values.shape[0]} x {values.shape[1]}"
                panels.append(Panel(framed(shown, CELL, v), (grid, f"{values.min():.3f} to {values.max():.3f}")))
        return Block(cut, panels, unit=1 + len(attention))


@dataclass(frozen=True)
class AlignmentMaps:
    """LEWEL's, `per_group` of each group."""

    net: AlignedNet
    spec: ViewSpec
    per_group: int

    def draw(self, batch: ImageBatch, views: Views) -> tuple[str, list[Block]]:
        (group,) = views.groups
        maps = aligned_maps(self.net, group.pixels).cpu()
        chosen = choose_maps(maps, self.net.heads, self.per_group)
        crops = denormalise(group.pixels, self.spec[0].photometric)
        h, w = maps.shape[2:]
        text = (
            f"LEWEL's alignment maps at {h} x {w} positions, one for each of the projection's {maps.shape[1]} channels, which count from 0 "
            f"and form {self.net.heads} groups. Of each group are shown: the most peaked map (lowest entropy), then each time the one "
            "farthest from those already shown (total variation), both as means over these images; the same channels for all. "
            f"Numbers: multiples of 1/{h * w}, an even spread. BatchNorm with running statistics."
        )
        blocks = []
        for i, crop in enumerate(crops):
            panels = [
                Panel(framed(heat(crop, maps[i, k]), CELL, g), (f"group {g + 1}   channel {k}", times_even(maps[i, k], h * w)))
                for g, of_group in enumerate(chosen)
                for k in of_group
            ]
            blocks.append(Block([centre_panel(self.spec, crop)], panels, unit=len(chosen[0])))
        return text, blocks


@dataclass(frozen=True)
class ClsAttention:
    """Of a ViT's last block.  ConfigError when the crop is no whole number of patches."""

    net: ViT
    spec: ViewSpec

    def __post_init__(self) -> None:
        size, p = self.spec[0].crop.size, self.net.patch_size
        if size % p or size < p:
            near = " or ".join(str(n) for n in (size // p * p, (size // p + 1) * p) if n)
            raise ConfigError(f"A crop of {size} pixels is no whole number of patches of {p}: take --size {near}.")

    def draw(self, batch: ImageBatch, views: Views) -> tuple[str, list[Block]]:
        (group,) = views.groups
        by_head = cls_attention(self.net, group.pixels).cpu()
        crops = denormalise(group.pixels, self.spec[0].photometric)
        h, w = by_head.shape[2:]
        tokens = 1 + h * w
        text = (
            f"Attention of [CLS] on the {h} x {w} patches in the last of {len(self.net.blocks)} blocks. Numbers: multiples of 1/{tokens}, "
            "an even spread over all tokens; in brackets the share that [CLS] keeps for itself."
        )
        blocks = []
        for maps, crop in zip(by_head, crops, strict=True):
            named = [(f"head {n + 1}", values) for n, values in enumerate(maps)] + [("mean of the heads", maps.mean(0))]
            panels = [
                Panel(framed(heat(crop, values), CELL, GREY), (name, f"{times_even(values, tokens)}   ({max(0, 1 - values.sum()):.1%})"))
                for name, values in named
            ]
            blocks.append(Block([centre_panel(self.spec, crop)], panels))
        return text, blocks


def plain(photometric: Photometric) -> Photometric:
    """Its normalisation alone."""
    return Photometric(mean=photometric.mean, std=photometric.std)


def centre_panel(spec: ViewSpec, crop: Tensor) -> Panel:
    c = spec[0].crop
    return Panel(framed(picture(crop), CELL, GREY), ("centre crop", f"{c.size} px of a shorter side of {c.resize}"))
