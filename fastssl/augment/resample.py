"""Crop, antialiased resize and flip in one step, as Pillow's `resize(box=...)` defines it, from the flat uint8 buffer.

Output pixel y of an axis looks at source position start + (y + 0.5) * scale, scale = length / size.  Its weights are the
filter stretched by max(scale, 1), sampled at pixel centres, cut off at [low, high) and normalised.  A `Crop` is cut before
it is resized, so [low, high) is its box; a `CenterCrop` is resized before it is cut, so [low, high) is the whole image.

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

    rows, cols = largest_image(batch)
    y, x, channel = (torch.arange(n, device=boxes.device) for n in (rows, cols, 3))
    parts = []
    chunk = max(1, CHUNK_BYTES // (12 * rows * cols))
    for begin in range(0, len(boxes), chunk):
        n = slice(begin, begin + chunk)
        # pixels past the window repeat its last line: they are inside the buffer and have weight 0
        row = torch.minimum(low_y[n, None] + y, high_y[n, None] - 1) * pitch[n, None] + offset[n, None]
        col = torch.minimum(low_x[n, None] + x, high_x[n, None] - 1) * 3
        window = batch.pixels[row[:, :, None, None] + channel[:, None] + col[:, None, None, :]].float()  # [n, rows, 3, cols]
        across = axis_weights(left[n], box_w[n], low_x[n], high_x[n], size, cols, bicubic[n])
        across = torch.where(flips[n, None, None], across.flip(1), across)
        down = axis_weights(top[n], box_h[n], low_y[n], high_y[n], size, rows, bicubic[n])
        # horizontal first and clamped in between, as Pillow's 8-bit passes
        lines = torch.bmm(window.flatten(1, 2), across.mT).clamp(0, 255)
        out = torch.bmm(down, lines.view(len(window), rows, 3 * size)).clamp(0, 255)
        parts.append(out.view(-1, size, 3, size).transpose(1, 2))
    return torch.cat(parts).contiguous()
