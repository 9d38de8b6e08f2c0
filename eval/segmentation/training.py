"""Training a segmenter and measuring it, going on after an interruption."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval.results import together
from eval.segmentation.datasets import Annotated
from eval.segmentation.images import Batches, Crops, normaliser
from eval.segmentation.inference import label_map
from eval.segmentation.loss import doubled_loss, pixel_loss
from eval.segmentation.model import build
from eval.segmentation.protocols import SegmentationProtocol
from eval.segmentation.scores import Scores
from eval.unfinished import read_state
from fastssl.checkpoint import atomic_save
from fastssl.config import ConfigError
from fastssl.distributed import Dist, data_parallel
from fastssl.models.features import Backbone
from fastssl.models.weights import weights_digest
from fastssl.optim.param_groups import split_by_layer
from fastssl.precision import autocast
from fastssl.rng import STEP, random_u32
from fastssl.views import Photometric
from loaders.build import decoder_threads

AUXILIARY_WEIGHT = 0.4
"""Of the auxiliary head's loss."""
SHOWN, SAVED = 50, 1000
"""Steps between lines of progress, fewer in a short training, and, a multiple of it, between saved states."""


@dataclass
class Record:
    """The steps since the record before."""

    step: int
    """Steps done."""
    lr: float
    """Of the last one."""
    loss: float
    """Mean of the head's over the steps and ranks, each before its update."""
    auxiliary: float | None = None
    """Of the auxiliary head, where there is one."""


@dataclass
class Segmentation:
    """An evaluation by segmentation; `run` trains what is left of it, `evaluate` measures.  The backbone becomes part of the model."""

    backbone: Backbone
    protocol: SegmentationProtocol
    data: Annotated
    dist: Dist
    dtype: torch.dtype
    normalisation: Photometric = field(default_factory=Photometric)
    seed: int = 0
    workers: int = 0
    history: list[Record] = field(default_factory=list)

    def __post_init__(self) -> None:
        """ConfigError for what cannot be trained."""
        protocol, device = self.protocol, self.dist.device
        if protocol.batch % self.dist.world:
            raise ConfigError(f"A batch of {protocol.batch} cannot be shared by {self.dist.world} processes: change --batch.")
        self.steps = protocol.total_steps(len(self.data.train))
        if not self.steps:
            raise ConfigError(f"A batch of {protocol.batch} is larger than the {len(self.data.train)} training images: lower --batch.")
        self.digest = weights_digest(self.backbone)
        self.model = build(self.backbone, protocol, self.data.classes, seed=self.seed).to(device, memory_format=torch.channels_last)
        self.optimizer = self._optimizer()
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        # running statistics are those of all ranks, so DDP has none to copy
        self.wrapped = data_parallel(self.model) if self.dist.world > 1 else self.model
        crops = Crops(self.data, protocol, self.normalisation, seed=self.seed)
        threads = decoder_threads(self.workers, self.dist)
        self.batches = Batches(crops, len(self.data.train), protocol, dist=self.dist, seed=self.seed, threads=threads)

    def _optimizer(self) -> torch.optim.Optimizer:
        """Over groups with an `lr_scale`: what each group's learning rate is of the schedule's."""
        protocol = self.protocol
        if protocol.optimizer == "sgd":
            groups = [{"params": [p for _, p in self.model.trained()], "lr_scale": 1.0}]
            return torch.optim.SGD(groups, lr=protocol.lr, momentum=0.9, weight_decay=protocol.weight_decay)
        options = {"layer_decay": protocol.layer_decay, "weight_decay": protocol.weight_decay, "positions_decay": protocol.positions_decay}
        groups = split_by_layer(self.model.trained(), depth=len(self.backbone.blocks), **options)
        return torch.optim.AdamW(groups, lr=protocol.lr, betas=(0.9, 0.999))

    def run(self, state_file: Path | None, identity: dict[str, object], say: Callable[[str], None]) -> None:
        """Train the steps that are left; the state is saved now and then, and at the end, atomically.

        state_file   where; None: nowhere
        identity     what must be equal for a saved state to be continued

        ConfigError when the training diverges, for the state of another evaluation, and where it cannot be written.
        """
        done, shown = 0, min(SHOWN, max(1, self.steps // 10))
        if state_file is not None and state_file.exists():
            done = self._resume(state_file, identity)
            say(f"continuing {state_file} after step {done}")
        self.model.train()
        self.dist.barrier()
        sums, counted, begun = torch.zeros(2, device=self.dist.device), 0, time.monotonic()
        with closing(self.batches.from_step(done)) as batches:
            for step, (x, y) in enumerate(batches, start=done):
                sums += self.step(x, y, step)
                counted += 1
                last = step + 1 == self.steps
                if last or (step + 1) % shown == 0:
                    self.history.append(self._record(step, sums / counted))
                    rate = (step + 1 - done) / (time.monotonic() - begun)
                    say(self.line(self.history[-1], rate))
                    sums, counted = torch.zeros_like(sums), 0
                if state_file is not None and (last or (step + 1) % SAVED == 0):
                    self._save(state_file, step + 1, identity)
        self.dist.barrier()

    def step(self, x: Tensor, y: Tensor, step: int) -> Tensor:
        """One update of the weights -> this rank's losses before it [2], head and auxiliary head (0 where there is none)."""
        lr = self.protocol.rate(step, len(self.data.train))
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        torch.manual_seed(int(random_u32(self.seed, STEP, step, self.dist.rank, 0)))  # of dropout: a run that goes on draws the same
        with autocast(self.dist.device, self.dtype):
            outputs = self.wrapped(x)
        losses = [self._loss(logits, y) for logits in outputs]
        loss = losses[0] + AUXILIARY_WEIGHT * losses[1] if len(losses) > 1 else losses[0]
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss.detach() for loss in losses] + [torch.zeros_like(loss)] * (2 - len(losses)))

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        if self.protocol.head == "patches":
            return doubled_loss(logits, y, ignore=self.data.ignore)
        options = {"align_corners": self.model.align_corners, "valid_only": self.protocol.valid_only}
        return pixel_loss(logits, y, ignore=self.data.ignore, **options)

    def _record(self, step: int, mine: Tensor) -> Record:
        losses = torch.tensor(self.dist.gather_objects(mine.tolist())).mean(0).tolist()
        if not all(map(math.isfinite, losses)):
            raise ConfigError(f"{self.protocol.name} diverged before step {step + 1}. Take a smaller --lr, or --dtype fp32.")
        lr = self.protocol.rate(step, len(self.data.train))
        return Record(step + 1, lr, losses[0], losses[1] if self.model.auxiliary is not None else None)

    def evaluate(self) -> Scores:
        """The model on all validation images, each once; the same on every rank."""
        self.model.eval()
        options = {"absent": "zero" if self.protocol.data == "imagenets" else "nothing", "device": self.dist.device}
        scores = Scores(self.data.classes, self.data.ignore, **options)
        mine = range(self.dist.rank, len(self.data.val), self.dist.world)
        for _, label, found in self.predicted(mine):
            scores.add(found, torch.from_numpy(label).to(self.dist.device))
        return scores.shared()

    def predicted(self, numbers: range) -> Iterator[tuple[Image.Image, np.ndarray, Tensor]]:
        """Validation images, their labels [h, w] and the classes found, int64 [h, w].  The model is in eval mode."""
        normalised = normaliser(self.normalisation, self.dist.device)
        bar = tqdm(numbers, desc="validation", unit="image", leave=False, disable=not (self.dist.is_main and sys.stderr.isatty()))
        for number in bar:
            image, label = self.data.read(self.data.val[number])
            with autocast(self.dist.device, self.dtype):
                found = label_map(self.model, image, self.protocol, normalised)
            yield image, label, found

    def line(self, record: Record, rate: float) -> str:
        """A record in words; rate: steps a second."""
        left = timedelta(seconds=round((self.steps - record.step) / rate))
        auxiliary = "" if record.auxiliary is None else f"  auxiliary {record.auxiliary:.4f}"
        speed = f"{rate * self.protocol.batch:.1f} images/s  {left} left"
        return f"step {record.step}/{self.steps}  lr {record.lr:.3g}  loss {record.loss:.4f}{auxiliary}  {speed}"

    def _save(self, path: Path, step: int, identity: dict[str, object]) -> None:
        with together(self.dist, path):
            if self.dist.is_main:
                parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scaler")}
                atomic_save({"identity": identity, "step": step, "history": [asdict(r) for r in self.history], **parts}, path)

    def _resume(self, path: Path, identity: dict[str, object]) -> int:
        """-> steps done."""
        saved = read_state(path, identity)
        for name in ("model", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(saved[name])
        self.history = [Record(**r) for r in saved["history"]]
        return saved["step"]
