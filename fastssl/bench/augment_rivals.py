"""Other people's implementations of the tasks of `augment_work.py`, on the same random images.

What each of them does differently stands in its note: none draws Pillow's pixels, a fused recipe's parameters and one order of
the jitter per image all at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from fastssl.augment import pillow
from fastssl.augment.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, ColourParams
from fastssl.bench.augment_work import Material, Run, Stage, has_patches
from fastssl.views import CenterCrop, View, ViewSpec

JITTER = {BRIGHTNESS: "brightness", CONTRAST: "contrast", SATURATION: "saturation", HUE: "hue"}


class Unfit(Exception):
    """This library cannot do the task; says why."""


@dataclass(frozen=True)
class Rival:
    """make(material, stages, dtype) -> one batch of work.  Raises Unfit, or ImportError where the library is not installed."""

    title: str
    note: str
    make: Callable[[Material, tuple[Stage, ...], torch.dtype], Run]
    by_sample: bool
    """Its time grows with the images, so that few of them are enough."""
    cpu_only: bool = False


# ------------------------------------------------------------------------------------------------ sample by sample


class _Images(Protocol):
    """View v of image i, in three stages."""

    def ready(self, v: int, i: int): ...
    def cut(self, v: int, i: int): ...
    def colour(self, x, v: int, i: int): ...
    def finish(self, x, v: int) -> Tensor: ...


def _loop(material: Material, stages: tuple[Stage, ...], images: _Images) -> Run:
    if has_patches(material.spec):
        raise Unfit("patches of one crop")

    def run():
        out = []
        for v in range(len(material.spec)):
            view = []
            for i in range(len(material.batch)):
                x = images.cut(v, i) if "cut" in stages else images.ready(v, i)
                x = images.colour(x, v, i) if "colour" in stages else x
                view.append(images.finish(x, v) if "finish" in stages else x)
            out.append(torch.stack(view) if "finish" in stages else view)
        return out

    return run


def _on_host(params: ColourParams, spec: ViewSpec) -> ColourParams:
    """numpy arrays instead of tensors, and of the jitter's order only the operations that some view has."""
    wanted = [op for op, name in JITTER.items() if any(getattr(view.photometric, name) > 0 for view in spec)]
    arrays = ColourParams(**{name: value.cpu().numpy() for name, value in vars(params).items()})
    order = arrays.order[np.isin(arrays.order, wanted)].reshape(*arrays.order.shape[:2], len(wanted))
    return replace(arrays, order=order)


class _PillowImages:
    def __init__(self, material: Material, dtype: torch.dtype) -> None:
        def images(tensors: Tensor) -> list[Image.Image]:
            return [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in tensors]

        self.spec, self.dtype, self.params = material.spec, dtype, _on_host(material.params, material.spec)
        self.boxes, self.flips = material.batch.boxes.tolist(), material.batch.flips.tolist()
        self.sources, self.crops = images(material.sources()), [images(view) for view in material.crops()]

    def ready(self, v, i):
        return self.crops[v][i]

    def cut(self, v, i):
        return pillow.cut(self.sources[i], self.spec[v].crop, self.boxes[i][v], self.flips[i][v])

    def colour(self, x, v, i):
        return pillow.colour(x, self.params, v, i)

    def finish(self, x, v):
        return _finish(pil_to_tensor(x), self.spec[v], self.dtype)


def _finish(x: Tensor, view: View, dtype: torch.dtype) -> Tensor:
    p = view.photometric
    return TF.normalize(TF.to_dtype(x, torch.float32, scale=True), list(p.mean), list(p.std)).to(dtype)


class _TensorImages:
    """uint8 tensors; x is [3, H, W], or [B, 3, H, W] with one draw for all."""

    adjust = {
        BRIGHTNESS: TF.adjust_brightness,
        CONTRAST: TF.adjust_contrast,
        SATURATION: TF.adjust_saturation,
        HUE: TF.adjust_hue,
    }

    def __init__(self, material: Material, dtype: torch.dtype) -> None:
        self.spec, self.dtype, self.params = material.spec, dtype, _on_host(material.params, material.spec)
        self.boxes, self.flips = material.batch.boxes.tolist(), material.batch.flips.tolist()
        self.sources, self.crops = material.sources(), material.crops()

    def ready(self, v, i):
        return self.crops[v, i]

    def cut(self, v, i):
        return self._cut(self.sources[i], v, i)

    def _cut(self, x: Tensor, v: int, i: int) -> Tensor:
        crop, side = self.spec[v].crop, [self.spec[v].crop.size] * 2
        mode = pillow.MODES[crop.interpolation]
        if isinstance(crop, CenterCrop):
            x = TF.center_crop(TF.resize(x, [crop.resize], mode, antialias=True), side)
        else:
            x = TF.resized_crop(x, *(int(t) for t in self.boxes[i][v]), side, mode, antialias=True)
        return TF.horizontal_flip(x) if self.flips[i][v] else x

    def colour(self, x, v, i):
        p = self.params
        if p.jitter[v, i]:
            for op in p.order[v, i].tolist():
                x = self.adjust[op](x, float(getattr(p, JITTER[op])[v, i]))
        if p.grey[v, i]:
            x = TF.rgb_to_grayscale(x, num_output_channels=3)
        if p.sigma[v, i] > 0:
            x = TF.gaussian_blur(x, [_blur_window(x.shape[-1])] * 2, [float(p.sigma[v, i])] * 2)
        return TF.solarize(x, 128) if p.solarize[v, i] else x

    def finish(self, x, v):
        return _finish(x, self.spec[v], self.dtype)


def _blur_window(size: int) -> int:
    """A tenth of the image, odd: SimCLR's, which the libraries that want a window are given."""
    return 2 * (size // 20) + 1


def _pillow(material: Material, stages: tuple[Stage, ...], dtype: torch.dtype) -> Run:
    return _loop(material, stages, _PillowImages(material, dtype))


def _torchvision(material: Material, stages: tuple[Stage, ...], dtype: torch.dtype) -> Run:
    return _loop(material, stages, _TensorImages(material, dtype))


def _torchvision_batch(material: Material, stages: tuple[Stage, ...], dtype: torch.dtype) -> Run:
    """The first image's box and draws for the whole batch: what torchvision's kernels could do at best."""
    if len(stages) == 3:
        raise Unfit("one draw for all images is another recipe")
    images = _TensorImages(material, dtype)

    def run():
        out = []
        for v in range(len(material.spec)):
            x = images._cut(images.sources, v, 0) if "cut" in stages else images.crops[v]
            x = images.colour(x, v, 0) if "colour" in stages else x
            out.append(images.finish(x, v) if "finish" in stages else x)
        return out

    return run


# ------------------------------------------------------------------------------------------------ kornia


def _only_crops(spec: ViewSpec) -> None:
    """Unfit unless every view is a plain random resized crop of the whole image, which these libraries draw themselves."""
    if has_patches(spec) or any(isinstance(v.crop, CenterCrop) or v.crop.region != (0, 0, 1, 1) for v in spec):
        raise Unfit("views that are no random resized crop of the whole image")


def _kornia(material: Material, stages: tuple[Stage, ...], dtype: torch.dtype) -> Run:
    import kornia.augmentation as K

    _only_crops(material.spec)

    def modules(view: View):
        crop, p, window = view.crop, view.photometric, _blur_window(view.crop.size)
        if "cut" in stages:
            yield K.RandomResizedCrop((crop.size, crop.size), crop.scale, crop.ratio, resample=crop.interpolation.upper())
            yield K.RandomHorizontalFlip(p=crop.flip)
        if p.jitter and "colour" in stages:
            yield K.ColorJitter(p.brightness, p.contrast, p.saturation, p.hue, p=p.jitter)
        if p.grey and "colour" in stages:
            yield K.RandomGrayscale(p=p.grey)
        if p.blur and "colour" in stages:
            yield K.RandomGaussianBlur((window, window), p.sigma, p=p.blur)
        if p.solarize and "colour" in stages:
            yield K.RandomSolarize(thresholds=0.0, additions=0.0, p=p.solarize)
        if "finish" in stages:
            yield K.Normalize(p.mean, p.std)

    views = [torch.nn.Sequential(*modules(view)).to(material.device) for view in material.spec]
    sources = material.sources()
    ready = None if "cut" in stages else material.crops()
    if len(stages) < 3:  # a recipe starts from bytes
        sources, ready = sources.float() / 255, ready if ready is None else ready.float() / 255

    def run():
        images = sources.float() / 255 if len(stages) == 3 else sources
        out = [chain(images if ready is None else ready[v]) for v, chain in enumerate(views)]
        return [x.to(dtype) for x in out] if "finish" in stages else out

    return run


# ------------------------------------------------------------------------------------------------ DALI


def _dali(material: Material, stages: tuple[Stage, ...], dtype: torch.dtype) -> Run:
    from nvidia.dali import fn, pipeline_def, types

    _only_crops(material.spec)
    cuda = material.device.type == "cuda"
    where = "gpu" if cuda else "cpu"
    kinds = {torch.float32: types.FLOAT, torch.float16: types.FLOAT16}
    out_type = kinds.get(dtype, types.FLOAT)  # no bfloat16 there
    modes = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}

    def feed(images: Tensor):
        rows = images.permute(0, 2, 3, 1).contiguous()
        batch = list(rows) if cuda else list(rows.numpy())
        return fn.external_source(source=lambda: batch, device=where, layout="HWC", no_copy=True)

    def sometimes(p: float):
        return fn.random.coin_flip(probability=p, dtype=types.BOOL) if 0 < p < 1 else p == 1

    def around_one(strength: float):
        return fn.random.uniform(range=[max(0.0, 1 - strength), 1 + strength])

    def twist(x, p):
        factors = {name: around_one(getattr(p, name)) for name in ("brightness", "contrast", "saturation") if getattr(p, name)}
        if p.hue:
            factors["hue"] = fn.random.uniform(range=[-360 * p.hue, 360 * p.hue])
        return fn.color_twist(x, **factors)

    def inverted_from_half(x):
        return x ^ fn.cast((x >= 128) * 255, dtype=types.UINT8)

    @pipeline_def(
        batch_size=len(material.batch),
        num_threads=torch.get_num_threads(),
        device_id=material.device.index or 0 if cuda else None,
        seed=0,
        enable_conditionals=True,
        exec_async=False,
        exec_pipelined=False,
        prefetch_queue_depth=1,
    )
    def pipeline():
        source = feed(material.sources()) if "cut" in stages else None
        ready = None if "cut" in stages else material.crops()
        out = []
        for v, view in enumerate(material.spec):
            crop, p = view.crop, view.photometric
            if "cut" in stages:
                size, ratio = [crop.size, crop.size], list(crop.ratio)
                mode = modes[crop.interpolation]
                x = fn.random_resized_crop(
                    source, size=size, random_area=list(crop.scale), random_aspect_ratio=ratio, interp_type=mode, antialias=True
                )
                x = fn.flip(x, horizontal=fn.random.coin_flip(probability=crop.flip))
            else:
                x = feed(ready[v])
            if "colour" in stages:
                if sometimes(p.jitter):
                    x = twist(x, p)
                if sometimes(p.grey):
                    x = fn.saturation(x, saturation=0.0)
                if sometimes(p.blur):
                    x = fn.gaussian_blur(x, sigma=fn.random.uniform(range=list(p.sigma)))
                if sometimes(p.solarize):
                    x = inverted_from_half(x)
            if "finish" in stages:
                scale = [255 * t for t in p.mean], [255 * t for t in p.std]
                x = fn.crop_mirror_normalize(x, dtype=out_type, mean=scale[0], std=scale[1], output_layout="CHW")
            out.append(x)
        return tuple(out)

    built = pipeline()
    built.build()
    return built.run


RIVALS = {
    "pillow": Rival("torchvision + Pillow", "the pixels to match", _pillow, by_sample=True, cpu_only=True),
    "torchvision": Rival("torchvision v2, by sample", "a call per image: how each gets a draw of its own", _torchvision, by_sample=True),
    "torchvision_batch": Rival(
        "torchvision v2, one draw",
        "for all images of a view: not the recipe, but the bound of its kernels",
        _torchvision_batch,
        by_sample=False,
    ),
    "kornia": Rival("kornia", "a draw per image, but one order of the jitter per batch; crops not antialiased", _kornia, by_sample=False),
    "dali": Rival("DALI", "a draw per image, jitter in one fixed order, contrast about a fixed grey", _dali, by_sample=False),
}
