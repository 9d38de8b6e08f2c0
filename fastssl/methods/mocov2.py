"""MoCo v2 (He et al., CVPR 2020, arXiv 1911.05722; Chen et al., arXiv 2003.04297): momentum contrast (methods/mocov2.md).

A query of one view has to find the key of the other view, made by the key encoder (an EMA of the query encoder), among a queue of
earlier keys.  The key encoder moves before it encodes.  B images of this rank, D = cfg.dim.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastssl.batch import Views
from fastssl.collapse import embedding_logs
from fastssl.collectives import world_size
from fastssl.config import ConfigError, MethodConfig, RunConfig
from fastssl.ema import Ema, average_buffers_, frozen_copy, without_drop_path
from fastssl.losses.info_nce import info_nce, top
from fastssl.method import Method, StepOutput
from fastssl.models.heads import PlainMLP, Pooled
from fastssl.models.norm import apply_norm_policy
from fastssl.models.queue import Queue
from fastssl.models.shuffle import random_permutation, shuffled
from fastssl.optim.schedules import Sched
from fastssl.precision import unit_rows


class MomentumContrast(Method):
    """Query encoder, key encoder and queues.  Subclasses write `encode` and `losses`.

    BatchNorm of the keys: shuffle, as published; sync; or eman, whose key encoder is in eval mode.  With one rank shuffling changes
    nothing and is left out.
    """

    backbone_prefix = "query.backbone."
    target_backbone_prefix = "key.backbone."
    norm_policies = (*Method.norm_policies, "shuffle")

    def __init__(self, encoder: nn.Module, norm: str, queues: Mapping[str, int], dim: int):
        super().__init__()
        self.query = apply_norm_policy(encoder, norm)
        self.key = without_drop_path(frozen_copy(self.query))
        self.queues = nn.ModuleDict({name: Queue(size, dim) for name, size in queues.items()})
        self.norm = norm
        # EMAN averages the running statistics after the query's forward pass, which has just moved them: `forward` does it.
        self.ema = (Ema(self.query, self.key, when="before_forward", target_mode="eval" if norm == "eman" else "train"),)
        self.register_buffer("key_step", torch.tensor(0.0), persistent=False)

    @classmethod
    def check(cls, cfg: RunConfig) -> None:
        super().check(cfg)
        batch = cfg.train.global_batch_size
        for flag, (size, per_image) in cls.queue_sizes(cfg.method).items():
            step = batch * per_image
            if size % step or size < step:
                below = max(size // step, 1) * step
                raise ConfigError(
                    f"{flag} {size} must be a multiple of the {step} keys that a step writes ({batch} images, {per_image} keys each). "
                    f"Take {below} or {below + step}."
                )
        if cfg.data.last_batch != "drop":
            raise ConfigError(f"{cfg.method.name}'s queue takes the keys of whole batches: take --data.last-batch drop.")

    @classmethod
    def queue_sizes(cls, cfg: MethodConfig) -> dict[str, tuple[int, int]]:
        """Flag of each queue -> its size, keys an image adds."""
        return {"--method.queue-size": (cfg.queue_size, 1)}

    def encode(self, encoder: nn.Module, x: Tensor) -> Tensor:
        """Unit embeddings of images by the query or the key encoder: [B, ..., D]."""
        raise NotImplementedError(f"{type(self).__name__} has no encode")

    def losses(self, q: Tensor, k: Tensor) -> StepOutput:
        """q, k: what `encode` gives; no gradient goes to k or a queue."""
        raise NotImplementedError(f"{type(self).__name__} has no losses")

    permutation = staticmethod(random_permutation)
    """The order in which shuffle-BN takes the images of all ranks."""

    def encode_keys(self, x: Tensor) -> Tensor:
        encode = partial(self.encode, self.key)
        with torch.no_grad():
            if self.norm == "shuffle" and world_size() > 1:
                return shuffled(encode, x, self.permutation)
            return encode(x)

    def before_step(self, sched: Sched) -> None:
        self.key_step.fill_(1 - sched.ema_momentum)

    def forward(self, views: Views, sched: Sched) -> StepOutput:
        x_q, x_k = views.per_view()
        q = self.encode(self.query, x_q)
        if self.norm == "eman":
            average_buffers_(self.query, self.key, self.key_step)
            self.key_step.zero_()  # once a step, whatever the number of micro-batches
        return self.losses(q, self.encode_keys(x_k))

    def enqueue(self, keys: dict[str, Tensor]) -> None:
        for name, rows in keys.items():
            self.queues[name].enqueue(rows)


class MoCoV2(MomentumContrast):
    @dataclass(frozen=True, kw_only=True)
    class Config(MethodConfig):
        """MoCo v2's head, queue and temperature."""

        name: ClassVar[str] = "mocov2"

        hidden: int = 2048
        """Width of the projector."""
        dim: int = 128
        """Embedding D."""
        queue_size: int = 65536
        """Earlier keys to tell apart from the positive; a multiple of the global batch."""
        temperature: float = 0.2

    def __init__(self, cfg: Config, backbone: Callable[[], nn.Module], norm: str):
        body = backbone()
        projector = PlainMLP(body.num_features, cfg.hidden, cfg.dim)
        encoder = nn.Sequential(OrderedDict(backbone=body, pool=Pooled(), projector=projector))
        super().__init__(encoder, norm, {"global": cfg.queue_size}, cfg.dim)
        self.temperature = cfg.temperature

    def encode(self, encoder: nn.Module, x: Tensor) -> Tensor:
        return unit_rows(encoder(x))

    def losses(self, q: Tensor, k: Tensor) -> StepOutput:
        loss, rank = info_nce(q, k, self.queues["global"].rows, self.temperature)
        return StepOutput(loss, {"top1": top(rank, 1), "top5": top(rank, 5), **embedding_logs(q)}, {"global": k})
