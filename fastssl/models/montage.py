"""Montages of W2SSL (methods/w2ssl.md sections 5 and 6): patches of many images in a random order, tiled 2 x 2 into pictures, and the
way back from a picture's feature map to one vector a patch.

The n images of all W ranks give k patches each to a view: R = k n rows, R / 4 montages.  Patch j of image i has the number
j n + i, and image i lies on rank i // (n / W).  Rows are rank-major and in a rank cell-major: its row q G + g is cell q of its
montage g, G = R / 4 W.  Cells are top left, top right, bottom left, bottom right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastssl.rng import MONTAGE, permutations


def rank_rows(permutation: np.ndarray, world: int) -> np.ndarray:
    """The official order of patch numbers, int64 [R], whose entry q R / 4 + g is cell q of montage g -> [W, R / W]."""
    return permutation.reshape(4, world, -1).swapaxes(0, 1).reshape(world, -1)


def drawn_rows(parts: int, images: int, world: int, *, seed: int, step: int, within: Literal["global", "rank"]) -> np.ndarray:
    """A random order of the R = parts x images patches of a step: int64 [W, R / W], the patch number of every row, the same wherever it
    is called.  within `global`: one permutation, the montages do not depend on the number of ranks; `rank`: one of each rank's own."""
    if within == "global":
        return rank_rows(permutations(1, parts * images, seed, MONTAGE, step)[0], world)
    share = images // world
    own_numbers = permutations(world, parts * share, seed, MONTAGE, step)
    return own_numbers // share * images + np.arange(world)[:, None] * share + own_numbers % share


class Routes(NamedTuple):
    """How patches get from the ranks of their images to those of their montages, as one rank sees it.  The host knows the counts, so
    nothing waits for the device."""

    place: Tensor
    """int64 [R / W]: which of the arrived patches each of this rank's rows is."""
    leave: Tensor
    """int64 [R / W]: this rank's patches in the order they leave in."""
    sent: list[int]
    """Patches for each rank."""
    received: list[int]
    """Patches from each rank."""
    stay: bool
    """No rank needs a patch of another: place counts this rank's own patches and nothing leaves."""

    @classmethod
    def of(cls, rows: np.ndarray, images: int, rank: int, device: torch.device) -> Routes:
        """rows: int64 [W, R / W], the patch number of every row; images: n."""
        world = len(rows)
        share = images // world
        home = rows % images // share
        own_number = rows // images * share + rows % share
        stay = bool((home == np.arange(world)[:, None]).all())
        arrived = np.argsort(home[rank], kind="stable")  # from rank 0, from rank 1, ...; in the order of the rows
        place = own_number[rank] if stay else np.argsort(arrived)
        leave = own_number[home == rank]  # for rank 0, for rank 1, ...; in the order of their rows
        sent, received = (home == rank).sum(1), np.bincount(home[rank], minlength=world)
        return cls(*to_device((place, leave), device), sent.tolist(), received.tolist(), stay)

    def exchange(self, patches: Tensor) -> Tensor:
        """[R / W, 3, h, w] of this rank's images -> those of its montages as they arrive, channels-last; one collective unless all stay."""
        patches = patches.contiguous(memory_format=torch.channels_last)
        if self.stay:
            return patches
        leaving = patches.permute(0, 2, 3, 1).index_select(0, self.leave)
        arrived = torch.empty_like(leaving)
        # As bytes: every backend moves those, whatever type the pixels have.
        dist.all_to_all_single(arrived.view(torch.uint8), leaving.view(torch.uint8), self.received, self.sent)
        return arrived.permute(0, 3, 1, 2)


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """int64 arrays of any shapes as tensors on `device`, by one transfer that the host does not wait for."""
    packed = torch.from_numpy(np.concatenate([a.ravel() for a in arrays]))
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    return [part.view(a.shape) for part, a in zip(packed.split([a.size for a in arrays]), arrays, strict=True)]


def tile(patches: Tensor, place: Tensor) -> Tensor:
    """Channels-last patches [P, 3, h, w]; place int64 [4 G], the patch of every row -> montages [G, 3, 2h, 2w], channels-last.

    One copy: in memory both are lines of w pixels, and line (g, upper or lower, y, left or right) of the montages is line y of a patch.
    """
    h, w = patches.shape[2:]
    lines = patches.permute(0, 2, 3, 1).reshape(-1, w * 3)
    cells = place.view(2, 2, -1).permute(2, 0, 1)
    source = cells[:, :, None, :] * h + torch.arange(h, device=place.device)[:, None]
    return lines.index_select(0, source.flatten()).view(len(cells), 2 * h, 2 * w, 3).permute(0, 3, 1, 2)


def decouple(feature_map: Tensor) -> Tensor:
    """[G, C, s, s] of montages -> [4 G, C], one vector a patch.

    A bilinear resize to 8 x 8 and the mean of each quadrant, as one matrix [s s, 4]: the middle of an odd s belongs to both sides.
    """
    side, wide = feature_map.shape[-1], torch.promote_types(feature_map.dtype, torch.float32)
    basis = torch.eye(side, dtype=wide, device=feature_map.device)
    half = F.interpolate(basis[None], size=8, mode="linear", align_corners=False)[0].unflatten(1, (2, 4)).mean(2)
    quadrant = (half[:, None, :, None] * half[None, :, None, :]).reshape(side * side, 4).to(feature_map.dtype)
    return torch.einsum("gcp,pq->qgc", feature_map.flatten(2), quadrant).flatten(0, 1)
