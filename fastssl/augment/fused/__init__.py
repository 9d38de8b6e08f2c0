"""The CUDA form of the augmentation: Triton kernels, at most four launches a group of views and one for all draws of a step.

No host synchronisation, no shape that depends on the data, all parameters in device tensors: `render` can be captured in a
CUDA graph.  This package is imported only where a CUDA device is used: it needs Triton.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from fastssl.augment.blur import PASSES, box_radius
from fastssl.augment.draws import ColourParams
from fastssl.augment.fused.blur import blur_kernel, weights_kernel
from fastssl.augment.fused.colour import colour_kernel
from fastssl.augment.fused.crop import crop_kernel
from fastssl.augment.fused.draws import FusedDraws

if TYPE_CHECKING:
    from fastssl.augment.augmenter import GroupPlan
    from fastssl.batch import ImageBatch

__all__ = ["FusedDraws", "render"]

TILE, CHUNK, WARPS = 32, 16, 2
"""Side of an output tile, how many source lines and columns are multiplied at a time, and warps per program.

Tensor cores give a warp 16 rows of a product, and all warps share its rows: with more than TILE / 16 they would repeat each other.
"""
BLOCK, LINES = 1024, 16
"""Pixels, and lines of the blur's weights, per program of the point-wise kernels."""


@cache
def split(device: torch.device) -> bool:
    """Whether products run on tensor cores: Triton has them from compute capability 7.5 on."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (7, 5)


def taps(sigma: float) -> int:
    """Lines that the blur of standard deviation `sigma` (pixels) may reach over, and one more, as a power of two of at least 16."""
    whole, _ = box_radius(torch.tensor(sigma, dtype=torch.float64))
    return max(16, triton.next_power_of_2(2 * (PASSES * (int(whole) + 1) + 1)))


def render(batch: ImageBatch, plan: GroupPlan, params: ColourParams, *, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """One group of views -> [V * B, 3, s, s] of `dtype`, normalised."""
    views, b, size = len(plan.views), len(batch), plan.size
    device, n = batch.pixels.device, views * b
    out = torch.empty(n, 3, size, size, dtype=dtype, device=device, memory_format=memory_format(channels_last))
    across = math.ceil(size / TILE)
    waits = plan.jitter or plan.blur
    mid = torch.empty(n * 3 * size * size if waits else 0, dtype=torch.uint16, device=device)
    sums = torch.empty(n * across**2 if plan.jitter else 0, dtype=torch.float32, device=device)
    boxes, flips = batch.boxes.contiguous(), batch.flips.contiguous()
    p = [t.contiguous() for t in (params.jitter, params.order, params.brightness, params.contrast, params.saturation, params.hue)]
    grey, sigma, solarize = (t.contiguous() for t in (params.grey, params.sigma, params.solarize))
    where = (plan.mean, plan.std)
    common = {"VIEWS": views, "SIZE": size, "CHANNELS_LAST": channels_last}

    crop_kernel[(n * across**2,)](
        *(out, mid, sums, batch.pixels, batch.offset, batch.pitch, batch.height, batch.width, boxes, flips, plan.bicubic, plan.whole),
        *(*p, grey, sigma, solarize, *where, b, boxes.shape[1], plan.views[0]),
        **common,
        TILE=TILE,
        CHUNK=CHUNK,
        JITTER=plan.jitter,
        BLUR=plan.blur,
        SPLIT=split(device),
        num_warps=WARPS,
    )
    if plan.jitter:
        colour_kernel[(n * math.ceil(size * size / BLOCK),)](
            *(out, mid, sums, *p, grey, sigma, solarize, *where, b),
            **common,
            TILES=across**2,
            BLOCK=BLOCK,
            BLUR=plan.blur,
            SUMS=triton.next_power_of_2(across**2),
        )
    if plan.blur:
        reach = taps(plan.largest_sigma)
        table = torch.empty(n * size * reach, dtype=torch.float32, device=device)
        weights_kernel[(n * math.ceil(size / LINES),)](table, sigma, SIZE=size, TAPS=reach, LINES=LINES)
        blur_kernel[(n * across**2,)](
            *(out, mid, table, sigma, solarize, *where, b),
            **common,
            TILE=TILE,
            CHUNK=CHUNK,
            TAPS=reach,
            SPLIT=split(device),
            num_warps=WARPS,
        )
    return out


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format
