"""SERE's relation losses (TPAMI 2023, arXiv 2206.05184; methods/sere.md 2 to 5, 12): relations inside one view, matched between views.

A relation is a matrix of products of features, R = a b^T.  Channel relations R = F F^T / d^2 are those of whole views.  Pixel relations
A = (C/M)^(-1/2) X X^T, one for each of M groups of channels, are compared where two crops overlap: as sampling is linear, sampling rows
and columns of A is sampling the features, W1 A W2^T = (C/M)^(-1/2) (W1 X)(W2 X)^T.  The teacher's rows become probabilities by a sharpened
softmax, the student's by a plain one; losses are cross-entropies, means over images, groups and rows.

Shapes: B images, L local crops, N tokens of a global crop and n of a local one, C channels.  Features are those of the relation heads,
view-major, z of the teacher and p of the student; under autocast the operands of products of features are 16-bit, as published, while
sampling, relations and all that is done with them are fp32 or wider.

Memory at the published 128 images a GPU, from the shapes.  One channel relation of ViT-B, (128, 768, 768) in fp32, is 302 MB: the loss
holds the teacher's two and their sum and three more for the view it works on, 1.8 GB, and keeps 0.3 GB of gradients of features.
Autograd would keep the student's twelve relations, 3.6 GB.  One pixel relation (128, 12, 169, 169) is 175 MB, those of all 20 local pairs
(20, 128, 12, 36, 36) are 159 MB: three of them at a time, and 0.4 GB kept.  ViT-S: a quarter of the channel relations, half of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.losses.overlap import overlap_coordinates, sampling_matrix
from fastssl.precision import operand_dtype, product, wide

Factors = Sequence[Tensor]
"""(a, b), or (a,) for b = a: features [..., R, K] and [..., S, K] of R rows and S columns."""


def relation(factors: Factors) -> Tensor:
    """R = a b^T: [..., R, S]."""
    a, b = (x.to(operand_dtype(x)) for x in (factors[0], factors[-1]))
    return product(a, b.mT)


def teacher_relation(factors: Factors, temperature: float) -> Tensor:
    """Rows of R as probabilities, sharpened: softmax(R / tau)."""
    return torch.softmax(relation(factors) / temperature, dim=-1)


class _RelationLoss(torch.autograd.Function):
    """See `relation_loss`.  The loss is one number and its gradient by R, (mass softmax(R) - Q) / rows, is known with it: taking that to
    a and b at once spares keeping R or its softmax for the backward pass.  Its division by the rows follows the products: fp16
    would lose what is below 6e-8."""

    @staticmethod
    def forward(ctx, probs: Tensor, mass: int, *factors: Tensor) -> Tensor:
        a, b = (x.to(operand_dtype(x)) for x in (factors[0], factors[-1]))
        r = product(a, b.mT)
        lse = r.logsumexp(-1, keepdim=True)
        rows = lse.numel()
        loss = (mass * lse.sum() - (probs * r).sum()) / rows
        slope = (r - lse).exp_().mul_(mass).sub_(probs).to(a.dtype)
        grads = product(slope, b).div_(rows), product(slope.mT, a).div_(rows)
        ctx.save_for_backward(*(grads if len(factors) == 2 else (grads[0] + grads[1],)))
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        return None, None, *(grad_loss * g for g in ctx.saved_tensors)


def relation_loss(student: Factors, probs: Tensor, mass: int = 1) -> Tensor:
    """Mean over rows of H(Q, softmax(R)) = mass lse(R) - sum_j Q_j R_j, R the student's relation.

    probs: [..., R, S], the teacher's; of several teachers their sum, and `mass` their number -> scalar.
    """
    return _RelationLoss.apply(probs, mass, *student)


# ------------------------------------------------------------------------------------------------ channels


def channel_factors(features: Tensor, divisor: float) -> tuple[Tensor]:
    """[..., N, C] -> ([..., C, N],): R = F F^T / d^2."""
    return (wide(features).mT / divisor,)


def channel_loss(z: Tensor, p: Tensor, p_local: Tensor | None, *, divisors: tuple[float, float], temperature: float) -> Tensor:
    """Mean of H(Q_i, R_v) over the teacher's global views i and all other views v of the student: 2 + 2 L pairs.

    z, p: [2B, N, C], p_local: [L B, n, C] or None.  divisors: d of global and of local views.
    """
    (teacher,), (student,) = (channel_factors(x.unflatten(0, (2, -1)), divisors[0]) for x in (z, p))
    probs = [teacher_relation((t,), temperature) for t in teacher]
    loss, pairs = sum(relation_loss((s,), q) for s, q in zip(student.flip(0), probs, strict=True)), 2
    if p_local is not None:
        (local,) = channel_factors(p_local.unflatten(0, (-1, student.shape[1])), divisors[1])
        both = probs[0] + probs[1]  # one log-sum-exp of a local view serves both teachers
        # A view at a time: the relations of all of them together are what takes memory.
        loss, pairs = loss + sum(relation_loss((s,), both, mass=2) for s in local), pairs + 2 * len(local)
    return loss / pairs


# ------------------------------------------------------------------------------------------------ pixels


def pixel_factor(features: Tensor, groups: int) -> Tensor:
    """[..., S, C] -> [..., M, S, C/M]: each group of channels by itself, with half of the scale (C/M)^(-1/2)."""
    x = features.unflatten(-1, (groups, -1)).transpose(-3, -2)
    return x * x.shape[-1] ** -0.25


def global_factors(features: Tensor, boxes: Tensor, flips: Tensor, sizes: tuple[int, int], groups: int) -> tuple[Tensor, ...]:
    """Both global views where they overlap, on grids of sizes[0]^2 points for the rows of A and sizes[1]^2 for its columns.

    features: [2B, N, C], boxes: [V, B, 4], flips: [V, B] -> [2, B, M, S^2, C/M] once for equal sizes, else twice.
    """
    x = wide(features).unflatten(0, (2, -1))
    here, there = boxes[:2], boxes[:2].flip(0)
    distinct = sizes if sizes[0] != sizes[1] else sizes[:1]
    matrices = (sampling_matrix(overlap_coordinates(here, flips[:2], there, s), grid(x)) for s in distinct)
    return tuple(pixel_factor(w @ x, groups) for w in matrices)


def local_factors(z: Tensor, p_local: Tensor, boxes: Tensor, flips: Tensor, size: int, groups: int) -> tuple[Tensor, Tensor]:
    """The teacher's global views and the student's local ones, each pair where it overlaps: twice [2, L, B, M, S^2, C/M]."""
    z, p_local = wide(z).unflatten(0, (2, -1)), wide(p_local).unflatten(0, (-1, boxes.shape[1]))
    of_global, of_local = (boxes[:2, None], flips[:2, None]), (boxes[2:], flips[2:])
    on_global = sampling_matrix(overlap_coordinates(*of_global, of_local[0], size), grid(z))
    on_local = sampling_matrix(overlap_coordinates(*of_local, of_global[0], size), grid(p_local))
    teacher = torch.einsum("qlbsn,qbnc->qlbsc", on_global, z)
    student = torch.einsum("qlbsn,lbnc->qlbsc", on_local, p_local)
    return pixel_factor(teacher, groups), pixel_factor(student, groups)


def pixel_loss(
    z: Tensor,
    p: Tensor,
    p_local: Tensor | None,
    boxes: Tensor,
    flips: Tensor,
    *,
    groups: int,
    sizes: tuple[int, int],
    local_size: int,
    temperature: float,
) -> Tensor:
    """Mean of H(Q, A) over the same 2 + 2 L pairs as `channel_loss`, each on the overlap of its crops.

    z, p: [2B, N, C], p_local: [L B, n, C] or None, boxes: [B, V, 4] (top, left, height, width), flips: [B, V].  A pair that does not
    overlap has ln S^2 and no gradient, as published.
    """
    boxes, flips = boxes.to(torch.promote_types(z.dtype, torch.float32)).transpose(0, 1), flips.T
    with torch.autocast(z.device.type, enabled=False):  # sampling
        teacher, student = (global_factors(x, boxes, flips, sizes, groups) for x in (z, p))
        local = None if p_local is None else local_factors(z, p_local, boxes, flips, local_size, groups)
    loss, pairs = torch.zeros((), dtype=boxes.dtype, device=z.device), 2
    for q in (0, 1):
        loss = loss + relation_loss([s[1 - q] for s in student], teacher_relation([t[q] for t in teacher], temperature))
    if local is not None:
        t, s = local
        local_pairs = 2 * s.shape[1]
        loss, pairs = loss + local_pairs * relation_loss((s,), teacher_relation((t,), temperature)), pairs + local_pairs
    return loss / pairs


def grid(tokens: Tensor) -> tuple[int, int]:
    """Rows and columns of the tokens [..., N, C] of a square crop."""
    side = math.isqrt(tokens.shape[-2])
    return side, side
