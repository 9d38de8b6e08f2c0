"""Our SyncBatchNorm against torch's on a GPU: one rank of an NCCL group, where neither may take the way of a process alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastssl import collectives
from fastssl.models import norm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.fixture
def group(tmp_path: Path):
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield dist.group.WORLD
    dist.destroy_process_group()


def step(module: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    (y.float() * weights).sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    return {"y": y.detach(), "grad_x": x.grad, **grads, "mean": module.running_mean, "var": module.running_var}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_torchs(dtype: torch.dtype, compiled: bool, group, monkeypatch):
    for module in (norm, collectives):  # so that the collectives run; a group of one leaves everything as it is
        monkeypatch.setattr(module, "world_size", lambda: 2)
    theirs = nn.SyncBatchNorm(16, process_group=group).cuda()
    nn.init.uniform_(theirs.weight), nn.init.uniform_(theirs.bias)
    ours = norm.SyncBatchNorm(16).cuda()
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    x = (torch.randn(8, 16, 7, 7, device="cuda") * 3 + 5).to(dtype).contiguous(memory_format=torch.channels_last)
    weights = torch.randn_like(x, dtype=torch.float32)
    expected = step(theirs, x, weights)
    if compiled:
        ours.compile(fullgraph=True, dynamic=False)
    tolerance = 2e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(step(ours, x, weights), expected, rtol=tolerance, atol=tolerance)
