"""The regression loss of the BYOL family."""

from __future__ import annotations

from torch import Tensor

from fastssl.precision import unit_rows


def cosine_loss(p: Tensor, t: Tensor) -> Tensor:
    """ell(P, T) = 2 - 2/R sum_r <P_r/|P_r|, T_r/|T_r|>: mean squared distance of unit rows (BYOL eq. 2), in [0, 4].

    p, t: [..., D], leading dimensions are rows -> scalar, fp32 or wider.  Norms are floored at 1e-12.
    """
    return 2 - 2 * (unit_rows(p) * unit_rows(t)).sum(-1).mean()
