"""Distance of embeddings to the uniform law on the sphere, in the kernel of SFRIK (methods/sfrik.md 2).

Zheng et al., "Self-supervised learning with rotation-invariant kernels", ICLR 2023, arXiv 2208.00789.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.collectives import world_size
from fastssl.losses.pairs import pair_sum


def mmd_uniform(z: Tensor, weights: Sequence[float]) -> Tensor:
    """MMD^2 = 1/N^2 sum_ij phi(z_i . z_j), i = j included; phi = sum_l b_l P_l with b = weights, in dimension q.

    z: [B, q], this rank's unit rows -> scalar, equal on all ranks.  Collapse: phi(1) = sum_l b_l; N uniform points: phi(1) / N.

    The terms i = j are the constant phi(1).  Their gradient phi'(1) z_i is radial and the backward pass of the normalisation
    would remove it; it is left out here, because phi'(1) ~ 200 against ~ 1 elsewhere would drown the rest in a 16-bit product.
    """
    n = len(z) * world_size()
    power, slope = kernel_coefficients(weights, z.shape[1])
    pairs = pair_sum(z, lambda t: (polynomial(t, power), polynomial(t, slope)), diagonal=False)
    return (pairs / n + sum(weights)) / n


def kernel_coefficients(weights: Sequence[float], dim: int) -> tuple[list[float], list[float]]:
    """Coefficients of t^0, t^1, ... in phi = sum_l b_l P_l(dim; t), and in phi'.  weights: b_1, b_2, ..., of any length."""
    p = legendre(len(weights), dim)
    power = [sum(b * p[k + 1][i] for k, b in enumerate(weights)) for i in range(len(weights) + 1)]
    return power, [i * a for i, a in enumerate(power)][1:]


def legendre(order: int, dim: int) -> list[list[float]]:
    """Coefficients of t^0 ... t^order in P_0, ..., P_order: Legendre polynomials of dimension `dim` >= 2, P_l(1) = 1.

    (l + dim - 2) P_{l+1} = (2l + dim - 2) t P_l - l P_{l-1}
    """
    p = [[1.0] + order * [0.0], [0.0, 1.0] + (order - 1) * [0.0]]
    for k in range(1, order):
        times_t = [0.0, *p[k][:-1]]
        p.append([((2 * k + dim - 2) * a - k * b) / (k + dim - 2) for a, b in zip(times_t, p[k - 1], strict=True)])
    return p


def polynomial(t: Tensor, coefficients: Sequence[float]) -> Tensor:
    """sum_i coefficients_i t^i by Horner's rule, element by element, without a gradient."""
    value = torch.full_like(t, coefficients[-1])
    for a in reversed(coefficients[:-1]):
        value.mul_(t).add_(a)
    return value
