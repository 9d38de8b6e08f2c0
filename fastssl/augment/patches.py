"""OBoW's patches: squares cut from one finished crop at jittered places of a 3 x 3 grid (methods: sfrik; golden sfrik_patchgrid).
W2SSL's windows: two of them, one above the other.

Crop, flip and colours are drawn once per image and the patches share them, so they are cut last, from normalised pixels.
Static shapes, no host synchronisation; every draw is keyed by (seed, epoch, the image's key, view).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.rng import PATCH, uniform_torch
from fastssl.views import PatchCrop, WindowCrop

SIDE = 3
CELLS = SIDE * SIDE
# Slots of a (sample, view) in the PATCH stream: y and x of each cell's jitter, row by row, then what sorts the cells.
FIRST_JITTER, FIRST_SORT, SLOTS = 0, 2 * CELLS, 3 * CELLS


def draw(crop: PatchCrop, *, seed: int, epoch: int, key: Tensor, view: int) -> Tensor:
    """key: int64 [B], `ImageBatch.key` -> top left corners int64 [patches, B, 2] (y, x) in pixels of the crop, on its device."""
    device = key.device
    # arange, unlike tensor([view]), copies nothing from the host
    u = uniform_torch(seed, PATCH, epoch, key, torch.arange(view, view + 1, device=device), SLOTS)[0]
    if isinstance(crop, WindowCrop):
        return windows(crop, u[:, :3])
    jitter = (u[:, FIRST_JITTER:FIRST_SORT] * (crop.patch_jitter + 1)).long().unflatten(1, (CELLS, 2))
    if crop.patches == CELLS:
        cells = torch.arange(CELLS, device=device).expand(len(key), -1)
    else:
        cells = u[:, FIRST_SORT:].argsort(dim=1, stable=True)[:, : crop.patches]
    return corners(crop, jitter, cells)


def windows(crop: WindowCrop, u: Tensor) -> Tensor:
    """Top left corners int64 [2, B, 2] (y, x) of the upper and the lower window.  u: float64 [B, 3] in [0, 1): for the left side of both,
    for each one's top."""
    room = crop.size - crop.patch_size
    left = (u[:, 0] * (room + 1)).long()
    moved = (u[:, 1:] * (crop.patch_jitter + 1)).long()
    return torch.stack((torch.stack((moved[:, 0], left), 1), torch.stack((room - moved[:, 1], left), 1)))


def corners(crop: PatchCrop, jitter_yx: Tensor, cells: Tensor) -> Tensor:
    """Top left corners int64 [P, B, 2] (y, x), pixels of the crop.

    jitter_yx: int64 [B, 9, 2] in 0..patch_jitter, of every cell, row by row.  cells: int64 [B, P], the cells of the patches, in order.
    """
    offset = (crop.size - crop.patch_size - crop.patch_jitter) // 2
    row_column = torch.stack((cells // SIDE, cells % SIDE), -1)
    moved = jitter_yx.gather(1, cells[..., None].expand(-1, -1, 2))
    return (row_column * offset + moved).transpose(0, 1)


def cut_patches(x: Tensor, corners: Tensor, patch_size: int) -> Tensor:
    """x [B, 3, S, S], corners int64 [P, B, 2] (y, x) -> [P * B, 3, patch_size, patch_size], patch-major, in x's memory format."""
    p = patch_size
    # all windows of the image are one strided view [B, S - p + 1, S - p + 1, p, p, 3]; only the chosen ones are read
    windows = x.permute(0, 2, 3, 1).unfold(1, p, 1).unfold(2, p, 1).permute(0, 1, 2, 4, 5, 3)
    cut = windows[torch.arange(len(x), device=x.device), corners[..., 0], corners[..., 1]].flatten(0, 1).permute(0, 3, 1, 2)
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return cut.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
