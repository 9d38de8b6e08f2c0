"""Colour operations on float pixels of the 0..255 scale, with the meaning torchvision gives them on Pillow images.

Every function takes x [N, 3, h, w] float and one parameter per sample [N], has static shapes and no host sync, and clamps
to [0, 255] as 8-bit images do.  Unlike Pillow nothing is rounded in between: Pillow truncates after each blend and keeps
hue and saturation in 8 bits, which is the difference the tests state.  Numba kernels of the same formulas run on a CPU
(augment/cpu.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.augment.draws import CONTRAST, HUE, SATURATION

LUMA = (0.299, 0.587, 0.114)
"""ITU-R 601, as in Pillow's conversion to mode L."""
SOLARIZE_FROM = 128.0


def luma(x: Tensor) -> Tensor:
    """[N, 3, h, w] -> grey [N, 1, h, w]."""
    r, g, b = x.unbind(1)
    return (LUMA[0] * r + LUMA[1] * g + LUMA[2] * b).unsqueeze(1)


def _per_sample(p: Tensor) -> Tensor:
    return p.view(-1, 1, 1, 1)


def blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor * x + (1 - factor) * other, clamped (PIL.Image.blend(other, x, factor))."""
    f = _per_sample(factor)
    return (f * x + (1 - f) * other).clamp(0, 255)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of the HSV cone by `shift` turns, cut to whole 255ths as torchvision does; value and saturation stay."""
    r, g, b = x.unbind(1)
    top, bottom = x.amax(1), x.amin(1)
    chroma = top - bottom
    scale = 1 / torch.where(chroma > 0, chroma, 1.0)
    sixths = torch.where(top == r, (g - b) * scale, torch.where(top == g, 2 + (b - r) * scale, 4 + (r - g) * scale))
    sixths = sixths + 6 / 255 * (255 * shift).trunc().view(-1, 1, 1)

    def channel(offset: int) -> Tensor:
        k = sixths + offset
        k = k - 6 * torch.floor(k / 6)
        return top - chroma * torch.minimum(k, 4 - k).clamp(0, 1)

    return torch.stack((channel(5), channel(3), channel(1)), 1)


def jitter(x: Tensor, order: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """The four operations in each sample's own order.  order: int64 [N, 4], the operation at each place.

    Brightness blends with black, contrast with the mean of the grey image (which Pillow rounds to a whole number), saturation with the
    grey image: the blends differ in nothing else, so a place costs one blend and one hue turn for all samples.
    """
    factors = torch.stack((brightness, contrast, saturation, torch.ones_like(hue)), 1)
    for place in range(4):
        op = order[:, place]
        grey = luma(x)
        mean = grey.mean((2, 3), keepdim=True)
        other = torch.where(_per_sample(op == SATURATION), grey, torch.where(_per_sample(op == CONTRAST), mean, 0.0))
        blended = blend(x, other, factors.gather(1, op[:, None])[:, 0])
        x = torch.where(_per_sample(op == HUE), adjust_hue(x, hue), blended)
    return x


def to_grey(x: Tensor, on: Tensor) -> Tensor:
    """Grey in three channels where `on` (bool [N])."""
    return torch.where(_per_sample(on), luma(x), x)


def solarize(x: Tensor, on: Tensor) -> Tensor:
    """Values from 128 up become 255 - value where `on` (bool [N])."""
    return torch.where(_per_sample(on) & (x >= SOLARIZE_FROM), 255 - x, x)


def normalise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x / 255 - mean) / std.  mean, std: [N, 3] on the 0..1 scale."""
    return x * (1 / (255 * std))[:, :, None, None] - (mean / std)[:, :, None, None]
