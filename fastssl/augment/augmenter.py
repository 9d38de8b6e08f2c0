"""Decoded images -> the views of a spec: crops, colours, normalisation, on the device the images are on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastssl.augment import blur, colour, cpu
from fastssl.augment.draws import ColourDraws, ColourParams
from fastssl.augment.resample import resample
from fastssl.batch import Group, ImageBatch, Views
from fastssl.views import CenterCrop, ViewSpec, groups


@dataclass(frozen=True)
class GroupPlan:
    """What a spec says about the V views of one group; tensors wait on the device, so that no step copies them."""

    views: tuple[int, ...]
    size: int
    bicubic: Tensor
    """bool [V]."""
    whole: Tensor
    """bool [V]: antialiasing taps come from the whole image (CenterCrop)."""
    mean: Tensor
    """float32 [V, 3]; std alike."""
    std: Tensor
    jitter: bool
    """Some view of the group may be jittered; the others alike. What no view needs is not computed."""
    grey: bool
    blur: bool
    solarize: bool

    @classmethod
    def of(cls, spec: ViewSpec, views: tuple[int, ...], device: torch.device) -> GroupPlan:
        crops, photo = [spec[v].crop for v in views], [spec[v].photometric for v in views]
        return cls(
            views=views,
            size=crops[0].size,
            bicubic=torch.tensor([c.interpolation == "bicubic" for c in crops], device=device),
            whole=torch.tensor([isinstance(c, CenterCrop) for c in crops], device=device),
            mean=torch.tensor([p.mean for p in photo], dtype=torch.float32, device=device),
            std=torch.tensor([p.std for p in photo], dtype=torch.float32, device=device),
            jitter=any(p.jitter > 0 for p in photo),
            grey=any(p.grey > 0 for p in photo),
            blur=any(p.blur > 0 for p in photo),
            solarize=any(p.solarize > 0 for p in photo),
        )


def photometric(x: Tensor, params: ColourParams, plan: GroupPlan) -> Tensor:
    """Colour, blur and normalisation of one group: x float32 [V * B, 3, s, s] on 0..255 -> normalised.

    Static shapes and no synchronisation: torch.compile(fullgraph=True) takes it whole.
    """
    if plan.jitter:
        p = (params.brightness, params.contrast, params.saturation, params.hue)
        jittered = colour.jitter(x, params.order.flatten(0, 1), *(t.flatten() for t in p))
        x = torch.where(params.jitter.view(-1, 1, 1, 1), jittered, x)
    if plan.grey:
        x = colour.to_grey(x, params.grey.flatten())
    if plan.blur:
        x = blur.gaussian_blur(x, params.sigma.flatten())
    if plan.solarize:
        x = colour.solarize(x, params.solarize.flatten())
    b = params.grey.shape[1]
    return colour.normalise(x, *(t[:, None].expand(-1, b, -1).flatten(0, 1) for t in (plan.mean, plan.std)))


def render(batch: ImageBatch, plan: GroupPlan, params: ColourParams, chain=photometric) -> Tensor:
    """One group of views by torch operations -> float32 [V * B, 3, s, s], normalised: the reference, and the CUDA path."""
    return chain(resample(batch, plan.views, plan.size, plan.bicubic, plan.whole), params, plan)


class Augmenter:
    """`augmenter(batch) -> Views`: every view of every image of the batch, drawn by (seed, epoch, sample id, view).

    On CUDA: torch operations without a host synchronisation.  On a CPU: numba kernels of the same formulas, one image per
    thread at a time, on torch.get_num_threads() threads.

    dtype: of the pixels handed out (all arithmetic is float32).  compile: torch.compile the colour chain (CUDA only; a CPU
    runs the kernels either way); each group and each batch length is one graph.
    """

    def __init__(
        self,
        spec: ViewSpec,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        seed: int,
        channels_last: bool = True,
        compile: bool = False,
    ) -> None:
        device = torch.device(device)
        self.dtype = dtype
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.plans = [GroupPlan.of(spec, views, device) for views in groups(spec)]
        self.draws = ColourDraws(spec, device=device, seed=seed)
        chain = torch.compile(photometric, fullgraph=True, dynamic=False) if compile else photometric
        self.render: Callable[[ImageBatch, GroupPlan, ColourParams], Tensor] = (
            cpu.render if device.type == "cpu" else partial(render, chain=chain)
        )

    @torch.no_grad()
    def __call__(self, batch: ImageBatch) -> Views:
        params = self.draws(batch.epoch, batch.index)
        # inside someone's autocast the weights' products would lose three decimal digits
        with torch.autocast(batch.pixels.device.type, enabled=False):
            rendered = [self.render(batch, plan, params.of(plan.views)) for plan in self.plans]
        return Views(
            groups=tuple(
                Group(plan.size, plan.views, x.to(self.dtype, memory_format=self.memory_format))
                for plan, x in zip(self.plans, rendered, strict=True)
            ),
            boxes=batch.boxes,
            flips=batch.flips,
            source_hw=torch.stack((batch.height, batch.width), 1),
            index=batch.index,
            label=batch.label,
        )
