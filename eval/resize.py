"""Sizes to resize images to, aspect kept, by the rules of Detectron2 and mmsegmentation (methods/transfer.md sections 2 and 5.3)."""

from __future__ import annotations


def shortest_side(height: int, width: int, side: float, longest: float) -> tuple[int, int]:
    """Detectron2: the shorter side becomes `side`, or less where the longer would pass `longest` -> new (height, width)."""
    scale = side / min(height, width)
    new_h, new_w = (side, scale * width) if height < width else (scale * height, side)
    if max(new_h, new_w) > longest:
        scale = longest / max(new_h, new_w)
        new_h, new_w = new_h * scale, new_w * scale
    return int(new_h + 0.5), int(new_w + 0.5)


def inside_box(height: int, width: int, box: tuple[int, int]) -> tuple[int, int]:
    """mmsegmentation: as large as fits a box of two sides in either orientation -> new (height, width)."""
    scale = min(max(box) / max(height, width), min(box) / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)
