"""Number types: their names, autocast, and what 8 or 11 significant bits are too few for (norms, everything from unit vectors)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_HAS_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype") and hasattr(torch.ops.aten.bmm, "dtype")
"""Since torch 2.8, on CUDA."""
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


def operand_dtype(x: Tensor) -> torch.dtype:
    """What `product` should take x in: autocast's type where autocast is on, else its own.  fp64 stays."""
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and handed out in fp32 or wider whatever the operands are.  a: [..., R, K], b: [..., K, S], of equal batches."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype.itemsize < 4 and a.is_cuda and _HAS_OUT_DTYPE:
            if a.dim() == 2:
                return torch.mm(a, b, out_dtype=torch.float32)
            return torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32).unflatten(0, a.shape[:-2])
        return torch.matmul(wide(a), wide(b))  # products of 16-bit numbers are exact in fp32


def unit_rows(x: Tensor) -> Tensor:
    """[..., D] -> vectors of length 1, fp32 or wider.  Norms are floored at 1e-12."""
    return F.normalize(wide(x), dim=-1, eps=1e-12)
