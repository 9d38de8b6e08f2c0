"""The two types that cross the borders: `ImageBatch` (loaders -> augment) and `Views` (augment -> methods)."""

from __future__ import annotations

from dataclasses import dataclass

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
    max_hw: tuple[int, int] | None = None
    """Largest height and width of these images (or a bound), known to the host: spares CUDA resampling a synchronisation."""

    def __len__(self) -> int:
        return len(self.index)

    def image(self, i: int) -> Tensor:
        """Image i as uint8 [height, width, 3] (a view; reads three scalars, so it synchronises: for pictures and tests)."""
        offset, h, w, pitch = (int(t[i]) for t in (self.offset, self.height, self.width, self.pitch))
        return self.pixels.as_strided((h, w, 3), (pitch, 3, 1), self.pixels.storage_offset() + offset)


@dataclass
class Group:
    """Consecutive views of equal size."""

    size: int
    views: tuple[int, ...]
    """View ids, in the declared order."""
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

    def per_view(self) -> tuple[Tensor, ...]:
        """[B, 3, s, s] of every view in the declared order, as slices of the groups."""
        return tuple(x for group in self.groups for x in group.pixels.chunk(len(group.views)))
