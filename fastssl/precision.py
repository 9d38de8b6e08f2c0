"""What 8 or 11 significant bits are too few for: norms, and everything computed from unit vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in fp32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_rows(x: Tensor) -> Tensor:
    """[..., D] -> vectors of length 1, fp32 or wider.  Norms are floored at 1e-12."""
    return F.normalize(wide(x), dim=-1, eps=1e-12)
