"""Evaluations that train: epoch by epoch on labelled images, saved after each, and continued after an interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from eval.labels import check_apart, checked_classes
from eval.results import together
from eval.unfinished import read_state
from fastssl.augment.augmenter import Augmenter
from fastssl.batch import ImageBatch
from fastssl.checkpoint import atomic_save
from fastssl.distributed import Dist
from fastssl.views import CenterCrop, Interpolation, Photometric, View, ViewSpec
from loaders.build import EvalLoader, TrainLoader, build_eval_loader, build_loader
from loaders.open import Backend
from loaders.order import LastBatch


class Measured(Protocol):
    """A protocol: how long is trained, and what is measured."""

    epochs: int
    resize: int
    crop: int
    interpolation: Interpolation
    """Of the images to classify."""


@dataclass
class LabelledData:
    """The images to learn from and to classify."""

    train: TrainLoader
    val: EvalLoader
    val_crops: Augmenter
    num_classes: int


def open_labelled(
    path: str,
    train_spec: ViewSpec,
    protocol: Measured,
    *,
    dist: Dist,
    batch: int,
    passes: int,
    last_batch: LastBatch,
    forward: int,
    normalisation: Photometric,
    subset: str = "",
    queries: str = "",
    dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
    workers: int = 0,
    seed: int = 0,
) -> LabelledData:
    """Arguments as on the command line, but

    batch, passes   images of a rank's forward pass, and passes of a step
    forward         images per rank of a forward pass when measuring
    normalisation   its mean and std

    DataError for what cannot be learned or measured.
    """
    reading = {"dist": dist, "backend": backend, "workers": workers}
    batches = {"batch": batch, "accumulation_steps": passes, "last_batch": last_batch, "seed": seed}
    train = build_loader(path, "train", train_spec, **reading, **batches, subset=subset)
    centre = CenterCrop(size=protocol.crop, resize=protocol.resize, interpolation=protocol.interpolation)
    val_spec = (View(crop=centre, photometric=Photometric(mean=normalisation.mean, std=normalisation.std)),)
    val = build_eval_loader(path, "train" if queries else "val", val_spec, **reading, batch=forward, subset=queries)
    num_classes = checked_classes(train, val, path)
    if queries:
        check_apart(train, val)
    return LabelledData(train, val, Augmenter(val_spec, device=dist.device, dtype=dtype, seed=seed), num_classes)


class Epochs:
    """An evaluation that trains; `run` trains what is left of it."""

    format: ClassVar[str]
    """Of its saved states."""
    protocol: Measured
    data: LabelledData
    dist: Dist
    history: list[Any]
    """One record of each epoch."""

    def steps_per_epoch(self) -> int:
        raise NotImplementedError

    def epoch(self, batches: Iterator[ImageBatch], number: int) -> Any:
        """Train one epoch, counted from 0, and measure where the protocol does -> its record."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises where something is wrong after the first epoch or at the end."""

    def line(self, record: Any) -> str:
        """One epoch in words."""
        raise NotImplementedError

    def state_dict(self) -> dict:
        raise NotImplementedError

    def load_state_dict(self, state: dict) -> None:
        """With the history of `state`, records as plain values."""
        raise NotImplementedError

    def run(self, state_file: Path | None, identity: dict[str, object], say: Callable[[str], None]) -> None:
        """Train the epochs that are left; after each the state is saved, atomically.

        state_file   where; None: nowhere.  It stays until `publish`: what comes of the training is not written yet
        identity     what must be equal for a saved state to be continued

        ConfigError for the state of another evaluation, and where it cannot be written.
        """
        if state_file is not None and state_file.exists():
            self.load_state_dict(read_state(state_file, identity))
            say(f"continuing {state_file} after epoch {len(self.history)}")
        done = len(self.history)
        for number in range(done, self.protocol.epochs):
            with closing(self.data.train.from_step(number * self.steps_per_epoch())) as batches:
                record = self.epoch(batches, number)
            self.history.append(record)
            if number == done:
                self.check()
            if state_file is not None:
                self._save(state_file, identity)
            say(self.line(record))
        self.check()

    def _save(self, path: Path, identity: dict[str, object]) -> None:
        with together(self.dist, path):
            if self.dist.is_main:
                history = [asdict(record) for record in self.history]
                atomic_save({"format": self.format, "identity": identity, "history": history, **self.state_dict()}, path)
