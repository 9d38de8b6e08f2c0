"""The views that the papers train on, by name; each recipe cites its table.  Plain data, as `fastssl/views.py`: no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from fastssl.views import (
    STL10_MEAN,
    STL10_STD,
    CenterCrop,
    Crop,
    Dataset,
    Interpolation,
    Mask,
    PatchCrop,
    Photometric,
    View,
    ViewSpec,
    WindowCrop,
)

BYOL_JITTER = Photometric(jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, grey=0.2)
MOCO_JITTER = replace(BYOL_JITTER, saturation=0.4)
OBOW_JITTER = replace(BYOL_JITTER, saturation=0.4, hue=0.4)
SIMCLR_JITTER = replace(BYOL_JITTER, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
STL10_JITTER = replace(OBOW_JITTER, jitter=1.0, mean=STL10_MEAN, std=STL10_STD)

IBOT_BLOCKS = Mask()

# W2SSL's overlapping strips, to be counted from the middle (its code cuts at w // 2 + 0.3 w): left, right.
W2SSL_HALVES = ((-1.0, -1.0, 1.0, 0.3), (-1.0, -0.3, 1.0, 1.0))
# Of its four quadrants: top left, bottom left, top right, bottom right.
W2SSL_QUADRANTS = ((-1.0, -1.0, 0.3, 0.3), (-0.3, -1.0, 1.0, 0.3), (-1.0, -0.3, 0.3, 1.0), (-0.3, -0.3, 1.0, 1.0))


def _asymmetric(crop: Crop) -> ViewSpec:
    """BYOL's two recipes of colours on one kind of crop: A (always blurred), B (blur .1, solarise .2)."""
    return (
        View(crop=crop, photometric=replace(BYOL_JITTER, blur=1.0)),
        View(crop=crop, photometric=replace(BYOL_JITTER, blur=0.1, solarize=0.2)),
    )


def byol_asymmetric(*, size: int = 224, min_scale: float = 0.2) -> ViewSpec:
    """BYOL / EMAN / LEWEL / MoCo v3: view 1 by recipe A (always blurred), view 2 by recipe B (blur .1, solarise .2).

    LEWEL's table of operations; the smallest crop is MoCo's 0.2 (not BYOL's 0.08) and bilinear.  MoCo v3's order puts the flip
    last, which is the same; its ViTs crop from 0.08.
    """
    return _asymmetric(Crop(size=size, scale=(min_scale, 1.0)))


def mocov2(*, size: int = 224) -> ViewSpec:
    """MoCo v2 (arXiv 2003.04297; its code) and LEWEL_M: query and key by one recipe, blur .5, crops from 0.2, bilinear."""
    return (View(crop=Crop(size=size, scale=(0.2, 1.0)), photometric=replace(MOCO_JITTER, blur=0.5)),) * 2


def vicreg(*, size: int = 224) -> ViewSpec:
    """VICReg (arXiv 2105.04906; its code): BYOL's colours on bicubic crops from 0.08.

    What SFRIK, SimCLR, AUH and VICReg train with on ImageNet in the SFRIK code.
    """
    return _asymmetric(Crop(size=size, interpolation="bicubic"))


def simclr(*, size: int = 224) -> ViewSpec:
    """SimCLR (arXiv 2002.05709) as an augmentation of the SFRIK code: jitter .8 .8 .8 .2, blur .5, bicubic crops from 0.08."""
    return (View(crop=Crop(size=size, interpolation="bicubic"), photometric=replace(SIMCLR_JITTER, blur=0.5)),) * 2


def auh(*, size: int = 64) -> ViewSpec:
    """AUH (arXiv 2005.10242) as an augmentation of the SFRIK code, for STL10: every image jittered, no blur, bicubic crops from 0.08."""
    return (View(crop=Crop(size=size, interpolation="bicubic"), photometric=STL10_JITTER),) * 2


def obow(*, dataset: Dataset = "imagenet", crops: int = 2, crop_size: int = 160, patches: int = 5, patch_size: int = 96) -> ViewSpec:
    """OBoW's multi-crop as SFRIK has it (its code; hue 0.4 where OBoW's own is 0.1), three groups: the original without colours,
    small crops, and patches of one large crop that share its flip and colours.  patches = 0: no such view.
    """
    stl10 = dataset == "stl10"
    colours = STL10_JITTER if stl10 else OBOW_JITTER
    original = CenterCrop(size=96, resize=96, flip=0.5) if stl10 else CenterCrop(flip=0.5)
    small = View(crop=Crop(size=crop_size, scale=(0.08, 0.6)), photometric=replace(colours, blur=0.5))
    views = [View(crop=original, photometric=Photometric(mean=colours.mean, std=colours.std))]
    views += [replace(small, separate=v == 0) for v in range(crops)]
    if patches:
        patched = PatchCrop(size=96 if stl10 else 256, scale=(0.6, 1.0), patch_size=patch_size, patches=patches)
        views.append(View(crop=patched, photometric=colours))
    return tuple(views)


def swav(
    *,
    dataset: Dataset = "imagenet",
    counts: tuple[int, ...] = (2, 6),
    sizes: tuple[int, ...] = (224, 96),
    scales: tuple[tuple[float, float], ...] = ((0.14, 1.0), (0.05, 0.14)),
) -> ViewSpec:
    """SwAV's multi-crop as SFRIK has it (its code and command for IN20%): counts[k] bilinear crops of sizes[k] from scales[k]."""
    colours = replace(STL10_JITTER if dataset == "stl10" else SIMCLR_JITTER, blur=0.5)
    kinds = zip(counts, sizes, scales, strict=True)
    return tuple(View(crop=Crop(size=size, scale=scale), photometric=colours) for n, size, scale in kinds for _ in range(n))


def dino(
    *,
    size: int = 224,
    global_scale: tuple[float, float] = (0.4, 1.0),
    local_crops: int = 8,
    local_size: int = 96,
    local_scale: tuple[float, float] = (0.05, 0.4),
) -> ViewSpec:
    """DINO (arXiv 2104.14294), SCFS; with masks iBOT, SERE: two global crops with BYOL's colours, then local ones (blur .5), all bicubic.

    The scales and the number of local crops are what their presets change; defaults: DINO's code and its ViT-S of 100 epochs.
    """
    local = Crop(size=local_size, scale=local_scale, interpolation="bicubic")
    local_view = View(crop=local, photometric=replace(BYOL_JITTER, blur=0.5))
    return (*_asymmetric(Crop(size=size, scale=global_scale, interpolation="bicubic")), *[local_view] * local_crops)


def ibot(*, mask: Mask = IBOT_BLOCKS, **crops) -> ViewSpec:
    """iBOT (arXiv 2111.07832) and SERE: `dino`, whose arguments `crops` are, with masks on the two global crops."""
    first, second, *local = dino(**crops)
    return (replace(first, mask=mask), replace(second, mask=mask), *local)


def _parts(regions: tuple, crop: Crop, view1: Photometric, view2: Photometric) -> ViewSpec:
    """Every part of the image by the colours of view 1, then by those of view 2; a group each."""
    return tuple(
        View(crop=replace(crop, region=r, region_from="middle"), photometric=colours, separate=r is regions[0])
        for colours in (view1, view2)
        for r in regions
    )


def w2ssl(*, size: int = 112, min_scale: float = 0.2) -> ViewSpec:
    """W2SSL's strips (its code): left and right as view 1, left and right as view 2, colours as `byol_asymmetric`."""
    view1, view2 = (view.photometric for view in byol_asymmetric())
    return _parts(W2SSL_HALVES, Crop(size=size, scale=(min_scale, 1.0)), view1, view2)


def w2ssl_windows(*, size: int = 112, min_scale: float = 0.2) -> ViewSpec:
    """W2SSL as older caches of its code have it: the strips as view 1; view 2 is one crop of the whole image, of twice the side, with its
    colours, that is handed out as two windows (methods/w2ssl.md section 14)."""
    left, right, view2, _ = w2ssl(size=size, min_scale=min_scale)
    crop = WindowCrop(size=2 * size, scale=(min_scale, 1.0), patch_size=size, patch_jitter=3 * size // 5)
    return (left, right, View(crop=crop, photometric=view2.photometric))


def w2ssl_quad(*, size: int = 112, min_scale: float = 0.2) -> ViewSpec:
    """W2SSL's quadrants (its ablation code): four parts as view 1 (blur .5, solarise .5), four as view 2 (blur .1, solarise .2)."""
    view1, view2 = replace(MOCO_JITTER, blur=0.5, solarize=0.5), replace(MOCO_JITTER, blur=0.1, solarize=0.2)
    return _parts(W2SSL_QUADRANTS, Crop(size=size, scale=(min_scale, 1.0)), view1, view2)


def center_crop(
    *, size: int = 224, resize: int = 256, interpolation: Interpolation = "bilinear", dataset: Dataset = "imagenet"
) -> ViewSpec:
    """One undistorted view: what evaluations see.  Bicubic in DINO, iBOT, SERE and SFRIK's features; STL10 as it is (96, 96)."""
    plain = Photometric(mean=STL10_MEAN, std=STL10_STD) if dataset == "stl10" else Photometric()
    return (View(crop=CenterCrop(size=size, resize=resize, interpolation=interpolation), photometric=plain),)


def random_resized_crop(*, size: int = 224, min_scale: float = 0.08, interpolation: Interpolation = "bilinear") -> ViewSpec:
    """One view, cropped and flipped: what linear probes and semi-supervised training see; end-to-end fine-tuning of ViTs: bicubic."""
    return (View(crop=Crop(size=size, scale=(min_scale, 1.0), interpolation=interpolation)),)


RECIPES: dict[str, Callable[[], ViewSpec]] = {
    "byol": byol_asymmetric,
    "lewel": byol_asymmetric,
    "mocov3": byol_asymmetric,
    "mocov3_vit": partial(byol_asymmetric, min_scale=0.08),
    "mocov2": mocov2,
    "lewel_m": mocov2,
    "sfrik": vicreg,
    "vicreg": vicreg,
    "simclr": simclr,
    "auh": auh,
    "obow": obow,
    "obow_stl10": partial(obow, dataset="stl10", crop_size=64, patch_size=48),
    "swav": swav,
    "swav_stl10": partial(swav, dataset="stl10", sizes=(64, 32)),
    "dino": dino,
    "dino_r50": partial(dino, global_scale=(0.14, 1.0), local_scale=(0.05, 0.14)),
    "ibot": partial(ibot, global_scale=(0.25, 1.0), local_crops=10, local_scale=(0.05, 0.25)),
    "ibot_vitb": partial(ibot, global_scale=(0.32, 1.0), local_crops=10, local_scale=(0.05, 0.32)),
    "sere": partial(ibot, local_crops=10),
    "sere_vitb": partial(ibot, global_scale=(0.32, 1.0), local_crops=10, local_scale=(0.05, 0.32)),
    "scfs": partial(dino, global_scale=(0.25, 1.0), local_scale=(0.05, 0.25)),
    "w2ssl": w2ssl,
    "w2ssl_windows": w2ssl_windows,
    "w2ssl_quad": w2ssl_quad,
    "eval": center_crop,
    "eval_bicubic": partial(center_crop, interpolation="bicubic"),
    "eval_stl10": partial(center_crop, size=96, resize=96, dataset="stl10"),
    "linear_train": random_resized_crop,
    "finetune": partial(random_resized_crop, interpolation="bicubic"),
}
"""The recipes with published arguments, by name.  simclr, auh, obow and swav are augmentations of the SFRIK code, which trains
the methods SimCLR and AUH on ImageNet with `vicreg`.  The sizes of obow_stl10 and swav_stl10 are ours: none is published."""
