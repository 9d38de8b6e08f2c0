"""Training a detector: iterations, precise-BN at their end, and going on after an interruption (methods/transfer.md section 2)."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from eval.detection.data import Sample, TrainingPhotos, normalised, on_device
from eval.detection.model import Detector, weight_decay_groups
from eval.detection.precise_bn import precise_bn
from eval.detection.presets import DetectionPreset
from eval.results import together
from eval.unfinished import read_state
from fastssl.checkpoint import atomic_save
from fastssl.config import ConfigError
from fastssl.distributed import Dist, data_parallel
from fastssl.rng import STEP, uniform_torch

FORMAT = "fastssl-detection-1"
SAVE_SECONDS = 600.0
"""A kill loses at most the work of so long."""
REPORTS, REPORT_EVERY = 20, 100
"""Losses are reported so many times, and at least every 100 iterations."""


@dataclass
class Training:
    """`run` trains what is left."""

    detector: Detector
    """On its device."""
    preset: DetectionPreset
    images: TrainingPhotos
    dist: Dist
    seed: int = 0
    iteration: int = 0
    """Done."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """Of each report: iteration, lr, and the means of the losses since the one before."""

    def __post_init__(self) -> None:
        groups = weight_decay_groups(self.detector, self.preset.weight_decay)
        self.optimizer = torch.optim.SGD(groups, lr=self.preset.lr(0), momentum=self.preset.sgd_momentum)
        self.wrapped = self.detector
        if self.dist.world > 1:  # synchronised BatchNorms have equal statistics on all ranks
            self.wrapped = data_parallel(self.detector, gradient_as_bucket_view=True)

    def run(self, state_file: Path | None, identity: dict[str, object], say: Callable[[str], None]) -> None:
        """Train the iterations that are left, then take the BatchNorm statistics.

        state_file   saved every few minutes and at the end, None: never.  The caller removes it when the detector is evaluated
        identity     what must be equal for a saved state to be continued

        ConfigError when the training diverges, and for the state of another evaluation.
        """
        if state_file is not None and state_file.exists():
            self._resume(state_file, identity)
            say(f"continuing {state_file} after iteration {self.iteration}")
        total = self.preset.iterations
        every = min(REPORT_EVERY, max(1, total // REPORTS))
        begun, saved, first = time.monotonic(), time.monotonic(), self.iteration
        sums: dict[str, Tensor] = {}
        since = self.iteration
        bar = tqdm(total=total, initial=first, desc="training", leave=False, disable=not (self.dist.is_main and sys.stderr.isatty()))
        with closing(self.images.from_step(self.iteration)) as batches, bar:
            while self.iteration < total:
                for name, loss in self.step(next(batches)).items():
                    sums[name] = sums[name] + loss if name in sums else loss
                self.iteration += 1
                bar.update()
                if self.iteration % every == 0 or self.iteration == total:
                    self._report(sums, self.iteration - since)
                    sums, since = {}, self.iteration
                    rate = (self.iteration - first) / (time.monotonic() - begun)
                    say(self._line(rate))
                    # reports are the moments when the ranks meet, so they decide together
                    if self.dist.broadcast_object(time.monotonic() - saved > SAVE_SECONDS) or self.iteration == total:
                        self._save(state_file, identity)
                        saved = time.monotonic()
            if self.preset.precise_bn:
                say(f"BatchNorm statistics of {self.preset.precise_bn} training batches")
                self._precise(islice(batches, self.preset.precise_bn))

    def step(self, samples: list[Sample]) -> dict[str, Tensor]:
        """One update of the weights -> this rank's losses before it, with their sum as `loss`."""
        self.detector.train()
        self._seed(self.iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = self.preset.lr(self.iteration)
        try:
            losses = self.wrapped(*self._inputs(samples))
        except FloatingPointError as error:
            raise self._diverged() from error
        loss = sum(losses.values())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {name: value.detach() for name, value in {"loss": loss, **losses}.items()}

    def _precise(self, batches) -> None:
        def inputs():
            for i, samples in enumerate(batches):
                self._seed(self.iteration + i)
                yield self._inputs(samples)

        precise_bn(self.detector, inputs())

    def _inputs(self, samples: list[Sample]) -> tuple[list[Tensor], list]:
        device = self.dist.device
        return [normalised(s.pixels, device) for s in samples], [on_device(s.target, device) for s in samples]

    def _seed(self, iteration: int) -> None:
        """Of what the detector draws: anchors and regions."""
        drawn = uniform_torch(self.seed, STEP, iteration, torch.tensor([self.dist.rank]), torch.tensor([0]), 1)
        torch.manual_seed(int(drawn * 2**32))

    def _report(self, sums: dict[str, Tensor], count: int) -> None:
        """Means of all ranks.  ConfigError where they are not finite."""
        ranks = self.dist.gather_objects({name: float(value) / count for name, value in sums.items()})
        means = {name: sum(rank[name] for rank in ranks) / len(ranks) for name in sums}
        if not math.isfinite(means["loss"]):
            raise self._diverged()
        self.curve.append({"iteration": self.iteration, "lr": self.preset.lr(self.iteration - 1), **means})

    def _diverged(self) -> ConfigError:
        return ConfigError(f"detection/{self.preset.name} diverged before iteration {self.iteration + 1}. Take a smaller --lr-mult.")

    def _line(self, rate: float) -> str:
        """The last report in words; rate: iterations/s."""
        report, left = self.curve[-1], self.preset.iterations - self.iteration
        losses = "  ".join(f"{name} {value:.3f}" for name, value in report.items() if name not in ("iteration", "lr"))
        eta = timedelta(seconds=round(left / rate))
        return (
            f"iteration {self.iteration}/{self.preset.iterations}  lr {report['lr']:.3g}  {losses}  "
            f"{rate * self.preset.batch:.2f} images/s  {eta} left"
        )

    def _save(self, path: Path | None, identity: dict[str, object]) -> None:
        if path is not None:
            with together(self.dist, path):
                if self.dist.is_main:
                    parts = {"detector": self.detector.state_dict(), "optimizer": self.optimizer.state_dict()}
                    state = {"iteration": self.iteration, "curve": self.curve, **parts}
                    atomic_save({"format": FORMAT, "identity": identity, **state}, path)

    def _resume(self, path: Path, identity: dict[str, object]) -> None:
        saved = read_state(path, identity)
        self.detector.load_state_dict(saved["detector"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.iteration, self.curve = saved["iteration"], saved["curve"]
