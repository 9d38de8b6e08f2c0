"""What a training step has to compute and to move at least, and how fast a device can do either."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock, Bottleneck

from fastssl.bench.augment_clock import samples
from fastssl.bench.training import Rank
from fastssl.models.resnet import ResNet
from fastssl.precision import autocast

REACHED = 0.9
"""Share of the datasheet's memory rate that the memory roof counts with: what long copies reach."""
_SIDE = {"cuda": 8192, "cpu": 1024}
"""Of the square matrices whose product is timed."""


class Peak(NamedTuple):
    """A datasheet: dense 16-bit products with fp32 sums, and the memory's rate."""

    tflop_per_s: float
    tb_per_s: float


PEAKS = {"V100": Peak(125, 0.90), "A100": Peak(312, 2.04), "H100": Peak(989, 3.35), "H200": Peak(989, 4.8)}
"""By a part of the device's name: V100 SXM2, A100 80 GB, H100 SXM, H200."""


def datasheet(name: str) -> Peak | None:
    """None for devices that are not listed, slower variants of a listed one among them."""
    if any(variant in name for variant in ("PCIe", "PCIE", "40GB", "NVL")):
        return None
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product of random matrices."""
    n = _SIDE[device.type]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    return 2e3 * n**3 / median(samples(lambda: torch.mm(a, b, out=out), device, 5))


@dataclass
class Call:
    """A forward pass of a backbone, as the method made it."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: bool
    training: bool
    convolved: int = 0
    """Elements that the convolutions of a ResNet read; the outputs alike."""
    outputs: int = 0
    sums: int = 0
    """Elements of its residual sums."""

    def moved(self) -> int:
        """Elements that a ResNet reads and writes, where each convolution and each BatchNorm + ReLU (+ sum) is one pass.

        I read by convolutions, O written by them, R of the residual sums.  Forward, BatchNorm in training mode: I + O, O for the
        statistics, 2 O + R to normalise.  In evaluation mode it is part of the convolution: I + O + R.  Backward: 5 O for BatchNorm,
        2 O + 2 I for the gradients of inputs and weights, 3 R to add those of the two branches.
        """
        i, o, r = self.convolved, self.outputs, self.sums
        if self.grad:
            return 3 * i + 11 * o + 4 * r
        return i + (4 if self.training else 1) * o + r


@dataclass
class Recorded:
    """One step of a rank, computed eagerly, forward and backward."""

    student: list[Call]
    target: list[Call]
    flops: float
    """Of the batch: 2 for each multiply-add, forward and backward, nothing computed twice."""

    def moved(self) -> int | None:
        """Elements that the backbones move for the batch; None unless they are ResNets."""
        calls = [*self.student, *self.target]
        return sum(c.moved() for c in calls) if all(isinstance(c.module, ResNet) for c in calls) else None


def record(rank: Rank) -> Recorded:
    """Run the method's forward and backward pass once, not compiled, and look on.  Gradients are dropped."""
    state, method = rank.state, rank.state.method
    sched = state.schedules.at(state.step)
    student = method.get_submodule(method.backbone_prefix.rstrip("."))
    target = method.get_submodule(method.target_backbone_prefix.rstrip(".")) if method.target_backbone_prefix else None
    calls: list[Call] = []
    counter = FlopCounterMode(display=False)
    with ExitStack() as stack:
        for handle in (h for backbone in (student, target) if backbone is not None for h in _watch(backbone, calls)):
            stack.callback(handle.remove)
        # The plain formula of attention: fused kernels are not counted on every device, and may compute things twice.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        with counter:
            with autocast(state.dist.device, state.dtype):
                loss = method.forward(method.arrange(rank.views, sched), sched).loss
            loss.backward()
    state.optimizer.zero_grad(set_to_none=True)
    return Recorded([c for c in calls if c.module is student], [c for c in calls if c.module is target], float(counter.get_total_flops()))


def _watch(backbone: nn.Module, calls: list[Call]) -> Iterator[torch.utils.hooks.RemovableHandle]:
    def begins(module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append(Call(module, args, kwargs, torch.is_grad_enabled(), module.training))

    def convolves(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        calls[-1].convolved += args[0].numel()
        calls[-1].outputs += out.numel()

    def adds(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        calls[-1].sums += out.numel()

    yield backbone.register_forward_pre_hook(begins, with_kwargs=True)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            yield module.register_forward_hook(convolves)
        elif isinstance(module, BasicBlock | Bottleneck):
            yield module.register_forward_hook(adds)
