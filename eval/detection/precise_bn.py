"""Precise-BN: BatchNorm statistics of the final weights over many training batches (methods/transfer.md, 2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.collectives import world_size
from fastssl.models.norm import broadcast_running_statistics

BATCHES = 200
"""As published, once after the last step."""


class _Sums:
    """Of one layer: of every batch n elements a channel, their mean and unbiased variance."""

    def __init__(self) -> None:
        self.n = self.mean = self.square = 0.0

    def add(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """A forward hook: the layer's buffers hold the batch's statistics."""
        n = inputs[0].numel() // inputs[0].shape[1]
        mean, var = layer.running_mean.double(), layer.running_var.double()
        self.n += n
        self.mean = self.mean + n * mean
        self.square = self.square + n * (mean.square() + var * ((n - 1) / n))

    def write(self, layer: nn.Module) -> None:
        mean = self.mean / self.n
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(self.square / self.n - mean.square())


@torch.no_grad()
def precise_bn(model: nn.Module, batches: Iterable[tuple[Any, ...]]) -> None:
    """Replace the running statistics of every BatchNorm that runs by those over `batches`: model(*batch) in training mode, weights
    fixed.  With several ranks every rank calls it with as many batches, and rank 0's statistics are everybody's.

    Regions and anchors are drawn as in training.  The model is left in the mode it had.
    """
    training = model.training
    sums = {m: _Sums() for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats}
    momenta = {layer: layer.momentum for layer in sums}
    hooks = [layer.register_forward_hook(total.add) for layer, total in sums.items()]
    model.train()
    try:
        for layer in sums:
            layer.momentum = 1.0
        for batch in batches:
            model(*batch)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        model.train(training)
    for layer, total in sums.items():
        if total.n:
            total.write(layer)
    if world_size() > 1:
        broadcast_running_statistics(model)
