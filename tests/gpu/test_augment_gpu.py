"""The CUDA path of fastssl.augment: the numbers of the CPU kernels, no host synchronisation, one compiled graph per shape."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from skimage import data as photographs

from fastssl.augment import Augmenter
from fastssl.batch import ImageBatch
from fastssl.views import CenterCrop, Crop, Photometric, View, byol_asymmetric

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

# Largest difference on the 0..255 scale, but for the few values that rounding puts on the other side of a threshold.
TOLERANCE = 5e-3
OUTLIERS = 1e-4
PILLOW = 1.01

EVERYTHING = Photometric(jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grey=0.2, blur=0.5, solarize=0.2)
SPEC = (
    View(crop=Crop(size=48, interpolation="bicubic"), photometric=EVERYTHING),
    View(crop=Crop(size=48), photometric=replace(EVERYTHING, blur=1.0)),
    View(crop=CenterCrop(size=48, resize=60)),
    View(crop=Crop(size=24), photometric=EVERYTHING),
)


def make_batch(count: int, device: str, first: int = 0) -> ImageBatch:
    """Photographs of odd sizes, single lines and pixels among the boxes, rows padded by 4 bytes."""
    whole, parts, offsets, sizes, boxes, flips, at = photographs.astronaut(), [], [], [], [], [], 0
    for i in range(first, first + count):
        rng = np.random.default_rng(i)
        h, w = (int(n) for n in rng.integers(60, 400, 2))
        rows = np.zeros((h, 3 * w + 4), np.uint8)
        rows[:, : 3 * w] = whole[:h, 50 : 50 + w].reshape(h, -1)
        parts.append(rows.ravel())
        offsets.append(at)
        sizes.append((h, w))
        at += rows.size
        bh, bw = (1, 1) if i % 7 == 0 else (int(rng.integers(1, h + 1)), int(rng.integers(1, w + 1)))
        box = (rng.integers(0, h - bh + 1), rng.integers(0, w - bw + 1), bh, bw)
        side = 48 * min(h, w) / 60
        boxes.append([box, (0, 0, h, w), ((h - side) / 2, (w - side) / 2, side, side), box])
        flips.append(rng.random(4) < 0.5)
    hw = torch.tensor(sizes, dtype=torch.int32)
    batch = ImageBatch(
        pixels=torch.from_numpy(np.concatenate(parts)),
        offset=torch.tensor(offsets),
        height=hw[:, 0].contiguous(),
        width=hw[:, 1].contiguous(),
        pitch=3 * hw[:, 1] + 4,
        index=torch.arange(first, first + count),
        label=None,
        boxes=torch.tensor(np.array(boxes, dtype=np.float32)),
        flips=torch.tensor(np.array(flips)),
        epoch=2,
        step=0,
        max_hw=(400, 400),
    )
    tensors = {f.name: getattr(batch, f.name).to(device) for f in fields(batch) if torch.is_tensor(getattr(batch, f.name))}
    return replace(batch, **tensors)


def on_255(views, spec=SPEC):
    """Every view's pixels back on the 0..255 scale, on the host."""
    out = []
    for view, x in zip(spec, views.per_view(), strict=True):
        mean, std = (torch.tensor(t)[:, None, None] for t in (view.photometric.mean, view.photometric.std))
        out.append((x.float().cpu() * std + mean) * 255)
    return out


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert ((a - b).abs() > TOLERANCE).float().mean() <= OUTLIERS


@pytest.fixture(scope="module")
def expected():
    """The CPU kernels' views, which the unit tests compare with Pillow."""
    return on_255(Augmenter(SPEC, device="cpu", dtype=torch.float32, seed=5)(make_batch(16, "cpu")))


def test_cuda_equals_the_cpu_kernels(expected):
    aug = Augmenter(SPEC, device="cuda", dtype=torch.float32, seed=5)
    assert_same(on_255(aug(make_batch(16, "cuda"))), expected)
    without_bound = replace(make_batch(16, "cuda"), max_hw=None)
    assert_same(on_255(aug(without_bound)), expected)


def test_resized_crop_is_pillows():
    spec = (View(crop=Crop(size=48)),) * 4
    batch = make_batch(16, "cuda")
    ours = on_255(Augmenter(spec, device="cuda", dtype=torch.float32, seed=0)(batch), spec)
    for i in range(16):
        image = Image.fromarray(batch.image(i).cpu().numpy())
        for v in (0, 1, 3):
            theirs = TF.resized_crop(image, *(int(n) for n in batch.boxes[i, v]), [48, 48])
            theirs = TF.hflip(theirs) if batch.flips[i, v] else theirs
            assert (ours[v][i] - TF.pil_to_tensor(theirs).float()).abs().max() <= PILLOW


def test_no_host_synchronisation():
    aug = Augmenter(SPEC, device="cuda", dtype=torch.bfloat16, seed=5)
    batch = make_batch(16, "cuda")
    aug(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        views = aug(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for group in views.groups:
        assert group.pixels.dtype == torch.bfloat16 and group.pixels.is_contiguous(memory_format=torch.channels_last)


def test_compiled_chain_gives_the_same_and_compiles_once(expected):
    aug = Augmenter(SPEC, device="cuda", dtype=torch.float32, seed=5, compile=True)
    assert_same(on_255(aug(make_batch(16, "cuda"))), expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        aug(make_batch(16, "cuda", first=100))


def test_autocast_around_it_changes_nothing(expected):
    aug = Augmenter(SPEC, device="cuda", dtype=torch.float32, seed=5)
    with torch.autocast("cuda", torch.bfloat16):
        assert_same(on_255(aug(make_batch(16, "cuda"))), expected)


def test_full_size_batch_is_finite():
    """64 images at 224 pixels: the size training uses, several chunks of the resampling."""
    spec = byol_asymmetric(size=224)
    batch = make_batch(64, "cuda")
    batch = replace(batch, boxes=batch.boxes[:, :2], flips=batch.flips[:, :2])
    out = Augmenter(spec, device="cuda", dtype=torch.bfloat16, seed=0)(batch).groups[0].pixels
    assert out.shape == (128, 3, 224, 224) and bool(out.isfinite().all())
