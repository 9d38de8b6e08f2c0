"""Self-distillation losses of the DINO family: cross-entropies between teacher and student distributions over O outputs.

Rows are crop-major: all B images of crop 1, then of crop 2, and so on.  Everything is fp32 or wider, whatever the logits
are: cosines of 8 bits divided by 0.04 would not be.  Temperatures may be 0-d tensors, so that a compiled graph serves all
epochs.  DINO: Caron et al., ICCV 2021, arXiv 2104.14294; iBOT: Zhou et al., ICLR 2022, arXiv 2111.07832; SCFS: Song et al., ICCV
2023, arXiv 2212.06486.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.precision import wide

Temperature = float | Tensor


def teacher_temperature(epoch: int, *, warmup: float, final: float, warmup_epochs: int) -> float:
    """linspace(warmup, final, warmup_epochs)[epoch], then `final`: reached in the last epoch of the warm-up (methods/dino.md 2)."""
    if epoch >= warmup_epochs:
        return final
    return warmup + (final - warmup) * epoch / max(warmup_epochs - 1, 1)


def scaled(logits: Tensor, temperature: Temperature) -> Tensor:
    """logits / temperature, fp32 or wider."""
    return wide(logits) / temperature


def teacher_probabilities(logits: Tensor, temperature: Temperature, center: Tensor | float = 0.0) -> Tensor:
    """Centred and sharpened: q = softmax((t - c) / tau_t).  logits: [R, O], center: [1, O] -> [R, O]."""
    return torch.softmax(scaled(logits - center, temperature), dim=-1)


def entropy(probs: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean entropy of the teacher's distributions [R, O] in nats: 0 or ln O when a run has collapsed.  Detached scalar.

    weights: [R], of a weighted mean; 0 where all of them are 0.
    """
    rows = torch.special.entr(probs.detach()).sum(-1)
    if weights is None:
        return rows.mean()
    return (weights * rows).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


def cross_entropies(student: Tensor, probs: Tensor, temperature: Temperature) -> Tensor:
    """H(q_r, softmax(s_r / tau_s)) of every row.  student, probs: [R, O] -> [R]."""
    s = scaled(student, temperature)
    return s.logsumexp(-1) - (probs * s).sum(-1)


def matched_loss(student: Tensor, probs: Tensor, temperature: Temperature) -> Tensor:
    """Mean over rows of H(q_r, softmax(s_r / tau_s)).  student, probs: [R, O] -> scalar.

    SCFS's local stage loss: row r of the student is a local crop, row r of the teacher what was searched for it.
    """
    return cross_entropies(student, probs, temperature).mean()


def masked_loss(student: Tensor, probs: Tensor, weights: Tensor, temperature: Temperature) -> Tensor:
    """sum_r w_r H(q_r, softmax(s_r / tau_s)): iBOT's patch loss over masked patches r.  student, probs: [R, O], weights: [R] -> scalar."""
    return (weights * cross_entropies(student, probs, temperature)).sum()  # autocast would take 16 bits for a product of vectors


def patch_weights(masks: Tensor, patches: Tensor) -> Tensor:
    """What the listed patches count in a mean over the hidden ones of a crop, then over crops: 1 / (hidden in the crop x crops).

    masks: bool [C, N]; patches: int64 [R], numbers in [C N], or -1 -> [R]; 0 for -1 and for patches that are not hidden.  A crop
    without hidden patches adds nothing but stays in the mean.  float64: 1 / n has to be exact in double runs; R is small.
    """
    crops, n = masks.shape
    at = patches.clamp(min=0)
    counted = (patches >= 0) & masks.flatten()[at]
    return counted.double() / (crops * masks.sum(1).clamp(min=1)[at // n])


def dino_loss(student_global: Tensor, student_local: Tensor | None, probs: Tensor, temperature: Temperature) -> Tensor:
    """Mean of H(q_i, softmax(s_v / tau_s)) over the global crops i of the teacher and all other crops v != i of the student.

    student_global: [2B, O], student_local: [K B, O] or None, probs: [2B, O] -> scalar, a mean of 2 (K + 1) cross-entropies.
    Without local crops it is SCFS's global stage loss.

    q_i sums to 1, so H(q_i, softmax(z_v)) = lse(z_v) - q_i . z_v (methods/dino.md 11): one log-sum-exp per crop instead of one
    softmax per pair, and one product with the sum of the others' z per global crop.
    """
    z = scaled(student_global, temperature).unflatten(0, (2, -1))
    q = probs.unflatten(0, (2, -1))
    lse, others, pairs = z.logsumexp(-1).sum(0), z.flip(0), 2
    if student_local is not None:
        z = scaled(student_local, temperature).unflatten(0, (-1, z.shape[1]))
        lse, others, pairs = lse + 2 * z.logsumexp(-1).sum(0), others + z.sum(0), pairs + 2 * z.shape[0]
    return (lse - (q * others).sum((0, 2))).mean() / pairs
