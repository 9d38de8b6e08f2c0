"""The regression loss of the BYOL family."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cosine_loss(p: Tensor, t: Tensor) -> Tensor:
    """ell(P, T) = 2 - 2/R sum_r <P_r/|P_r|, T_r/|T_r|>: mean squared distance of unit rows (BYOL eq. 2), in [0, 4].

    p, t: [..., D], leading dimensions are rows -> scalar, fp32 or wider.  Norms are floored at 1e-12.
    """
    if p.dtype.itemsize < 4:
        p, t = p.float(), t.float()
    cosine = (F.normalize(p, dim=-1, eps=1e-12) * F.normalize(t, dim=-1, eps=1e-12)).sum(-1)
    return 2 - 2 * cosine.mean()
