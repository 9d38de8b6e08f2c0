"""The ring: one thread decodes ahead, straight into a few reusable buffers, and hands over finished `ImageBatch`es.

With CUDA the buffers are pinned and the same thread copies them to the device on a stream of its own.  A buffer is written
again only after the thread has waited, on the host, for the event of its last copy: waiting on a stream would order the
device's work only, and the decoder does not run there.  A decoder that works on the device writes into the batch's own
memory there, on that same stream, and needs no pinned pixels.
"""

from __future__ import annotations

import atexit
import functools
import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from fastssl.batch import ImageBatch, masked_patches
from loaders.decoder import OK, Decoder
from loaders.geometry import Geometry

_ALIGN = 64
"""Bytes; images and small vectors start on cache lines of their own."""


@dataclass(frozen=True)
class Job:
    """One batch to decode: int64 [B] sample ids, and the epoch and global step it is part of."""

    ids: np.ndarray
    epoch: int
    step: int
    keys: np.ndarray | None = None
    """int64 [B]: what keys the draws of each sample beside epoch and view; None: the sample ids."""


@dataclass
class _Slot:
    """Host memory of one batch. Grows, never shrinks."""

    pixels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    small: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    copied: torch.cuda.Event | None = None


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all rings: torch keeps freed device memory per stream, and every evaluation opens a ring."""
    return torch.cuda.Stream(device)


class Ring:
    """Decodes `jobs` in order, up to `prefetch` batches ahead of the one in the consumer's hands.

    The pixels of a batch are valid until the next `get`: on a CPU they are the ring's own memory.  All other tensors of
    the batch are its own.  Create, `get` and `close` in one thread; errors of the decoding thread are raised by `get`.
    """

    def __init__(self, decoder: Decoder, geometry: Geometry, jobs: Iterable[Job], device: torch.device, prefetch: int) -> None:
        self._decoder, self._geometry, self._jobs, self._device = decoder, geometry, jobs, device
        self._cuda = device.type == "cuda"
        self._capacity = 0
        self._free: SimpleQueue[_Slot | None] = SimpleQueue()
        self._ready: SimpleQueue[tuple[ImageBatch, _Slot] | BaseException | None] = SimpleQueue()
        for _ in range(prefetch + 1):
            # blocking: sleep in the wait, the core is for decoding.
            self._free.put(_Slot(copied=torch.cuda.Event(blocking=True) if self._cuda else None))
        self._held: _Slot | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="fastssl-ring", daemon=True)
        self._thread.start()
        # An abandoned ring must not decode into memory that the interpreter is taking down.
        atexit.register(self.close)

    def get(self) -> ImageBatch | None:
        """The next batch, or None after the last."""
        if self._held is not None:
            self._free.put(self._held)
            self._held = None
        if self._closed.is_set():
            return None
        item = self._ready.get()
        if item is None or isinstance(item, BaseException):
            self.close()
            if item is None:
                return None
            raise item
        batch, self._held = item
        if self._cuda:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._held.copied)
            for tensor in (batch.pixels, batch.index):  # the two allocations of a batch
                tensor.record_stream(stream)
        return batch

    def close(self) -> None:
        """Stop the thread; it ends with the batch it is at."""
        self._closed.set()
        self._free.put(None)
        if threading.current_thread() is not self._thread:  # the garbage collector runs in any thread
            self._thread.join(timeout=10)
        atexit.unregister(self.close)

    # -------------------------------------------------------------------------------------------- the decoding thread

    def _produce(self) -> None:
        try:
            if self._cuda:
                torch.cuda.set_device(self._device)
                with torch.cuda.stream(_copy_stream(self._device)):
                    self._run()
            else:
                self._run()
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)

    def _run(self) -> None:
        jobs = iter(self._jobs)
        job = next(jobs, None)
        while job is not None:
            slot = self._free.get()
            if slot is None or self._closed.is_set():
                return
            following = next(jobs, None)
            if following is not None:
                # A cold disk fetches the next batch while this one is decoded.
                self._decoder.will_need(following.ids)
            self._ready.put((self._fill(slot, job), slot))
            job = following

    def _fill(self, slot: _Slot, job: Job) -> ImageBatch:
        ids, keys = job.ids, job.ids if job.keys is None else job.keys
        heights, widths = self._decoder.sizes(ids)
        sizes = 3 * heights.astype(np.int64) * widths
        room = -(-sizes // _ALIGN) * _ALIGN
        offsets = np.cumsum(room) - room
        total = int(room.sum())
        boxes, flips = self._geometry.draw(keys, job.epoch, heights, widths)

        if self._cuda:
            slot.copied.synchronize()
        if total > self._capacity:
            self._capacity = math.ceil(total * 1.15 / 2**20) * 2**20  # batches differ: leave room for the largest
        pixels = self._decode(slot, ids, heights, widths, offsets, total)
        small = {"offset": offsets, "height": heights, "width": widths, "pitch": 3 * widths}
        small |= {"index": ids, "key": keys, "boxes": boxes, "flips": flips}
        if self._decoder.labels is not None:
            small["label"] = self._decoder.labels[ids]
        if (masks := self._geometry.draw_masks(keys, job.epoch)) is not None:
            small |= {"masks": masks, "masked": masked_patches(masks)}
        packed = dict(zip(small, self._pack(slot, list(small.values())), strict=True))
        if self._cuda:
            slot.copied.record()
        return ImageBatch(
            pixels=pixels,
            **({"label": None} | packed),
            epoch=job.epoch,
            step=job.step,
            max_hw=(int(heights.max()), int(widths.max())),
        )

    def _decode(self, slot: _Slot, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray, offsets: np.ndarray, total: int) -> Tensor:
        """The decoded images, `total` bytes with their gaps, in one uint8 vector on the device; raises the error of a bad sample."""
        on_device = self._decoder.on_device
        if on_device:
            pixels = self._device_memory()
        else:
            if slot.pixels.numel() < total:
                slot.pixels = torch.empty(self._capacity, dtype=torch.uint8, pin_memory=self._cuda)
            pixels = slot.pixels
        status = self._decoder.decode_into(ids, heights, widths, offsets, pixels if on_device else pixels.numpy())
        if (status != OK).any():
            worst = int(np.argmax(status != OK))
            raise self._decoder.error(int(ids[worst]), int(status[worst]))
        if self._cuda and not on_device:
            pixels = self._device_memory()
            pixels[:total].copy_(slot.pixels[:total], non_blocking=True)
        return pixels

    def _device_memory(self) -> Tensor:
        # Always the whole capacity: equal sizes keep torch's allocator from fragmenting.
        return torch.empty(self._capacity, dtype=torch.uint8, device=self._device)

    def _pack(self, slot: _Slot, arrays: list[np.ndarray]) -> list[Tensor]:
        """The arrays as tensors on the device, by way of one buffer and one copy."""
        starts = np.cumsum([0] + [-(-a.nbytes // _ALIGN) * _ALIGN for a in arrays])
        total = int(starts[-1])
        if not self._cuda:
            packed = host = torch.empty(total, dtype=torch.uint8)
        else:
            if slot.small.numel() < total:
                slot.small = torch.empty(total, dtype=torch.uint8, pin_memory=True)
            host, packed = slot.small, torch.empty(total, dtype=torch.uint8, device=self._device)
        target = host.numpy()
        for a, start in zip(arrays, starts, strict=False):
            target[start : start + a.nbytes] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
        if self._cuda:
            packed.copy_(host[:total], non_blocking=True)
        return [
            packed[start : start + a.nbytes].view(torch.from_numpy(a[:0]).dtype).view(a.shape)
            for a, start in zip(arrays, starts, strict=False)
        ]
