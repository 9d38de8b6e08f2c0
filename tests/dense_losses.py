"""The losses over pairs as their papers write them: whole matrices and autograd, one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.losses.mmd import mmd_uniform
from fastssl.losses.nt_xent import nt_xent
from fastssl.losses.uniformity import uniformity
from fastssl.losses.vicreg import covariance, variance_hinge

Loss = Callable[[Tensor, Tensor], Tensor]
WEIGHTS = ((1.0,), (1.0, 40.0), (1.0, 40.0, 40.0), (0.5, 2.0, 7.25, 3.0), (0.0, 1.0, 0.0, 0.3, 2.0))
"""Kernels of L = 1 .. 5."""
TEMPERATURE, SCALE, CONFIGURED = 0.2, 2.5, 19


def dense_mmd(z: Tensor, weights: Sequence[float]) -> Tensor:
    t, q = z @ z.T, z.shape[1]
    before, p, phi = torch.ones_like(t), t, 0.0
    for k, b in enumerate(weights, 1):
        phi = phi + b * p
        before, p = p, ((2 * k + q - 2) * t * p - k * before) / (k + q - 2)
    return phi.mean()


def dense_uniformity(z: Tensor, scale: float) -> Tensor:
    squared = torch.pdist(z).square()
    return torch.exp(-scale * squared).mean().log()


def dense_nt_xent(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    z, n = torch.cat((x, y)), len(x)
    logits = (z @ z.T / temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(logits, (torch.arange(2 * n) + n) % (2 * n))


def dense_covariance(x: Tensor, n: int) -> Tensor:
    x = x - x.mean(0)
    c = x.T @ x / (n - 1)
    return (c - torch.diag(c.diagonal())).square().sum() / x.shape[1]


def dense_hinge(x: Tensor) -> Tensor:
    return torch.relu(1 - torch.sqrt(x.var(0) + 1e-4)).mean()


def unit(loss: Loss) -> Loss:
    return lambda x, y: loss(F.normalize(x, dim=1), F.normalize(y, dim=1))


def both(loss: Callable[[Tensor], Tensor]) -> Loss:
    return lambda x, y: loss(x) + 2 * loss(y)


LOSSES: dict[str, tuple[Loss, Loss]] = {
    **{f"mmd L={len(w)}": (unit(both(partial(mmd_uniform, weights=w))), unit(both(partial(dense_mmd, weights=w)))) for w in WEIGHTS},
    "nt_xent": (unit(partial(nt_xent, temperature=TEMPERATURE)), unit(partial(dense_nt_xent, temperature=TEMPERATURE))),
    "uniformity": (unit(both(partial(uniformity, scale=SCALE))), unit(both(partial(dense_uniformity, scale=SCALE)))),
    "variance": (variance_hinge, lambda x, y: (dense_hinge(x) + dense_hinge(y)) / 2),
    "covariance": (partial(covariance, n=CONFIGURED), lambda x, y: dense_covariance(x, CONFIGURED) + dense_covariance(y, CONFIGURED)),
}
"""Ours and the dense one, of the projections of two views."""


def views(rows: int, q: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Projections of two related views, neither centred nor of one scale; some columns vary more than 1, some less."""
    generator = torch.Generator().manual_seed(rows + q)
    x, noise = torch.randn(2, rows, q, generator=generator, dtype=torch.float64) * torch.linspace(0.3, 1.6, q) + 0.4
    return x.to(dtype), (x + 0.5 * noise).to(dtype)


def value_and_gradients(loss: Loss, x: Tensor, y: Tensor) -> list[Tensor]:
    x, y = x.detach().clone().requires_grad_(), y.detach().clone().requires_grad_()
    value = loss(x, y)
    value.backward()
    return [value.detach(), x.grad, y.grad]
