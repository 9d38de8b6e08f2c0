"""Crop, antialiased resize and flip in one step, as Pillow's `resize(box=...)` defines it, from the flat uint8 buffer.

Output pixel y of an axis looks at source position start + (y + 0.5) * scale, scale = length / size.  Its weights are the
filter stretched by max(scale, 1), sampled at pixel centres, cut off at [low, high) and normalised.  A `Crop` is cut before
it is resized, so [low, high) is its box; a `CenterCrop` is resized before it is cut, so [low, high) is the whole image.

Both passes are cut off at 0 and 255, so where bicubic overshoots it matters which comes first: `rows_first`.

The torch form writes the weights of both axes as matrices, so a crop is W_y x W_x^T: batched products without a bound on
the number of taps.  It is the reference, and what runs on CUDA; a CPU takes the numba kernel (augment/cpu.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.batch import ImageBatch

CUBIC_A = -0.5
SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}
CHUNK_BYTES = 128 << 20
"""Of unpacked float32 source pixels at a time; their addresses take twice as much, the rest less."""


def filter_weight(x: Tensor, bicubic: Tensor) -> Tensor:
    """The filter at distance x (in stretched pixels): a triangle, or Keys' cubic with a = -0.5 where `bicubic`."""
    x = x.abs()
    a = CUBIC_A
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    cubic = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return torch.where(bicubic, cubic, (1 - x).clamp(min=0))


def axis_weights(start: Tensor, length: Tensor, low: Tensor, high: Tensor, size: int, extent: int, bicubic: Tensor) -> Tensor:
    """One axis of n crops -> float32 [n, size, extent]: column k is source pixel low + k.

    start, length (float), low, high (int): [n], source pixels; extent >= max(high - low); bicubic: bool [n].
    """
    start, length, low, high = (t.double()[:, None, None] for t in (start, length, low, high))
    bicubic = bicubic[:, None, None]
    scale = length / size
    stretch = scale.clamp(min=1)
    support = stretch * torch.where(bicubic, SUPPORT["bicubic"], SUPPORT["bilinear"])
    centre = start - low + (torch.arange(size, device=start.device)[None, :, None] + 0.5) * scale
    first = (centre - support + 0.5).floor().clamp(min=0)
    last = (centre + support + 0.5).floor().minimum(high - low)
    k = torch.arange(extent, device=start.device)[None, None, :]
    weight = filter_weight(((k - centre + 0.5) / stretch).float(), bicubic)
    weight = torch.where((k >= first) & (k < last), weight, 0.0)
    return weight / weight.sum(-1, keepdim=True)


def rows_first(height: Tensor, width: Tensor, new_height: Tensor, new_width: Tensor) -> Tensor:
    """Whether Pillow 13 resizes along y before x (found by comparing it with both orders; before version 13 it never did).

    Sizes [n] in pixels before and after, of what is resized: the box of a `Crop`, the whole image of a `CenterCrop`.
    """
    return (height > new_height) & (height - new_height > 2 * (width - new_width))


def largest_image(batch: ImageBatch) -> tuple[int, int]:
    """Largest height and width of the batch. Without the loader's host copy it is read from the device, which synchronises."""
    return batch.max_hw or (int(batch.height.max()), int(batch.width.max()))


def resample(batch: ImageBatch, views: tuple[int, ...], size: int, bicubic: Tensor, whole: Tensor) -> Tensor:
    """The crops of consecutive `views` of every image -> float32 [len(views) * B, 3, size, size] on 0..255, view-major, flipped.

    bicubic, whole: bool [len(views)] on the device: Keys' cubic instead of the triangle; taps from the whole image.
    """
    bicubic, whole = (t.repeat_interleave(len(batch), output_size=len(views) * len(batch)) for t in (bicubic, whole))
    columns = slice(views[0], views[-1] + 1)
    boxes = batch.boxes[:, columns].transpose(0, 1).reshape(-1, 4)
    flips = batch.flips[:, columns].t().reshape(-1)
    offset, pitch, height, width = (t.long().repeat(len(views)) for t in (batch.offset, batch.pitch, batch.height, batch.width))
    top, left, box_h, box_w = boxes.unbind(1)
    low_y, low_x = torch.where(whole, 0, top.long()), torch.where(whole, 0, left.long())
    high_y = torch.where(whole, height, (top + box_h).long())
    high_x = torch.where(whole, width, (left + box_w).long())

    # What is resized, and to what: a CenterCrop's box is its share of the whole.
    full_h, full_w = torch.where(whole, height, box_h.long()), torch.where(whole, width, box_w.long())
    swap = bicubic & rows_first(full_h, full_w, (full_h * size / box_h).round(), (full_w * size / box_w).round())

    def first_and_second(x: Tensor | int, y: Tensor | int) -> tuple[Tensor, Tensor]:
        return torch.where(swap, y, x), torch.where(swap, x, y)

    start, length = first_and_second(left, top), first_and_second(box_w, box_h)
    low, high = first_and_second(low_x, low_y), first_and_second(high_x, high_y)
    step, mirrored = first_and_second(3, pitch), first_and_second(flips, torch.zeros_like(flips))

    extent = max(largest_image(batch))
    k, channel = (torch.arange(n, device=boxes.device) for n in (extent, 3))
    parts = []
    chunk = max(1, CHUNK_BYTES // (12 * extent**2))
    for begin in range(0, len(boxes), chunk):
        n = slice(begin, begin + chunk)
        # pixels past the window repeat its last line: they are inside the buffer and have weight 0
        at = [torch.minimum(low[a][n, None] + k, high[a][n, None] - 1) * step[a][n, None] for a in (0, 1)]
        lines = at[1] + offset[n, None]
        window = batch.pixels[lines[:, :, None, None] + channel[:, None] + at[0][:, None, None, :]].float()  # [n, second, 3, first]
        first, second = (axis_weights(start[a][n], length[a][n], low[a][n], high[a][n], size, extent, bicubic[n]) for a in (0, 1))
        first, second = (torch.where(mirrored[a][n, None, None], w.flip(1), w) for a, w in enumerate((first, second)))
        # clamped in between, as Pillow's 8-bit passes
        lines = torch.bmm(window.flatten(1, 2), first.mT).clamp(0, 255)
        out = torch.bmm(second, lines.view(len(window), extent, 3 * size)).clamp(0, 255)
        out = out.view(-1, size, 3, size).transpose(1, 2)
        parts.append(torch.where(swap[n, None, None, None], out.mT, out))
    return torch.cat(parts).contiguous()
