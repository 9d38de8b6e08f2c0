"""Training linear classifiers on a frozen backbone: an epoch, its evaluation, and which classifiers are kept."""

from __future__ import annotations

import math
import zlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice

import torch

from eval.accuracy import Accuracy, accuracy
from eval.epochs import Epochs, LabelledData, open_labelled
from eval.features import Bank, SharedFeatures, extracted, width
from eval.heads import Heads
from eval.linear_protocols import LinearProtocol, Setting
from fastssl.augment.augmenter import Augmenter
from fastssl.batch import ImageBatch
from fastssl.checkpoint import CheckpointError
from fastssl.collectives import gathered
from fastssl.config import ConfigError
from fastssl.distributed import Dist
from fastssl.models.features import Backbone
from fastssl.models.weights import weights_digest
from fastssl.views import Crop, Photometric, View
from loaders.build import EvalLoader, TrainLoader

FORMAT = "fastssl-linear-2"
PUBLISHED, BEST = "published", "best of all settings"


@dataclass
class Kept:
    """A classifier as it was after an evaluation: what a saved head holds."""

    what: str
    setting: int
    epoch: int
    """Epochs trained."""
    top1: float
    top5: float
    per_class: dict[str, float | None]
    weight: torch.Tensor
    bias: torch.Tensor


@dataclass
class Record:
    """One epoch of all classifiers."""

    epoch: int
    loss: list[float]
    """Mean over the steps, each before its update."""
    top1: list[float] | None = None
    """Percent; None where the protocol does not evaluate."""
    top5: list[float] | None = None


@dataclass
class ProbeData(LabelledData):
    train_crops: Augmenter
    micro_batches: int
    """Forward passes of a step."""


def micro_batches(batch: int, dist: Dist, largest: int) -> int:
    """In how many equal forward passes of at most `largest` images a rank sees its part of a step.  ConfigError for unequal parts."""
    if batch % dist.world or largest < 1:
        raise ConfigError(
            f"A batch of {batch} cannot be shared by {dist.world} processes in forward passes of {largest}: change --batch or --forward."
        )
    mine = batch // dist.world
    return next(n for n in range(1, mine + 1) if mine % n == 0 and mine // n <= largest)


def open_data(
    path: str,
    protocol: LinearProtocol,
    *,
    dist: Dist,
    forward: int = 256,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    normalisation: Photometric | None = None,
    **reading,
) -> ProbeData:
    """Arguments as on the command line of eval.linear.  ConfigError or DataError for what cannot be learned or measured.

    normalisation   its mean and std, default ImageNet's
    reading         subset, queries, backend, workers
    """
    passes = micro_batches(protocol.batch, dist, forward)
    spec = (View(crop=Crop(size=protocol.crop), photometric=normalisation or Photometric()),)
    batches = {"batch": protocol.batch // dist.world // passes, "passes": passes, "last_batch": "keep", "forward": forward}
    options = {"dist": dist, "dtype": dtype, "seed": seed, "normalisation": spec[0].photometric}
    data = open_labelled(path, spec, protocol, **batches, **options, **reading)
    return ProbeData(**vars(data), train_crops=Augmenter(spec, device=dist.device, dtype=dtype, seed=seed), micro_batches=passes)


class _Epoch:
    """The next `count` of endless batches; its length is known to the progress bar."""

    def __init__(self, batches: Iterator[ImageBatch], count: int):
        self._batches, self._count = batches, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[ImageBatch]:
        return islice(self._batches, self._count)


@dataclass
class Probe(Epochs):
    """A linear evaluation.  CheckpointError for features that are not finite."""

    format = FORMAT
    backbone: Backbone
    protocol: LinearProtocol
    settings: Sequence[Setting]
    published: bool
    """Whether the first setting is the published one."""
    data: ProbeData
    dist: Dist
    kind: str
    """Of features."""
    dtype: torch.dtype
    seed: int = 0
    shared: SharedFeatures = field(default_factory=lambda: SharedFeatures(0))
    history: list[Record] = field(default_factory=list)
    kept: dict[str, Kept] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.digest = weights_digest(self.backbone)
        size = width(self.backbone, self.kind), self.data.num_classes
        self.heads = Heads(self.settings, *size, dist=self.dist, seed=self.seed)

    def steps_per_epoch(self) -> int:
        return self.data.train.steps_per_epoch

    def epoch(self, batches: Iterator[ImageBatch], number: int) -> Record:
        record = Record(number + 1, self.train_epoch(batches, number))
        if self.protocol.evaluated(number):
            self._keep(record, self.evaluate())
        return record

    def train_epoch(self, batches: Iterator[ImageBatch], epoch: int) -> list[float]:
        """One epoch of every classifier -> their losses [K]."""
        data, factor, step, parts = self.data, self.protocol.factor(epoch), 0, []
        losses = torch.zeros(self.heads.mine.stop - self.heads.mine.start, device=self.dist.device, dtype=torch.float64)
        finite = torch.ones((), dtype=torch.bool, device=self.dist.device)
        epoch_batches = _Epoch(batches, data.train.steps_per_epoch * data.micro_batches)
        what = f"epoch {epoch + 1}/{self.protocol.epochs}"
        key = ("train", *self._key(data.train), self.protocol.batch, data.micro_batches, self.seed, epoch)
        for part in self.shared.of(key, lambda: self._extracted(epoch_batches, data.train_crops, what)):
            parts.append(part)
            if len(parts) < data.micro_batches:
                continue
            x, y = (gathered(torch.cat([getattr(p, name) for p in parts])) for name in ("features", "labels"))
            # what fills up the last batch to a multiple of the ranks stands at its end
            images = min(self.protocol.batch, data.train.num_samples - step * self.protocol.batch)
            losses += self.heads.learn(x[:images], y[:images].long(), factor)
            finite &= x.isfinite().all()
            if step == 0:
                self._check_finite(finite)
            step, parts = step + 1, []
        self._check_finite(finite)
        self.heads.share()
        return [loss for part in self.dist.gather_objects((losses / step).tolist()) for loss in part]

    def _check_finite(self, finite: torch.Tensor) -> None:
        if not finite:
            raise CheckpointError("The backbone gives features that are not finite: the run diverged, or --dtype is too narrow for it.")

    def evaluate(self) -> Accuracy:
        key = ("val", *self._key(self.data.val), self.protocol.resize, self.protocol.interpolation)
        parts = self.shared.of(key, lambda: self._extracted(self.data.val, self.data.val_crops, "validation"))
        return accuracy(((self.heads(p.features), p.labels.long()) for p in parts), self.data.num_classes, self.dist)

    def _extracted(self, loader: Iterable[ImageBatch], crops: Augmenter, what: str) -> Iterator[Bank]:
        return extracted(self.backbone, loader, crops, self.dtype, kind=self.kind, what=what)

    def _key(self, loader: TrainLoader | EvalLoader) -> tuple[Hashable, ...]:
        """What the features of a pass depend on, beside what is of its split alone."""
        return self.digest, self.kind, self.dtype, self.protocol.crop, zlib.crc32(loader.ids.tobytes())

    def check(self) -> None:
        """RuntimeError where anything has changed the backbone (the check of MoCo's evaluations)."""
        if weights_digest(self.backbone) != self.digest:
            raise RuntimeError("The frozen backbone has changed during its evaluation.")

    def _keep(self, record: Record, found: Accuracy) -> None:
        """Note the accuracies, and keep the published setting's classifier of the epoch to report, and the best of all."""
        record.top1, record.top5 = found.top1, found.top5
        candidates = {PUBLISHED: 0} if self.published else {}
        if len(self.settings) > 1:
            candidates[BEST] = max(range(len(self.settings)), key=found.top1.__getitem__)
        for what, k in candidates.items():
            old = self.kept.get(what)
            last = what == PUBLISHED and self.protocol.reported == "last"
            if old is None or last or found.top1[k] > old.top1:
                per_class = found.per_class(k, self.data.train.classes)
                tensors = (t[k].cpu().clone() for t in (self.heads.weight, self.heads.bias))
                self.kept[what] = Kept(what, k, record.epoch, found.top1[k], found.top5[k], per_class, *tensors)

    def line(self, record: Record) -> str:
        """One epoch in words."""
        lr = f"lr x {self.protocol.factor(record.epoch - 1):.4g}"
        loss, what = (record.loss[0], "loss") if self.published else (min(record.loss), "lowest loss")
        accuracies = "" if record.top1 is None else f"  top-1 {record.top1[0] if self.published else max(record.top1):.2f} %"
        best = max((k.top1 for k in self.kept.values()), default=math.nan)
        return f"epoch {record.epoch}/{self.protocol.epochs}  {lr}  {what} {loss:.4f}{accuracies}  kept {best:.2f} %"

    def state_dict(self) -> dict:
        return {"heads": self.heads.state_dict(), "kept": {what: asdict(k) for what, k in self.kept.items()}}

    def load_state_dict(self, state: dict) -> None:
        self.heads.load_state_dict(state["heads"])
        self.history = [Record(**r) for r in state["history"]]
        self.kept = {what: Kept(**k) for what, k in state["kept"].items()}
