"""The two types that cross the borders: `ImageBatch` (loaders -> augment) and `Views` (augment -> methods)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class ImageBatch:
    """B decoded images of any size, one after the other in one flat buffer, with the geometry drawn for their V views.

    Image i is rows of `pitch[i]` bytes from byte `offset[i]`, RGB interleaved, `height[i]` x `width[i]`.
    Small per-sample vectors live where the pixels live.
    """

    pixels: Tensor
    """uint8 [bytes], on the training device."""
    offset: Tensor
    """int64 [B], bytes."""
    height: Tensor
    """int32 [B], pixels."""
    width: Tensor
    """int32 [B], pixels."""
    pitch: Tensor
    """int32 [B], bytes from one row to the next (>= 3 * width)."""
    index: Tensor
    """int64 [B], sample ids."""
    key: Tensor
    """int64 [B], what keys the random draws of each image beside seed, epoch and view: the sample id, or in a balanced order, where
    an image may come twice in an epoch and even in a step, its position in the epoch."""
    label: Tensor | None
    """int64 [B], or None for unlabelled data."""
    boxes: Tensor
    """float32 [B, V, 4]: top, left, height, width in source pixels (torchvision's i, j, h, w); whole numbers for a `Crop`,
    whose antialiasing stops at the box; fractional for a `CenterCrop`, which filters the image before it cuts."""
    flips: Tensor
    """bool [B, V]: the view is mirrored after cropping."""
    epoch: int
    step: int
    """Global optimizer step this batch belongs to."""
    masks: Tensor | None = None
    """bool [B, M, h, w]: hidden patches of the M views that have a mask; None without such views."""
    masked: Tensor | None = None
    """int64 [R]: the hidden patches by their numbers, as `masked_patches` lists them."""
    max_hw: tuple[int, int] | None = None
    """Largest height and width of these images (or a bound), known to the host: spares CUDA resampling a synchronisation."""

    @classmethod
    def of(
        cls,
        images: Sequence[np.ndarray],
        boxes: np.ndarray | Tensor,
        flips: np.ndarray | Tensor | None = None,
        *,
        index: Sequence[int] | None = None,
        epoch: int = 0,
        pad: int = 0,
        device: torch.device | str = "cpu",
    ) -> ImageBatch:
        """A batch of images that are at hand: uint8 [h, w, 3] each, with boxes [B, V, 4] and flips [B, V] (default: none).

        index: sample ids, and the keys of the draws; default 0 .. B - 1.  pad: unused bytes after each row and each image, as a
        decoder may leave.
        """
        parts, offsets, at = [], [], 0
        for image in images:
            h, w, _ = image.shape
            rows = np.full((h, 3 * w + pad), 77, np.uint8)
            rows[:, : 3 * w] = image.reshape(h, -1)
            parts += [rows.ravel(), np.full(pad, 99, np.uint8)]
            offsets.append(at)
            at += rows.size + pad
        heights, widths = ([image.shape[axis] for image in images] for axis in (0, 1))
        index = torch.arange(len(images)) if index is None else torch.as_tensor(index)
        tensors = {
            "pixels": torch.from_numpy(np.concatenate(parts)),
            "offset": torch.tensor(offsets),
            "height": torch.tensor(heights, dtype=torch.int32),
            "width": torch.tensor(widths, dtype=torch.int32),
            "pitch": torch.tensor([3 * w + pad for w in widths], dtype=torch.int32),
            "index": index,
            "key": index,
            "boxes": (boxes := torch.as_tensor(boxes, dtype=torch.float32)),
            "flips": torch.zeros(boxes.shape[:2], dtype=torch.bool) if flips is None else torch.as_tensor(flips, dtype=torch.bool),
        }
        on_device = {name: t.to(device) for name, t in tensors.items()}
        return cls(**on_device, label=None, epoch=epoch, step=0, max_hw=(max(heights), max(widths)))

    def __len__(self) -> int:
        return len(self.index)

    def image(self, i: int) -> Tensor:
        """Image i as uint8 [height, width, 3] (a view; reads three scalars, so it synchronises: for pictures and tests)."""
        offset, h, w, pitch = (int(t[i]) for t in (self.offset, self.height, self.width, self.pitch))
        return self.pixels.as_strided((h, w, 3), (pitch, 3, 1), self.pixels.storage_offset() + offset)


MASKED_CHUNK = 256
"""Lists of masked patches are filled up to a multiple of this."""


def masked_patches(masks: np.ndarray) -> np.ndarray:
    """The hidden patches of bool [B, M, h, w] as int64 [R]: numbers in the view-major order of tokens, [M B h w], ascending, then -1
    up to a multiple of MASKED_CHUNK.

    Listed on the host, where the masks are drawn and their number is known: what runs on the masked patches only needs no
    synchronisation, and leaves none out.
    """
    found = np.flatnonzero(masks.swapaxes(0, 1))
    chunks = max(1, -(-len(found) // MASKED_CHUNK))
    rows = np.full(chunks * MASKED_CHUNK, -1, np.int64)
    rows[: len(found)] = found
    return rows


@dataclass
class Group:
    """Consecutive views of equal size."""

    size: int
    views: tuple[int, ...]
    """View ids, in the declared order; of a `PatchCrop` its id once for each patch."""
    pixels: Tensor
    """[len(views) * B, 3, size, size], view-major, normalised, channels-last."""


@dataclass
class Views:
    """All views of one batch."""

    groups: tuple[Group, ...]
    boxes: Tensor
    """float32 [B, V, 4]: top, left, height, width in source pixels."""
    flips: Tensor
    """bool [B, V]."""
    source_hw: Tensor
    """int32 [B, 2]."""
    index: Tensor
    label: Tensor | None = None
    masks: Tensor | None = None
    """bool [B, M, h, w]: hidden patches of the M views that have a mask."""
    masked: Tensor | None = None
    """int64 [R]: the hidden patches by their numbers, as `masked_patches` lists them."""

    def __post_init__(self) -> None:
        if self.masked is not None:
            # The only length that changes from step to step: a compiled graph has to serve every R.
            torch._dynamo.mark_dynamic(self.masked, 0)

    def per_view(self) -> tuple[Tensor, ...]:
        """[B, 3, s, s] of every view in the declared order, as slices of the groups."""
        return tuple(x for group in self.groups for x in group.pixels.chunk(len(group.views)))
