"""Decoding on the device: the images of the CPU's decoders, bad samples by name, and no memory that is written too early."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from fastssl.recipes import center_crop
from loaders import dali
from loaders.beton import RAW, Beton
from loaders.build import build_eval_loader
from loaders.dali import DALIDecoder
from loaders.decoder import CHECKSUM, CORRUPT, OK, WRONG_SIZE
from loaders.open import open_decoder
from loaders.shards import Shards
from loaders.torchvision import TorchvisionDecoder
from tests.loaders.stored import OneMachine, assert_same, collect, copied, decode, difference, samples, train_loader, write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning"),
]
needs_dali = pytest.mark.skipif(bool(dali.load()), reason=str(dali.load()))
BACKENDS = [pytest.param("dali", marks=needs_dali), "torchvision_cuda"]

# Of one image, on the 0..255 scale, against libjpeg-turbo.  DALI is asked for the same interpolation of the colour planes;
# torchvision takes nvJPEG's default, which repeats their pixels, so single pixels at coloured edges differ more: where libjpeg-turbo
# itself repeats them, these samples differ by up to 5.6 in the mean (8 x 16 pixels, 4:2:0) and 26 in a pixel.
TOLERANCE = {"dali": (2.0, 40), "torchvision_cuda": (6.5, 90)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    write(folder / "train.beton", samples(raw=True, count=200))
    write(folder / "train.json", samples(raw=False, count=200))
    return folder


def on_gpu(path: Path, backend: str):
    return open_decoder(str(path), "train", backend=backend, workers=2, device=torch.device("cuda", 0))


@pytest.mark.parametrize("form", ["train.beton", "train.json"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_images_are_those_of_the_cpu(folder, backend, form):
    decoder = on_gpu(folder / form, backend)
    assert decoder.on_device
    theirs, _ = decode(TorchvisionDecoder(decoder.samples, 2), range(200))
    for ids in (range(200), range(7), [5]):
        ours, status = decode(decoder, ids, gap=5)
        assert (status == OK).all()
        for i, image in zip(ids, ours, strict=True):
            mean, largest = difference(image, theirs[i])
            assert mean <= TOLERANCE[backend][0] and largest <= TOLERANCE[backend][1], (i, mean, largest)
            assert largest == 0 or decoder.samples.mode[i] != RAW


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_samples_are_found_and_the_others_decoded(tmp_path, backend):
    stored = samples(raw=True)
    content, mode, height, width = stored[16]
    stored[16] = (content[:2] + bytes(len(content) - 2), mode, height, width)
    content, mode, height, width = stored[9]
    stored[9] = (content, mode, height, width + 8)
    decoder = on_gpu(write(tmp_path / "train.beton", stored), backend)
    with open(decoder.path, "r+b") as f:
        f.seek(int(decoder.samples.ptr[20]) + 300)
        f.write(b"\x00\x01")
    wanted = np.full(50, OK)
    wanted[[16, 9, 20]] = CORRUPT, WRONG_SIZE, CHECKSUM
    theirs, _ = decode(TorchvisionDecoder(decoder.samples, 2), np.flatnonzero(wanted == OK))
    for _ in range(2):
        ours, status = decode(decoder, range(50))
        assert status.tolist() == wanted.tolist()
        good = [image for image, w in zip(ours, wanted, strict=True) if w == OK]
        assert all(difference(a, b)[0] <= TOLERANCE[backend][0] for a, b in zip(good, theirs, strict=True))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_a_slow_consumer_finds_its_batch_untouched(folder, backend):
    """The device falls behind while other memory is freed and taken: a slot or an image that is reused too early would show."""
    cuda = OneMachine(device=torch.device("cuda", 0))
    expected = collect(train_loader(folder / "train.beton", batch=24, backend="torchvision").from_step(0), 40)
    loader, kept = train_loader(folder / "train.beton", batch=24, dist=cuda, backend=backend), []
    for batch in islice(loader.from_step(0), 40):
        torch.cuda._sleep(2_000_000)
        scratch = torch.full((batch.pixels.numel(),), 7, dtype=torch.uint8, device="cuda")
        kept.append((batch, batch.pixels.clone(), scratch.sum()))
        del scratch
    for want, (batch, pixels, total) in zip(expected, kept, strict=True):
        assert int(total) == 7 * pixels.numel()
        batch.pixels = pixels
        got = copied(batch)
        assert_same([want], [got], pixels=False)
        for image, reference in zip(got["images"], want["images"], strict=True):
            assert difference(image.numpy(), reference.numpy())[0] <= TOLERANCE.get(backend, (1.0,))[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_is_bounded(folder, backend):
    loader = train_loader(folder / "train.beton", batch=24, dist=OneMachine(device=torch.device("cuda", 0)), backend=backend)
    used = []
    for n, batch in enumerate(islice(loader.from_step(0), 600)):
        batch.pixels.sum()
        if n >= 200 and n % 100 == 0:
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info()
            used.append(total - free)
    assert max(used) - used[0] <= 32 << 20, used


@needs_dali
def test_dalis_reader_feeds_the_device(folder, tmp_path):
    write(tmp_path / "val.json", samples(raw=False, count=200))
    cuda = OneMachine(device=torch.device("cuda", 0))
    loader = build_eval_loader(str(tmp_path), "val", center_crop(size=32, resize=36), dist=cuda, batch=32, backend="dali")
    got = collect(loader, 8)
    fed = DALIDecoder(Shards.open(tmp_path, "val"), 1, cuda.device)
    images = [image.numpy() for batch in got for image in batch["images"]]
    assert len(images) == 200
    for i, image in enumerate(images):
        # The unit and CUDA share a batch by its length and may round differently.
        assert difference(image, decode(fed, [i])[0][0])[0] <= 1


@needs_dali
def test_a_gpu_gets_the_memory_hints(folder):
    decoder = on_gpu(folder / "train.beton", "dali")
    assert decoder.memory_hints == dali.memory_hints(Beton.open(folder / "train.beton")) != {}
