"""What a training step has to compute and to move at least, and how fast a device can do either."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock, Bottleneck

from fastssl.bench.augment_clock import samples
from fastssl.bench.training import Rank
from fastssl.method import Method
from fastssl.models.norm import SyncBatchNorm
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
    """None for devices that are not listed, variants and parts of a listed one among them."""
    if any(variant in name for variant in ("PCIe", "PCIE", "FHHL", "40GB", "NVL", "GH200", "MIG")):
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
    """One step of a rank, forward and backward."""

    student: list[Call]
    target: list[Call]
    flops: float
    """Of the batch: 2 for each multiply-add, forward and backward, nothing computed twice."""
    norm_collectives: int
    """Of SyncBatchNorm, if there are several ranks: one in each forward pass of a layer, one in its backward pass."""

    def moved(self) -> int | None:
        """Elements that the backbones move for the batch; None unless they are ResNets."""
        calls = [*self.student, *self.target]
        return sum(c.moved() for c in calls) if all(isinstance(c.module, ResNet) for c in calls) else None


def record(rank: Rank, *, inputs: bool = False) -> Recorded:
    """Look on at a forward and a backward pass of the method, not compiled, on fake tensors: they have shapes and no memory, so that
    what fits when it is trained, compiled and with fused attention, can be counted.

    inputs: the calls are given the tensors that the method gives them, by another forward pass, without gradients; else fakes.
    """
    state, method = rank.state, rank.state.method
    sched = state.schedules.at(state.step)
    views = method.arrange(rank.views, sched)
    fake, counter = FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False)
    tensors = {name: fake.from_tensor(t) for name, t in (*method.named_parameters(), *method.named_buffers())}
    with ExitStack() as stack:
        calls, norms = stack.enter_context(_watched(method)), stack.enter_context(_exchanging_norms(method))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        # The plain formula of attention: fused kernels are not counted on every device, and may compute things twice.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(fake)
        stack.enter_context(counter)
        with autocast(state.dist.device, state.dtype):
            loss = functional_call(method, tensors, (views, sched)).loss
        loss.backward()
    if inputs:
        with _watched(method) as real, torch.no_grad(), autocast(state.dist.device, state.dtype):
            method.forward(views, sched)
        calls = [replace(c, args=r.args, kwargs=r.kwargs) for c, r in zip(calls, real, strict=True)]
    student, target = _backbones(method)
    of_student, of_target = ([c for c in calls if c.module is backbone] for backbone in (student, target))
    return Recorded(of_student, of_target, float(counter.get_total_flops()), sum(1 + grad for grad in norms))


def _backbones(method: Method) -> tuple[nn.Module, nn.Module | None]:
    """Student and target."""
    target = method.target_backbone_prefix
    return method.get_submodule(method.backbone_prefix.rstrip(".")), method.get_submodule(target.rstrip(".")) if target else None


@contextmanager
def _watched(method: Method) -> Iterator[list[Call]]:
    """The calls of its backbones, which are listed as they happen."""
    calls: list[Call] = []
    handles = [h for backbone in _backbones(method) if backbone is not None for h in _watch(backbone, calls)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _exchanging_norms(method: Method) -> Iterator[list[bool]]:
    """For each forward pass of a SyncBatchNorm that takes its batch's statistics, whether a backward pass follows."""
    passes: list[bool] = []

    def passed(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        if module.training:
            passes.append(out.requires_grad)

    handles = [m.register_forward_hook(passed) for m in method.modules() if isinstance(m, SyncBatchNorm)]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


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
