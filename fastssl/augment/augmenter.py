"""Decoded images -> the views of a spec: crops, colours, normalisation, on the device the images are on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from fastssl.augment import blur, colour, cpu, patches
from fastssl.augment.draws import ColourDraws, ColourParams
from fastssl.augment.resample import resample
from fastssl.batch import Group, ImageBatch, Views
from fastssl.views import CenterCrop, Crop, PatchCrop, Photometric, View, ViewSpec, groups

log = logging.getLogger("fastssl")


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
    largest_sigma: float
    """Of the blur, pixels."""
    patches: PatchCrop | None
    """What is cut from the finished crop, of a group that is a single view."""

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
            largest_sigma=max(p.sigma[1] for p in photo),
            patches=crops[0] if isinstance(crops[0], PatchCrop) else None,
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
    """One group of views by torch operations -> float32 [V * B, 3, s, s], normalised: the reference, and what CUDA runs without Triton."""
    return chain(resample(batch, plan.views, plan.size, plan.bicubic, plan.whole), params, plan)


@cache
def triton_problem(device: torch.device) -> str:
    """Why the Triton kernels cannot be used on this CUDA device; empty when they can.

    They render two small images and have to give what the torch operations give: old GPUs and machines without a C compiler
    fail in ways that no version number tells.
    """
    try:
        from fastssl.augment import fused
    except ImportError as error:
        return f"Triton is not installed ({error})"
    photo = Photometric(jitter=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0.5)
    spec = (View(crop=Crop(size=40, interpolation="bicubic"), photometric=photo),)
    images = np.random.default_rng(0).integers(0, 256, (2, 50, 70, 3), dtype=np.uint8)
    batch = ImageBatch.of(images, [[[3.0, 5, 45, 61]], [[0.0, 0, 50, 70]]], [[True], [False]], device=device)
    draws, plan = ColourDraws(spec, device=device, seed=0), GroupPlan.of(spec, (0,), device)
    expected = render(batch, plan, draws(0, batch.index))
    try:
        found = fused.render(batch, plan, fused.FusedDraws(draws)(0, batch.index), dtype=torch.float32, channels_last=True)
    except Exception as error:  # whatever a compiler says
        return f"they do not compile here ({type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''})"
    worst = (found - expected).abs().max().item()
    return "" if worst < 0.01 else f"they differ from the torch operations by {worst:.3g} here"


class Augmenter:
    """`augmenter(batch) -> Views`: every view of every image of the batch, drawn by (seed, epoch, the image's key, view).

    On CUDA: Triton kernels, or torch operations where those do not run (said in the log); neither synchronises with the host.  On
    a CPU: numba kernels of the same formulas, one image per thread at a time, on torch.get_num_threads() threads.

    dtype: of the pixels handed out (all arithmetic is float32).  compile: torch.compile the colour chain of the torch operations;
    each group and each batch length is one graph.
    """

    implementation: str
    """triton, torch or numba."""

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
        self.dtype, self.seed = dtype, seed
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.plans = [GroupPlan.of(spec, views, device) for views in groups(spec)]
        self.draws: Callable[[int, Tensor], ColourParams] = ColourDraws(spec, device=device, seed=seed)
        self.render: Callable[[ImageBatch, GroupPlan, ColourParams], Tensor]
        if device.type == "cpu":
            self.implementation, self.render = "numba", cpu.render
        elif problem := triton_problem(device):
            log.warning(f"augmentation by torch operations, several times slower: the Triton kernels are not used because {problem}")
            chain = torch.compile(photometric, fullgraph=True, dynamic=False) if compile else photometric
            self.implementation, self.render = "torch", partial(render, chain=chain)
        else:
            from fastssl.augment import fused

            self.implementation, self.render = "triton", partial(fused.render, dtype=dtype, channels_last=channels_last)
            self.draws = fused.FusedDraws(self.draws)

    @torch.no_grad()
    def __call__(self, batch: ImageBatch) -> Views:
        params = self.draws(batch.epoch, batch.key)
        # inside someone's autocast the weights' products would lose three decimal digits
        with torch.autocast(batch.pixels.device.type, enabled=False):
            rendered = tuple(self._group(batch, plan, params.of(plan.views)) for plan in self.plans)
        return Views(
            groups=rendered,
            boxes=batch.boxes,
            flips=batch.flips,
            source_hw=torch.stack((batch.height, batch.width), 1),
            index=batch.index,
            label=batch.label,
            masks=batch.masks,
            masked=batch.masked,
        )

    def _group(self, batch: ImageBatch, plan: GroupPlan, params: ColourParams) -> Group:
        x = self.render(batch, plan, params).to(self.dtype, memory_format=self.memory_format)
        if plan.patches is None:
            return Group(plan.size, plan.views, x)
        crop = plan.patches
        corners = patches.draw(crop, seed=self.seed, epoch=batch.epoch, key=batch.key, view=plan.views[0])
        return Group(crop.patch_size, plan.views * crop.patches, patches.cut_patches(x, corners, crop.patch_size))
