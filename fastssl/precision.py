"""Number types: their names, autocast, and what 8 or 11 significant bits are too few for (norms, everything from unit vectors)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def name_of(dtype: torch.dtype) -> str:
    """Its key of DTYPES."""
    return next(name for name, known in DTYPES.items() if known is dtype)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Operations that tolerate it run in `dtype` if it has 16 bits; wider types run as they are."""
    return torch.autocast(device.type, dtype, enabled=dtype.itemsize == 2)


def wide(x: Tensor) -> Tensor:
    """x in fp32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_rows(x: Tensor) -> Tensor:
    """[..., D] -> vectors of length 1, fp32 or wider.  Norms are floored at 1e-12."""
    return F.normalize(wide(x), dim=-1, eps=1e-12)
