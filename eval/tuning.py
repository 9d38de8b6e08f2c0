"""Training a whole network with a new classifier: an epoch, its steps and its evaluation."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from eval.accuracy import Accuracy, accuracy
from eval.classifier import Classifier
from eval.epochs import Epochs, LabelledData, open_labelled
from eval.training_images import TrainingImages
from eval.tuning_protocols import TuningProtocol
from fastssl.batch import ImageBatch
from fastssl.config import ConfigError
from fastssl.distributed import Dist
from fastssl.models.features import Backbone
from fastssl.models.norm import broadcast_running_statistics
from fastssl.models.weights import weights_digest
from fastssl.precision import autocast
from fastssl.views import Photometric

FORMAT = "fastssl-tuning-1"


@dataclass
class Record:
    """One epoch."""

    epoch: int
    loss: float
    """Mean over the steps of all ranks."""
    top1: float | None = None
    """Percent; None where the protocol does not evaluate."""
    top5: float | None = None
    per_class: dict[str, float | None] | None = None


@dataclass
class TuningData(LabelledData):
    images: TrainingImages
    passes: int
    """Forward passes of a step."""
    steps_per_epoch: int


def shared_step(protocol: TuningProtocol, dist: Dist, forward: int) -> tuple[int, int]:
    """Images of a rank's forward pass of at most `forward` views, and passes of a step.

    With repeated augmentation the step is rounded down to what can be shared.  ConfigError for unequal or, where images are mixed
    with each other, odd parts.
    """
    unit = 2 if protocol.mixes else 1
    images = protocol.batch // protocol.repeats
    if protocol.repeats > 1:
        images -= images % (dist.world * unit)
    mine, rest = divmod(images, dist.world)
    for passes in range(1, mine + 1):
        if not rest and mine % (passes * unit) == 0 and mine // passes * protocol.repeats <= forward:
            return mine // passes, passes
    raise ConfigError(
        f"A batch of {protocol.batch} cannot be shared by {dist.world} processes in forward passes of at most {forward} images"
        f"{', an even number each, as images are mixed in pairs' if unit == 2 else ''}: change --batch or --forward."
    )


def open_data(
    path: str,
    protocol: TuningProtocol,
    *,
    dist: Dist,
    normalisation: Photometric,
    forward: int = 1024,
    seed: int = 0,
    **reading,
) -> TuningData:
    """Arguments as on the command line.  ConfigError or DataError for what cannot be learned or measured.

    reading   queries, backend, workers
    """
    batch, passes = shared_step(protocol, dist, forward)
    spec = TrainingImages.spec(protocol, normalisation)
    batches = {"batch": batch, "passes": passes, "last_batch": protocol.last_batch, "forward": min(forward, 256)}
    options = {"dist": dist, "seed": seed, "normalisation": normalisation, "subset": protocol.subset}
    data = open_labelled(path, spec, protocol, **batches, **options, **reading)
    images = TrainingImages(protocol, normalisation, data.num_classes, dist=dist, seed=seed, threads=data.train.workers)
    steps = data.train.steps_per_epoch
    if protocol.repeats > 1:
        steps = max(1, data.train.num_samples // (batch * passes * dist.world * protocol.repeats))
    return TuningData(**vars(data), images=images, passes=passes, steps_per_epoch=steps)


@dataclass
class Tuning(Epochs):
    """An end-to-end evaluation.  The backbone becomes part of the classifier.  ConfigError when the training diverges."""

    format = FORMAT
    backbone: Backbone
    protocol: TuningProtocol
    data: TuningData
    dist: Dist
    dtype: torch.dtype
    seed: int = 0
    history: list[Record] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.digest = weights_digest(self.backbone)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.model = Classifier(self.backbone, self.data.num_classes, self.protocol)
        self.model.to(self.dist.device, memory_format=torch.channels_last)
        self.optimizer = self.model.optimizer(self.protocol)
        self.scaler = torch.amp.GradScaler(self.dist.device.type, enabled=self.dtype is torch.float16)
        # DDP's broadcast of rank 0's running statistics before every forward pass is that of the published runs
        self.wrapped = DistributedDataParallel(self.model, gradient_as_bucket_view=True) if self.dist.world > 1 else self.model

    @property
    def best(self) -> Record:
        return max((r for r in self.history if r.top1 is not None), key=lambda r: r.top1)

    def steps_per_epoch(self) -> int:
        return self.data.steps_per_epoch

    def epoch(self, batches: Iterator[ImageBatch], number: int) -> Record:
        record = Record(number + 1, self.train_epoch(batches, number))
        if self.protocol.evaluated(number):
            found = self.evaluate()
            record.top1, record.top5 = found.top1[0], found.top5[0]
            if record.top1 > max((r.top1 for r in self.history if r.top1 is not None), default=-1.0):
                record.per_class = found.per_class(0, self.data.train.classes)
        return record

    def train_epoch(self, batches: Iterator[ImageBatch], epoch: int) -> float:
        """-> the loss."""
        self.model.train()
        steps, passes = self.data.steps_per_epoch, self.data.passes
        images = self.data.images.of(islice(batches, steps * passes))
        total = torch.zeros((), device=self.dist.device)
        what = f"epoch {epoch + 1}/{self.protocol.epochs}"
        with closing(images), tqdm(total=steps, desc=what, leave=False, disable=not (self.dist.is_main and sys.stderr.isatty())) as bar:
            for step in range(epoch * steps, (epoch + 1) * steps):
                total += self.step(images, step)
                bar.update()
        loss = sum(self.dist.gather_objects(float(total) / steps)) / self.dist.world
        if not math.isfinite(loss):
            raise ConfigError(f"{self.protocol.name} diverged in epoch {epoch + 1}. Take a smaller --base-lr, or --dtype fp32.")
        return loss

    def step(self, images: Iterator[tuple[Tensor, Tensor]], step: int) -> Tensor:
        """One update of the weights -> this rank's loss before it."""
        lr = self.protocol.lr(step, self.data.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        total = torch.zeros((), device=self.dist.device)
        smoothing = 0.0 if self.protocol.mixes else self.protocol.smoothing  # mixed targets are smooth
        for part in range(self.data.passes):
            x, targets = self.data.images.mixed(*next(images), step, part)
            last = part == self.data.passes - 1
            with contextlib.nullcontext() if last or self.dist.world == 1 else self.wrapped.no_sync():
                with autocast(self.dist.device, self.dtype):
                    logits = self.wrapped(x)
                loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing) / self.data.passes
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    @torch.no_grad()
    def evaluate(self) -> Accuracy:
        self.model.eval()
        if self.dist.world > 1:
            broadcast_running_statistics(self.model)
        return accuracy(self._scored(), self.data.num_classes, self.dist)

    def _scored(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.data.val:
            (x,) = self.data.val_crops(batch).per_view()
            with autocast(self.dist.device, self.dtype):
                logits = self.model(x)
            yield logits.float(), batch.label.long()

    def line(self, record: Record) -> str:
        lr = self.protocol.lr((record.epoch - 1) * self.data.steps_per_epoch, self.data.steps_per_epoch)
        accuracies = "" if record.top1 is None else f"  top-1 {record.top1:.2f} %  best {self.best.top1:.2f} %"
        return f"epoch {record.epoch}/{self.protocol.epochs}  lr {lr:.3g}  loss {record.loss:.4f}{accuracies}"

    def state_dict(self) -> dict:
        return {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler")}

    def load_state_dict(self, state: dict) -> None:
        for name in ("model", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.history = [Record(**r) for r in state["history"]]
