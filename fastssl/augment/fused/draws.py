"""All colour draws of a step from one kernel: the numbers of fastssl/augment/draws.py."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.augment.draws import (
    BLUR_ON,
    FACTOR_B,
    FACTOR_C,
    FACTOR_S,
    GREY_ON,
    JITTER_ON,
    SHIFT_H,
    SIGMA,
    SOLARIZE_ON,
    ColourDraws,
    ColourParams,
)
from fastssl.rng import COLOUR

SAMPLES = 128
"""Per program."""


@triton.jit
def unit(word):
    return word.to(tl.float64) * 2.3283064365386963e-10  # 2^-32


@triton.jit(do_not_specialize=["seed", "epoch", "batch"])
def draw_kernel(
    key, limits, orders, jitter, order, brightness, contrast, saturation, hue, grey, sigma, solarize,
    seed, epoch, batch, STREAM: tl.constexpr, LIMITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The draws of BLOCK samples for one view: draws.ColourDraws, slot by slot.  limits: float64 [V, LIMITS], see FusedDraws."""
    v = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < batch
    sample = tl.load(key + i, mask=ok, other=0).to(tl.uint32)
    zero = tl.zeros([BLOCK], tl.uint32)
    counter = zero + (v | (STREAM << 16)).to(tl.uint32)
    when = zero + epoch.to(tl.uint32)
    u0, u1, u2, u3 = tl.philox(seed, sample, when, counter, zero)
    u4, u5, u6, u7 = tl.philox(seed, sample, when, counter, zero + 1)
    u8, u9, _, _ = tl.philox(seed, sample, when, counter, zero + 2)
    at = v * batch + i
    row = limits + v * LIMITS
    tl.store(jitter + at, unit(u0) < tl.load(row), mask=ok)
    permutation = (unit(u1) * 24).to(tl.int32)
    for place in tl.static_range(4):
        tl.store(order + 4 * at + place, tl.load(orders + 4 * permutation + place), mask=ok)
    tl.store(brightness + at, (tl.load(row + 4) + unit(u2) * tl.load(row + 5)).to(tl.float32), mask=ok)
    tl.store(contrast + at, (tl.load(row + 6) + unit(u3) * tl.load(row + 7)).to(tl.float32), mask=ok)
    tl.store(saturation + at, (tl.load(row + 8) + unit(u4) * tl.load(row + 9)).to(tl.float32), mask=ok)
    tl.store(hue + at, (tl.load(row + 10) + unit(u5) * tl.load(row + 11)).to(tl.float32), mask=ok)
    tl.store(grey + at, unit(u6) < tl.load(row + 1), mask=ok)
    radius = (tl.load(row + 12) + unit(u8) * tl.load(row + 13)).to(tl.float32)
    tl.store(sigma + at, tl.where(unit(u7) < tl.load(row + 2), radius, 0.0), mask=ok)
    tl.store(solarize + at, unit(u9) < tl.load(row + 3), mask=ok)


class FusedDraws:
    """`draws(epoch, key) -> ColourParams`: the numbers of a `ColourDraws`, from one kernel."""

    def __init__(self, draws: ColourDraws) -> None:
        self.seed, self.views = draws.seed, len(draws.views)
        low_and_span = [
            t
            for slot in (FACTOR_B, FACTOR_C, FACTOR_S, SHIFT_H, SIGMA)
            for t in (draws.span[slot][0], draws.span[slot][1] - draws.span[slot][0])
        ]
        self.limits = torch.cat(
            [*(draws.probability[s] for s in (JITTER_ON, GREY_ON, BLUR_ON, SOLARIZE_ON)), *low_and_span], 1
        ).contiguous()
        self.orders = draws.orders

    def __call__(self, epoch: int, key: Tensor) -> ColourParams:
        """key: int64 [B], `ImageBatch.key`, on the device."""
        b = len(key)

        def empty(dtype: torch.dtype, *more: int) -> Tensor:
            return torch.empty(self.views, b, *more, dtype=dtype, device=key.device)

        params = ColourParams(
            jitter=empty(torch.bool),
            order=empty(torch.int64, 4),
            brightness=empty(torch.float32),
            contrast=empty(torch.float32),
            saturation=empty(torch.float32),
            hue=empty(torch.float32),
            grey=empty(torch.bool),
            sigma=empty(torch.float32),
            solarize=empty(torch.bool),
        )
        draw_kernel[(math.ceil(b / SAMPLES), self.views)](
            *(key, self.limits, self.orders, *params.tensors(), self.seed, epoch, b),
            STREAM=COLOUR,
            LIMITS=self.limits.shape[1],
            BLOCK=SAMPLES,
        )
        return params
