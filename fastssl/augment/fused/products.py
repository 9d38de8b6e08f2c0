"""Matrix products for crop and blur."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, acc, SPLIT: tl.constexpr, BYTES: tl.constexpr = False):
    """acc + a @ b, to about float32's precision.

    SPLIT: tensor cores multiply 11-bit parts, each factor being the sum of two; the product of the small parts is left out.
    BYTES: b is uint8, which is one part.  Without SPLIT: float32 multiplications.
    """
    if SPLIT:
        large_a, large_b = a.to(tl.float16), b.to(tl.float16)
        acc = tl.dot((a - large_a.to(tl.float32)).to(tl.float16), large_b, acc)
        if not BYTES:
            acc = tl.dot(large_a, (b - large_b.to(tl.float32)).to(tl.float16), acc)
        acc = tl.dot(large_a, large_b, acc)
    else:
        acc = tl.dot(a, b.to(tl.float32), acc, input_precision="ieee")
    return acc
