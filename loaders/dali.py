"""Back end `dali`: NVIDIA DALI's image decoder, on the GPU (the hardware unit of A100 and later together with CUDA) or, without
one, in its own CPU threads.

DALI gets each batch through `external_source` in the ring's order, one batch in and one out: it holds no order and no state
of its own, so a run resumes at any step.  A sequential pass over shards is handed to DALI's own reader, which reads and
decodes ahead; heights and widths come from the shards' index there too, since DALI's readers know none before they decode.
EXIF orientation is ignored, as everywhere here.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from loaders.batched import BatchDecoder
from loaders.beton import JPEG
from loaders.decoder import CORRUPT, OK, WRONG_SIZE, Samples
from loaders.errors import DataError
from loaders.shards import Shards

HARDWARE_SHARE = 0.75
"""Of a batch, what the hardware JPEG unit takes where there is one (`hw_decoder_load`); CUDA takes the rest.  The fastest split
on an A100 (github.com/NVIDIA/DALI/issues/5362).  The two may round differently; 1 leaves every JPEG that the unit can take to it."""
DEVICE_BYTES, HOST_BYTES = 5.5, 3.7
"""Memory per pixel of the largest JPEG that nvJPEG gets in advance for each thread (`device_memory_padding` and
`host_memory_padding`): with less it allocates in mid-run.  NVIDIA's ResNet-50 examples give 211,025,920 and 140,544,512 bytes
for ImageNet, whose largest image has 6430 x 5980 pixels."""


@functools.cache
def load() -> str | None:
    """None, or why DALI cannot be used here."""
    try:
        from nvidia import nvimgcodec  # noqa: F401
        from nvidia.dali import fn, pipeline, types  # noqa: F401
    except ModuleNotFoundError:
        return "DALI is not installed"
    except (ImportError, OSError) as error:
        return f"DALI cannot be imported ({error})"
    return None


class DALIDecoder(BatchDecoder):
    """Decodes a stored data set with DALI on `device`; `workers` threads of DALI's, which on a GPU parse and entropy-decode."""

    name = "dali"

    def __init__(self, samples: Samples, workers: int, device: torch.device) -> None:
        if problem := load():
            raise DataError(f"The loader dali cannot be used here: {problem}. Run `make setup`, or take --efficiency.loader auto.")
        super().__init__(samples, workers, device)
        self.memory_hints = memory_hints(samples) if device.type == "cuda" else {}
        """What is asked of nvJPEG; empty on a CPU."""
        self._room = 0
        self._pipeline = None
        self._reader: _Reader | None = None
        self._expected = -1

    def decode_into(
        self, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray, offsets: np.ndarray, buffer: np.ndarray | Tensor
    ) -> np.ndarray:
        if len(ids) > self._room:
            # A pipeline has a largest batch; the share of JPEGs in a batch varies, its length hardly does.
            self._room, self._pipeline = len(ids), None
        return super().decode_into(ids, heights, widths, offsets, buffer)

    def _parse(self, i: int) -> int:
        # By the parser that DALI uses.  DALI has several threads parse a batch, and when one of them meets a header that it cannot
        # parse, the operator ends under the hands of the others: an error at best, and often a crash of the process.
        from nvidia.nvimgcodec import CodeStream

        try:
            found = CodeStream(self.samples.sample(i))
            size, codec = (found.height, found.width), found.codec_name
        except RuntimeError:
            return CORRUPT
        if codec != "jpeg":
            return CORRUPT
        return OK if size == (self.samples.height[i], self.samples.width[i]) else WRONG_SIZE

    def _decode(self, ids: np.ndarray) -> list[Tensor]:
        images = self._read_on(ids)
        if images is None:
            self._pipeline = self._pipeline or self._fed_pipeline()
            try:
                (images,) = self._pipeline.run(encoded=[self.samples.sample(i) for i in ids])
            except RuntimeError:
                self._pipeline = None  # DALI's pipelines end with their first error
                raise
        return [torch.from_dlpack(images[b]) for b in range(len(ids))]

    def _fed_pipeline(self):
        from nvidia.dali import fn, types

        def encoded():
            # The samples stay mapped for as long as this decoder lives, so DALI need not copy them.
            return fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)

        return self.build(encoded, self._room, ahead=1)

    def build(self, encoded, batch: int, ahead: int):
        """A pipeline that decodes the JPEGs of the node that `encoded()` makes: `batch` images a run, `ahead` runs at work."""
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline

        pipeline = Pipeline(batch, self.workers, self._device_id(), prefetch_queue_depth=ahead)
        with pipeline:
            images = fn.decoders.image(
                encoded(),
                device="mixed" if self._device.type == "cuda" else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
                **self.memory_hints,
            )
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def _device_id(self) -> int | None:
        if self._device.type != "cuda":
            return None
        return torch.cuda.current_device() if self._device.index is None else self._device.index

    # -------------------------------------------------------------------------------------------- DALI's own reader

    def _read_on(self, ids: np.ndarray):
        """The decoded images of `ids` by DALI's own reader, or None where they do not continue a sequential pass over shards."""
        continues = ids[0] == self._expected and len(ids) > 1 and bool((np.diff(ids) == 1).all())
        self._expected = int(ids[-1]) + 1
        reader, self._reader = self._reader, None
        if not continues or not isinstance(self.samples, Shards):
            return None
        batch = len(ids) if reader is None else reader.batch
        # It decodes one batch ahead, and begins again after the last sample.
        reach = np.arange(ids[0], ids[0] + 2 * batch) % len(self.samples)
        if len(ids) > batch or any(self._pool.map(self._first_look, reach[self._unseen[reach]].tolist())):
            return None
        try:
            reader = reader or _Reader(self, int(ids[0]), batch)
            images = reader.next()
        except RuntimeError:
            return None  # the samples are decoded again, fed one batch, and the one at fault is named
        if len(ids) == batch:  # else it is the end of the pass, and the reader has gone on beyond it
            self._reader = reader
        return images


class _Reader:
    """DALI's WebDataset reader over a set of shards, from sample `first` on, `batch` samples a run."""

    def __init__(self, decoder: DALIDecoder, first: int, batch: int) -> None:
        from nvidia.dali import fn

        shards = decoder.samples
        self.batch = batch

        def encoded():
            # DALI begins at sample shard_id * N / num_shards and goes on through the following shards of its split.
            return fn.readers.webdataset(
                paths=[str(tar) for tar in shards.tars],
                index_paths=[str(tar.with_suffix(".idx")) for tar in shards.tars],
                ext=["jpg"],
                missing_component_behavior="error",
                shard_id=first,
                num_shards=len(shards),
            )

        self._pipeline = decoder.build(encoded, batch, ahead=2)

    def next(self):
        (images,) = self._pipeline.run()
        return images


def memory_hints(samples: Samples) -> dict[str, float | int | bool]:
    """Arguments of DALI's decoder for the largest JPEG of a data set, so that nothing is allocated in mid-run."""
    jpeg = samples.mode == JPEG
    height, width = (int(side[jpeg].max(initial=1)) for side in (samples.height, samples.width))
    pixels = int((samples.height[jpeg].astype(np.int64) * samples.width[jpeg]).max(initial=1))
    return {
        "hw_decoder_load": HARDWARE_SHARE,
        "preallocate_height_hint": height,
        "preallocate_width_hint": width,
        "device_memory_padding": math.ceil(DEVICE_BYTES * pixels),
        "host_memory_padding": math.ceil(HOST_BYTES * pixels),
        "jpeg_fancy_upsampling": True,  # as libjpeg-turbo, so that a GPU gives the pixels of a CPU but for rounding
        "affine": False,  # pinned threads of two ranks would meet on the same cores
    }
