"""Our SyncBatchNorm on several ranks is BatchNorm on the concatenated batch, unequal shares included."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastssl.models.norm import SyncBatchNorm, apply_norm_policy
from tests.ranks import run_ranks

ROWS = 8


def images() -> torch.Tensor:
    # A mean far above the deviation: sums of squares would lose the variance here.
    return torch.randn(ROWS, 4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.3 + 50


def cotangent() -> torch.Tensor:
    return torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    head = (nn.Linear(7 * 12, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False))
    return nn.Sequential(nn.Conv2d(4, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.Flatten(), *head).double()


def outputs(net: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = net(x)
    (y * weights).sum().backward()
    return {"y": y.detach(), "grad_x": x.grad, **{n: p.grad for n, p in net.named_parameters()}, **dict(net.named_buffers())}


def on_rank(rank: int, world: int, shares: tuple[int, ...], compiled: bool) -> dict[str, torch.Tensor]:
    net = apply_norm_policy(network(), "sync")
    assert sum(isinstance(m, SyncBatchNorm) for m in net.modules()) == 3
    if compiled:
        net.compile(fullgraph=True, dynamic=False)
    return outputs(net, images().split(shares)[rank], cotangent().split(shares)[rank])


@pytest.mark.parametrize(
    ("shares", "compiled"),
    [
        ((3, 5), False),
        pytest.param((3, 5), True, marks=pytest.mark.slow),
        pytest.param((4, 4), False, marks=pytest.mark.slow),
        pytest.param((2, 2, 2, 2), False, marks=pytest.mark.slow),
        pytest.param((1, 4, 1, 2), False, marks=pytest.mark.slow),  # one row alone has no variance
    ],
)
def test_equals_batchnorm_of_the_whole_batch(shares: tuple[int, ...], compiled: bool):
    """Outputs, gradients of images and parameters, running statistics and counters."""
    whole = outputs(network(), images(), cotangent())
    ranks = run_ranks(len(shares), on_rank, shares, compiled)
    for name, expected in whole.items():
        if name in ("y", "grad_x"):
            actual = torch.cat([r[name] for r in ranks])
        elif name in dict(network().named_parameters()):
            actual = sum(r[name] for r in ranks)  # each rank sums over its own rows; DDP adds them up
        else:
            actual = ranks[0][name]
            assert all(torch.equal(r[name], actual) for r in ranks)
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_alone_it_is_batchnorm():
    x = images()
    torch.testing.assert_close(apply_norm_policy(network(), "sync")(x), network()(x), rtol=0, atol=0)
