"""The machine that is measured: its names, one thread of it, the memory that something takes."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import psutil
import torch
from torch.profiler import ProfilerActivity, profile


def cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return found[1].strip() if found else platform.machine()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def described(device: torch.device) -> dict[str, object]:
    """What rates depend on besides the device's name; of a GPU what nvidia-smi tells."""
    found: dict[str, object] = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "ram_gib": psutil.virtual_memory().total / 2**30}
    if device.type == "cpu":
        return found
    return found | smi(device, driver="driver_version", power_limit_w="power.limit", most_sm_mhz="clocks.max.sm")


def clocks(device: torch.device) -> dict[str, object]:
    """MHz and watts at this moment: to be asked while the device is at work.  Empty on a CPU and without nvidia-smi."""
    return smi(device, sm_mhz="clocks.sm", memory_mhz="clocks.mem", power_w="power.draw") if device.type == "cuda" else {}


def smi(device: torch.device, **queries: str) -> dict[str, object]:
    """nvidia-smi's answers to its --query-gpu about a CUDA device, numbers as such; empty where it gives none."""
    uuid = torch.cuda.get_device_properties(device).uuid  # devices may be hidden from torch, not from nvidia-smi
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(queries.values())}", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = dict(zip(queries, line.strip().split(", "), strict=False))
    return {name: value if name == "driver" else _number(value) for name, value in values.items()}


def _number(value: str) -> float | str:
    return float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else value


def slug(device: str) -> str:
    """A device's name as part of a file's."""
    words = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|\d+-core|@.*", " ", device.lower())
    return "_".join(re.findall(r"[a-z0-9]+", words))


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Everything on one core, if the device is a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most that torch's allocator hands out at once while `run` runs, what was there before not counted."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            run()
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    # Bytes: above zero where memory was taken, below where it was given back.
    return max(accumulate(e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"])))
