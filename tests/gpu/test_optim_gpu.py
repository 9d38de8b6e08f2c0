"""Clipping and LARS on a GPU: the numbers of the CPU, in a number of kernels that does not grow with that of the tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fastssl.optim.clip import clip_each_
from fastssl.optim.lars import LARS, BarlowLARS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def parameters(n: int, device: str) -> list[nn.Parameter]:
    """n tensors of other sizes, those with four axes channels-last, with gradients."""
    generator, out = torch.Generator().manual_seed(0), []
    for i in range(n):
        shape = ((7 * i + 1,), (64, i + 1), (i + 1, 3, 3, 3))[i % 3]
        p = nn.Parameter(torch.randn(shape, generator=generator).to(device))
        grad = torch.randn(shape, generator=generator).to(device)
        if p.dim() == 4:
            p.data, grad = (t.to(memory_format=torch.channels_last) for t in (p.data, grad))
        p.grad = grad
        out.append(p)
    return out


def clip(params: list[nn.Parameter]) -> None:
    clip_each_(params, 0.5)


def lars(form: type, params: list[nn.Parameter]) -> Callable[[], None]:
    return form([{"params": params}], lr=0.1, weight_decay=0.01).step


WAYS = {"clip": lambda params: lambda: clip(params), "LARS": lambda p: lars(LARS, p), "BarlowLARS": lambda p: lars(BarlowLARS, p)}


def kernels(step: Callable[[], None]) -> int:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    return sum(e.count for e in found.key_averages() if e.device_type is torch.autograd.DeviceType.CUDA)


@pytest.mark.parametrize("name", WAYS)
def test_numbers_of_the_cpu_in_few_kernels(name: str):
    results = {}
    for device in ("cpu", "cuda"):
        params = parameters(150, device)
        step = WAYS[name](params)
        for _ in range(3):  # the first compiles the kernel, the later ones find the same addresses
            step()
        results[device] = [(p.detach().cpu(), p.grad.cpu()) for p in params]
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert kernels(step) < 60
    torch.testing.assert_close(results["cuda"], results["cpu"], rtol=1e-4, atol=1e-6)
