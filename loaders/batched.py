"""What is common to back ends that decode a whole batch in one call: raw samples go past the decoder, the images are placed
where the ring wants them, and when the call fails the sample at fault is found.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from loaders.beton import RAW
from loaders.decoder import CHECKSUM, CORRUPT, OK, OUTSIDE, WRONG_SIZE, Samples, StoredDecoder


class BatchDecoder(StoredDecoder, ABC):
    """Decodes a stored data set batch by batch, on `device`; `workers` threads copy and compare checksums."""

    def __init__(self, samples: Samples, workers: int, device: torch.device) -> None:
        super().__init__(samples)
        self.workers = workers
        self.on_device = device.type == "cuda"
        self._device = device
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="fastssl-decode")
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._unseen = np.ones(len(samples), np.bool_)

    @abstractmethod
    def _decode(self, ids: np.ndarray) -> list[Tensor]:
        """Decode the JPEG samples int64 [B] `ids` (B > 0): uint8 [height, width, 3] each, finished on the current stream.
        Raises RuntimeError when any of them fails."""

    def decode_into(
        self, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray, offsets: np.ndarray, buffer: np.ndarray | Tensor
    ) -> np.ndarray:
        sizes = 3 * heights.astype(np.int64) * widths
        status = np.where((offsets < 0) | (offsets + sizes > len(buffer)), OUTSIDE, OK).astype(np.int32)
        fresh = np.flatnonzero((status == OK) & self._unseen[ids])
        status[fresh] = list(self._pool.map(self._first_look, ids[fresh].tolist()))
        raw = self.samples.mode[ids] == RAW

        jpegs = np.flatnonzero(~raw & (status == OK))
        status[jpegs], images = self._decode_good(ids[jpegs])
        images = dict(zip(jpegs[status[jpegs] == OK], images, strict=True))
        for b, image in images.items():
            if tuple(image.shape) != (heights[b], widths[b], 3):
                status[b] = WRONG_SIZE

        good = np.flatnonzero(status == OK)
        targets = [buffer[offsets[b] : offsets[b] + sizes[b]] for b in good]
        if self.on_device:
            self._place_on_device([images.get(b) for b in good], targets, ids[good], sizes[good])
        else:
            self._place([images.get(b) for b in good], targets, ids[good])
        return status

    def _first_look(self, i: int) -> int:
        """Status of a sample that this process has not decoded yet, as far as it shows before decoding."""
        status = CHECKSUM if not self.verify(i) else OK if self.samples.mode[i] == RAW else self._parse(i)
        self._unseen[i] = status != OK
        return status

    def _parse(self, i: int) -> int:
        """Status of a JPEG sample by its header, for a decoder that must not be given every header.  Thread-safe."""
        return OK

    def _decode_good(self, ids: np.ndarray) -> tuple[np.ndarray, list[Tensor]]:
        """The status of each JPEG, int32 [B], and the images of those that are OK."""
        status = np.full(len(ids), OK, np.int32)
        if len(ids) == 0:
            return status, []
        try:
            return status, self._decode(ids)
        except RuntimeError:
            for b in range(len(ids)):
                try:
                    self._decode(ids[b : b + 1])
                except RuntimeError:
                    status[b] = CORRUPT
            good = ids[status == OK]
            if len(good) == len(ids) or (len(good) == 0 and len(ids) > 1):
                raise  # not the data: no memory, say
            return status, self._decode(good) if len(good) else []

    def _place(self, images: list[Tensor | None], targets: list[np.ndarray], ids: np.ndarray) -> None:
        """Copy each image, or the raw sample where there is none, to its target."""

        def share(first: int) -> None:
            # numpy releases the GIL while it copies, and starts no threads of its own as torch would.
            for k in range(first, len(ids), self.workers):
                source = self.samples.sample(ids[k]) if images[k] is None else images[k].reshape(-1).numpy()
                np.copyto(targets[k], source)

        list(self._pool.map(share, range(self.workers)))

    def _place_on_device(self, images: list[Tensor | None], targets: list[Tensor], ids: np.ndarray, sizes: np.ndarray) -> None:
        """The same on the device, in the order of the current stream; raw samples by way of pinned memory."""
        is_raw = np.array([image is None for image in images], np.bool_)
        room = int(sizes[is_raw].sum())
        if self._staging.numel() < room:
            self._staging = torch.empty(room, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        at = 0
        for k, image in enumerate(images):
            if image is None:
                image = self._staging[at : at + int(sizes[k])]
                np.copyto(image.numpy(), self.samples.sample(ids[k]))
                at += int(sizes[k])
            targets[k].view(image.shape).copy_(image, non_blocking=True)
        if self._device.type == "cuda":
            # The decoders reuse the memory of these images, and nvJPEG's hardware engine does not wait for what is queued on
            # a stream before it writes (github.com/pytorch/vision/pull/9606): nothing may be pending when the images go.
            torch.cuda.current_stream(self._device).synchronize()
