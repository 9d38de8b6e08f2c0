"""The random part of the colour operations: one draw per (image, view), outside every kernel.

A draw depends on (seed, epoch, the image's key, view) only, so an image gets the same colours whatever batch, rank or worker
it is in, and a resumed run continues the stream.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import permutations

import torch
from torch import Tensor

from fastssl.rng import COLOUR, uniform_torch
from fastssl.views import ViewSpec

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = tuple(permutations(range(4)))

# What each slot of the stream decides. A new operation takes a new slot, so that old runs keep their draws.
JITTER_ON, ORDER, FACTOR_B, FACTOR_C, FACTOR_S, SHIFT_H, GREY_ON, BLUR_ON, SIGMA, SOLARIZE_ON = range(10)
SLOTS = 10


@dataclass(frozen=True)
class ColourParams:
    """What happens to each of V x B crops.  Every tensor is [V, B] unless said otherwise."""

    jitter: Tensor
    """bool: the four jitter operations apply."""
    order: Tensor
    """int64 [V, B, 4]: the operation (BRIGHTNESS .. HUE) at each of the four places."""
    brightness: Tensor
    """float32 factor; 1 changes nothing. contrast and saturation alike."""
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    """float32 shift in turns of the hue circle; 0 changes nothing."""
    grey: Tensor
    """bool."""
    sigma: Tensor
    """float32 standard deviation of the blur in pixels; 0: no blur."""
    solarize: Tensor
    """bool."""

    def tensors(self) -> tuple[Tensor, ...]:
        """In the declared order."""
        return tuple(getattr(self, f.name) for f in fields(self))

    def of(self, views: tuple[int, ...]) -> ColourParams:
        """The rows of some consecutive views."""
        rows = slice(views[0], views[-1] + 1)
        return ColourParams(*(t[rows] for t in self.tensors()))


class ColourDraws:
    """`draws(epoch, key) -> ColourParams` for one spec; its constants wait on `device` as [V, 1] tensors."""

    def __init__(self, spec: ViewSpec, *, device: torch.device, seed: int) -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

        photo = [view.photometric for view in spec]
        self.seed = seed
        self.views = torch.arange(len(spec), device=device)
        self.orders = torch.tensor(ORDERS, device=device)
        self.probability = {
            JITTER_ON: column([p.jitter for p in photo]),
            GREY_ON: column([p.grey for p in photo]),
            BLUR_ON: column([p.blur for p in photo]),
            SOLARIZE_ON: column([p.solarize for p in photo]),
        }
        # torchvision's ranges: a factor never below 0
        strengths = {
            FACTOR_B: [p.brightness for p in photo],
            FACTOR_C: [p.contrast for p in photo],
            FACTOR_S: [p.saturation for p in photo],
        }
        self.span = {slot: (column([max(0.0, 1 - x) for x in v]), column([1 + x for x in v])) for slot, v in strengths.items()}
        self.span[SHIFT_H] = (column([-p.hue for p in photo]), column([p.hue for p in photo]))
        self.span[SIGMA] = (column([p.sigma[0] for p in photo]), column([p.sigma[1] for p in photo]))

    def __call__(self, epoch: int, key: Tensor) -> ColourParams:
        """key: int64 [B], `ImageBatch.key`, on the device."""
        u = uniform_torch(self.seed, COLOUR, epoch, key, self.views, SLOTS)

        def happens(slot: int) -> Tensor:
            return u[..., slot] < self.probability[slot]

        def between(slot: int) -> Tensor:
            low, high = self.span[slot]
            return (low + u[..., slot] * (high - low)).float()

        return ColourParams(
            jitter=happens(JITTER_ON),
            order=self.orders[(u[..., ORDER] * len(ORDERS)).long()],
            brightness=between(FACTOR_B),
            contrast=between(FACTOR_C),
            saturation=between(FACTOR_S),
            hue=between(SHIFT_H),
            grey=happens(GREY_ON),
            sigma=torch.where(happens(BLUR_ON), between(SIGMA), 0.0),
            solarize=happens(SOLARIZE_ON),
        )
