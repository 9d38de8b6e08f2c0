"""What a method is: networks and a loss, and nothing of the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal, NamedTuple

from torch import Tensor, nn

from fastssl.batch import Views
from fastssl.collapse import SPREAD, Watch
from fastssl.config import ConfigError, MethodConfig, RunConfig
from fastssl.ema import Ema
from fastssl.optim.schedules import Sched
from fastssl.views import ViewSpec, groups


class StepOutput(NamedTuple):
    """loss: scalar, a mean over this rank's batch; logs: detached device scalars; keys: detached rows for `Method.enqueue`, by queue."""

    loss: Tensor
    logs: dict[str, Tensor]
    keys: dict[str, Tensor] = {}


class Method(nn.Module):
    """Base class.  A method declares what the engine does around its forward pass:

    ema               pairs online -> target the engine updates (fastssl.ema.Ema)
    backbone_prefix   where the backbone lies in the state dict: checkpoints export and evaluations load it
    evaluated         which network's backbone evaluations and exports take unless told otherwise
    couples_batch     the loss of a sample depends on the others of the global batch: accumulation would change it
    watches           logged values that tell a collapse (fastssl.collapse); those that a method does not log are skipped
    norm_policies     values of ModelConfig.norm that it has

    and is told before the first step:

    global_batch_size images of a whole step over all ranks; a kept last batch of an epoch has fewer
    """

    Config: type[MethodConfig]
    ema: tuple[Ema, ...] = ()
    backbone_prefix: str
    target_backbone_prefix: str | None = None
    evaluated: Literal["online", "target"] = "online"
    couples_batch: bool = False
    watches: tuple[Watch, ...] = SPREAD
    norm_policies: tuple[str, ...] = ("local", "sync", "eman")
    global_batch_size: int

    @classmethod
    def check(cls, cfg: RunConfig) -> None:
        """Raise ConfigError when the method cannot train as configured; overrides relate the method's values to those of the run."""
        cls.check_views(cfg.views)
        for name, value in dataclasses.asdict(cfg.method).items():
            divides = name == "scale" or "temp" in name and not name.endswith("epochs")
            if divides and value <= 0:
                raise ConfigError(f"--method.{name.replace('_', '-')} {value} must be positive.")

    @classmethod
    def check_views(cls, views: ViewSpec) -> None:
        """Raise ConfigError when the method cannot train on these views.  Unless overridden it takes two of one size."""
        if groups(views) != ((0, 1),):
            sizes = [v.crop.size for v in views]
            raise ConfigError(
                f"{cls.__name__} trains on two views of one size, got sizes {sizes}. Give both views the same --views.N.crop.size."
            )

    @classmethod
    def check_ranks(cls, cfg: RunConfig, world: int) -> None:
        """Raise ConfigError when the method cannot share its batch among so many ranks."""

    @classmethod
    def derived(cls, cfg: RunConfig, world: int) -> dict[str, str]:
        """What follows from the method's values, for --dry-run: name -> value and remark."""
        return {}

    def arrange(self, views: Views, sched: Sched) -> Views:
        """Rearrange a batch's pixels before the compiled forward, which takes what this returns; ranks may exchange some (montages)."""
        return views

    def forward(self, views: Views, sched: Sched) -> StepOutput:
        """Tensor code only: no `.item()`, no rank checks."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def before_step(self, sched: Sched) -> None:
        """Host side, before the forward: put the step's scalars into buffers (a temperature), where a compiled graph reads them."""

    def dropped_gradients(self, sched: Sched) -> Iterable[nn.Parameter]:
        """Parameters that the optimizer must leave alone in this step: no update, no decay, no momentum (the last layer in DINO's first
        epochs).  Their gradient is set to None after clipping."""
        return ()

    def enqueue(self, keys: dict[str, Tensor]) -> None:
        """Take in what the step's forward passes returned as `StepOutput.keys`, the rows of its micro-batches one after the other."""

    def after_step(self, sched: Sched) -> None:
        """Non-gradient state that changes after the optimizer step (centres)."""

    @property
    def backbone(self) -> nn.Module:
        """What evaluations and exports see."""
        prefix = self.target_backbone_prefix if self.evaluated == "target" else self.backbone_prefix
        return self.get_submodule(prefix.rstrip("."))

    def train(self, mode: bool = True) -> Method:
        super().train(mode)
        for pair in self.ema:
            pair.target.train(mode and pair.target_mode == "train")
        return self
