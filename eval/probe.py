"""Training linear classifiers on a frozen backbone: epochs, evaluations, what is kept, and going on after an interruption."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch

from eval.accuracy import Accuracy, accuracy
from eval.features import extracted, width
from eval.heads import Heads
from eval.labels import checked_classes
from eval.linear_protocols import LinearProtocol, Setting
from fastssl.augment.augmenter import Augmenter
from fastssl.batch import ImageBatch
from fastssl.checkpoint import CheckpointError, atomic_save
from fastssl.config import ConfigError
from fastssl.distributed import Dist
from fastssl.losses.collectives import gathered
from fastssl.models.features import Backbone
from fastssl.models.weights import weights_digest
from fastssl.views import CenterCrop, Crop, Photometric, View
from loaders.build import EvalLoader, TrainLoader, build_eval_loader, build_loader

FORMAT = "fastssl-linear-1"
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
class ProbeData:
    """The images to learn from and to measure with, and their crops."""

    train: TrainLoader
    val: EvalLoader
    train_crops: Augmenter
    val_crops: Augmenter
    num_classes: int
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
    subset: str = "",
    queries: str = "",
    forward: int = 256,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    workers: int = 0,
    seed: int = 0,
    normalisation: Photometric | None = None,
) -> ProbeData:
    """Arguments as on the command line of eval.linear.  ConfigError or DataError for what cannot be learned or measured.

    normalisation: its mean and std, default ImageNet's.
    """
    micro = micro_batches(protocol.batch, dist, forward)
    reading = {"dist": dist, "backend": backend, "workers": workers}
    plain = normalisation or Photometric()
    train_spec = (View(crop=Crop(size=protocol.crop), photometric=plain),)
    centre = CenterCrop(size=protocol.crop, resize=protocol.resize, interpolation=protocol.interpolation)
    val_spec = (View(crop=centre, photometric=plain),)
    batches = {"batch": protocol.batch // dist.world // micro, "accumulation_steps": micro, "last_batch": "keep"}
    train = build_loader(path, "train", train_spec, **reading, **batches, seed=seed, subset=subset)
    val = build_eval_loader(path, "train" if queries else "val", val_spec, **reading, batch=forward, subset=queries)
    train_crops, val_crops = (Augmenter(spec, device=dist.device, dtype=dtype, seed=seed) for spec in (train_spec, val_spec))
    return ProbeData(train, val, train_crops, val_crops, checked_classes(train, val, path), micro)


class _Epoch:
    """The next `count` of endless batches; its length is known to the progress bar."""

    def __init__(self, batches: Iterator[ImageBatch], count: int):
        self._batches, self._count = batches, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[ImageBatch]:
        return islice(self._batches, self._count)


@dataclass
class Probe:
    """A linear evaluation; `run` trains what is left of it."""

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
    history: list[Record] = field(default_factory=list)
    kept: dict[str, Kept] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.digest = weights_digest(self.backbone)
        size = width(self.backbone, self.kind), self.data.num_classes
        self.heads = Heads(self.settings, *size, dist=self.dist, seed=self.seed)

    def run(self, state_file: Path | None, identity: dict[str, object], say: Callable[[str], None]) -> None:
        """Train the epochs that are left, evaluating as the protocol does; after each epoch the state is saved, atomically.

        state_file   where; None: nowhere.  It is removed when all is done
        identity     what must be equal for a saved state to be continued

        CheckpointError for features that are not finite; ConfigError for the state of another evaluation.
        """
        if state_file is not None and state_file.exists():
            self._resume(state_file, identity)
            say(f"continuing {state_file} after epoch {len(self.history)}")
        done, total, steps = len(self.history), self.protocol.epochs, self.data.train.steps_per_epoch
        with closing(self.data.train.from_step(done * steps)) as batches:
            for epoch in range(done, total):
                record = Record(epoch + 1, self.train_epoch(batches, epoch))
                if self.protocol.evaluated(epoch):
                    self._keep(record, self.evaluate())
                self.history.append(record)
                if epoch == done:
                    self.check_frozen()
                if state_file is not None and self.dist.is_main:
                    atomic_save(self.state_dict(identity), state_file)
                say(self.line(record))
        self.check_frozen()
        self.dist.barrier()  # before the file goes, every rank has read it
        if state_file is not None and self.dist.is_main:
            state_file.unlink(missing_ok=True)

    def train_epoch(self, batches: Iterator[ImageBatch], epoch: int) -> list[float]:
        """One epoch of every classifier -> their losses [K]."""
        data, factor, step, parts = self.data, self.protocol.factor(epoch), 0, []
        losses = torch.zeros(self.heads.mine.stop - self.heads.mine.start, device=self.dist.device, dtype=torch.float64)
        finite = torch.ones((), dtype=torch.bool, device=self.dist.device)
        epoch_batches = _Epoch(batches, data.train.steps_per_epoch * data.micro_batches)
        what = f"epoch {epoch + 1}/{self.protocol.epochs}"
        for part in extracted(self.backbone, epoch_batches, data.train_crops, self.dtype, kind=self.kind, what=what):
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
        parts = extracted(self.backbone, self.data.val, self.data.val_crops, self.dtype, kind=self.kind, what="validation")
        return accuracy(((self.heads(p.features), p.labels.long()) for p in parts), self.data.num_classes, self.dist)

    def check_frozen(self) -> None:
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

    def state_dict(self, identity: dict[str, object]) -> dict:
        kept = {what: asdict(k) for what, k in self.kept.items()}
        history = [asdict(r) for r in self.history]
        return {"format": FORMAT, "identity": identity, "heads": self.heads.state_dict(), "history": history, "kept": kept}

    def _resume(self, path: Path, identity: dict[str, object]) -> None:
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            theirs = saved["identity"]
        except Exception as error:
            raise CheckpointError(f"{path} cannot be continued from ({type(error).__name__}). Delete it to start again.") from error
        if different := [n for n in {**theirs, **identity} if theirs.get(n) != identity.get(n)]:
            shown = ", ".join(f"{n} was {theirs.get(n)} and is {identity.get(n)}" for n in different)
            raise ConfigError(
                f"{path} is of an unfinished evaluation with other settings: {shown}. Finish it with those, delete it, or write elsewhere "
                f"with --out FILE.json."
            )
        self.heads.load_state_dict(saved["heads"])
        self.history = [Record(**r) for r in saved["history"]]
        self.kept = {what: Kept(**k) for what, k in saved["kept"].items()}
