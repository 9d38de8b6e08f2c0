"""Other people's loaders on the same images, each in a process of its own:  python -m fastssl.bench.stock NAME FOLDER THREADS

pillow  torchvision's ImageFolder and DataLoader with DINO's whole recipe on Pillow images, `workers` processes
ffcv    FFCV's own Loader with one pipeline per view: every view decodes the image again, crops and resizes it; no colours
dali    DALI's file reader on the CPU: the image decoded once, one random_resized_crop per view; no colours

The protocol is one line of JSON each way: a first answer once everything is compiled, then an answer per request
{"seconds": S, "workers": W}, until the requests end.  `yardsticks.py` is the other side.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastssl.bench import recipe
from fastssl.bench.clock import Rate, clock, settle
from fastssl.views import IMAGENET_MEAN, IMAGENET_STD

Measure = Callable[[float, int], Rate]
PILLOW_BATCH, FFCV_BATCH, DALI_BATCH = 32, 64, 64
"""Images.  FFCV holds 40 whole images of the largest size for each image of a batch here: 8 views, 5 buffers."""
_LONG = 1 << 20
"""Samples of an 'epoch' of FFCV: its start and its buffers are not what is measured."""


# ------------------------------------------------------------------------------------------------ torchvision and Pillow


def _blur(image):
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class _Views:
    """DINO's recipe on one Pillow image -> 8 normalised tensors."""

    def __init__(self) -> None:
        from torchvision import transforms as T

        blur = [1.0, 0.1] + [0.5] * recipe.LOCALS
        solarise = [0.0, 0.2] + [0.0] * recipe.LOCALS
        self._views = [
            T.Compose(
                [
                    T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC),
                    T.RandomHorizontalFlip(),
                    T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                    T.RandomGrayscale(p=0.2),
                    T.RandomApply([T.Lambda(_blur)], p=blur[v]),
                    *([T.RandomSolarize(128, p=solarise[v])] if solarise[v] else []),
                    T.ToTensor(),
                    T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
                ]
            )
            for v, (size, scale) in enumerate(recipe.crops())
        ]

    def __call__(self, image):
        return [view(image) for view in self._views]


class _Endless:
    """Random positions for ever: no epoch ends within a measurement."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(0)
        while True:
            yield draw.randrange(self._count)


def pillow(folder: Path, threads: int) -> Measure:
    import torch
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    torch.set_num_threads(1)  # as in every worker
    images = ImageFolder(str(folder / "files"), _Views())

    def measure(seconds: float, workers: int) -> Rate:
        batches = iter(DataLoader(images, PILLOW_BATCH, sampler=_Endless(len(images)), num_workers=workers))
        burst = max(1, workers)
        for _ in range(2 * burst):  # decoded ahead of the clock
            next(batches)
        return clock(lambda: next(batches), PILLOW_BATCH, seconds, burst)

    return measure


# ------------------------------------------------------------------------------------------------ FFCV


def ffcv(folder: Path, threads: int) -> Measure:
    from loaders import ffcv as ours

    ours.load()  # numba's TBB threads, which the other threading layers do not beat
    import numpy as np
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import PipelineSpec
    from ffcv.reader import Reader
    from ffcv.transforms import ToTensor

    file = str(folder / "stock.beton")
    samples = int(Reader(file).num_samples)
    views = {
        f"view{v}": PipelineSpec("image", decoder=RandomResizedCropRGBImageDecoder((size, size), scale), transforms=[ToTensor()])
        for v, (size, scale) in enumerate(recipe.crops())
    }
    loader = Loader(
        file,
        FFCV_BATCH,
        num_workers=threads,
        os_cache=True,
        order=OrderOption.RANDOM,
        seed=0,
        indices=np.resize(np.arange(samples, dtype=np.uint64), _LONG),
        pipelines={"image": None, "label": None, **views},
    )
    batches = iter(loader)
    next(batches)  # compiles

    def measure(seconds: float, workers: int) -> Rate:
        for _ in range(loader.batches_ahead + 1):
            next(batches)
        return clock(lambda: next(batches), FFCV_BATCH, seconds)

    return measure


# ------------------------------------------------------------------------------------------------ DALI


def dali(folder: Path, threads: int) -> Measure:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=DALI_BATCH, num_threads=threads, device_id=None, seed=0)
    def views():
        encoded, _ = fn.readers.file(file_root=str(folder / "files"), random_shuffle=True, initial_fill=256)
        image = fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False)
        return tuple(fn.random_resized_crop(image, size=[size, size], random_area=scale) for size, scale in recipe.crops())

    pipeline = views()
    pipeline.build()

    def measure(seconds: float, workers: int) -> Rate:
        for _ in range(4):
            pipeline.run()
        return clock(pipeline.run, DALI_BATCH, seconds)

    pipeline.run()
    return measure


# ------------------------------------------------------------------------------------------------ the protocol

LOADERS = {"pillow": pillow, "ffcv": ffcv, "dali": dali}


@contextmanager
def _answers() -> Iterator[Callable[[dict], None]]:
    """Lines of JSON to the asker; whatever the libraries print goes to stderr."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)

        def answer(record: dict) -> None:
            out.write(json.dumps(record) + "\n")
            out.flush()

        yield answer


def main() -> None:
    name, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    with _answers() as answer:
        start = time.perf_counter()
        measure = LOADERS[name](folder, threads)
        settle()
        answer({"startup_s": time.perf_counter() - start})
        for line in sys.stdin:
            asked = json.loads(line)
            rate = measure(asked["seconds"], asked["workers"])
            settle()
            answer(rate._asdict())
    # Without finalisers: FFCV's thread still decodes into memory that the interpreter takes down.
    os._exit(0)


if __name__ == "__main__":
    main()
