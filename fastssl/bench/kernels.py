"""What one call launches on a device: how many kernels, of which kinds, and how long they run."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastssl.bench.augment_work import Run

KINDS = {
    # First: Inductor names a kernel after all that is fused in it, which may be the gradient of a convolution.
    "fused reductions (norms, softmax, losses)": r"^triton_(red|per|mix)",
    "fused elementwise": r"^triton_(poi|for)",
    "attention": r"flash|fmha|attention|sdpa",
    "convolutions": r"fprop|dgrad|wgrad|conv",
    "matrix products": r"gemm|nvjet|cutlass|gemv|splitk",
    "optimizer, clipping, EMA": r"multi_tensor|fused_(adam|sgd)|lpnorm|(scale|squares|roots|step)_kernel",
    "communication": r"nccl",
    "copies and fills": r"memcpy|memset|copy|fill",
}
"""Patterns of kernel names, the first that is found (in any case of letters); `_OTHER` is what has none."""
_OTHER = "other"
_LARGEST = 12
"""Kernels that are listed one by one."""


def kind(name: str) -> str:
    """Of a kernel, by its name."""
    return next((k for k, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), _OTHER)


def totals(kernels: Iterable[tuple[str, float]]) -> dict[str, object]:
    """(name, microseconds) of every kernel that ran -> ms by kind, largest first, and of the largest kernels, with their numbers."""
    by_kind: dict[str, float] = {}
    by_name: dict[str, list[float]] = {}
    for name, us in kernels:
        by_kind[kind(name)] = by_kind.get(kind(name), 0.0) + us / 1e3
        by_name.setdefault(name, []).append(us / 1e3)
    largest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:_LARGEST]
    return {
        "kernel_ms": dict(sorted(by_kind.items(), key=lambda item: -item[1])),
        "largest_kernels": [{"name": name, "calls": len(ms), "ms": sum(ms)} for name, ms in largest],
    }


def launches(run: Run, device: torch.device) -> dict[str, object]:
    """Of one call: operators that Python or autograd calls; on CUDA kernels and copies, their times, and how often the host waits."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiled:
        run()
        if cuda:
            torch.cuda.synchronize()
    events = profiled.events()
    operators = [e for e in events if e.name.startswith("aten::") and not (e.cpu_parent and e.cpu_parent.name.startswith("aten::"))]
    counts: dict[str, object] = {"kernels": None, "operators": len(operators), "host_syncs": None}
    if cuda:
        kernels = [(e.name, e.time_range.elapsed_us()) for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        counts |= {"kernels": len(kernels), "host_syncs": synchronisations(run), **totals(kernels)}
    return counts


def synchronisations(run: Run) -> int:
    """How often the host waits for CUDA in one call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Not any warning about synchronisation: the first call of set_sync_debug_mode gives one of its own.
    return sum("called a synchronizing" in str(w.message) for w in caught)
