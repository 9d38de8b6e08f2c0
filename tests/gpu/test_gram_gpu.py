"""SFRIK's MMD on CUDA: 16-bit operands with fp32 sums, the memory that its docstring states, no synchronisation, one graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastssl.bench.machine import peak_bytes
from fastssl.losses.mmd import mmd_uniform
from tests.dense_losses import dense_mmd

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

PUBLISHED = (1.0, 40.0, 40.0)


def gradient(loss, x: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss(F.normalize(x, dim=1)), x)[0]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 6e-3), (torch.float16, 1e-3), (None, 3e-6)], ids=["bf16", "fp16", "fp32"])
def test_error_of_the_gradient(dtype: torch.dtype | None, most: float, compiled: bool):
    x = torch.randn(768, 8192, device="cuda", generator=torch.Generator("cuda").manual_seed(0), requires_grad=True)
    exact = gradient(lambda z: dense_mmd(z, PUBLISHED), x.detach().double().requires_grad_())

    def mmd(z):
        with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
            return mmd_uniform(z, PUBLISHED)

    torch._dynamo.reset()
    loss = torch.compile(mmd, fullgraph=True, dynamic=False) if compiled else mmd
    gradient(loss, x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            grad = gradient(loss, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float((grad.double() - exact).norm() / exact.norm()) < most


def test_peak_memory_of_a_large_batch():
    """pair_sum's docstring: 32 + 280 MiB forward, then 32 + 768 backward, and what the loss's few scalars take."""
    z = F.normalize(torch.randn(4096, 32768, device="cuda"), dim=1).requires_grad_()

    def forward_backward():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = mmd_uniform(z, PUBLISHED)
        torch.autograd.grad(loss, z)

    forward_backward()
    assert peak_bytes(forward_backward, z.device) < 830 << 20
