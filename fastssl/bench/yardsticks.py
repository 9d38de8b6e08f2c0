"""The asking side of `stock.py`: a yardstick is a process that is compiled once and measured whenever its turn comes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from fastssl.bench import recipe
from fastssl.bench.clock import Rate

_ROOT = Path(__file__).parents[2]
TITLES = {
    "ffcv": "stock FFCV, a pipeline per view",
    "dali": "stock DALI, file reader",
    "pillow": "torchvision DataLoader + Pillow",
}
DELIVERS = {
    "ffcv": f"decode, crop and resize for each of {recipe.VIEWS}; no colours",
    "dali": f"decode once, crop and resize to {recipe.VIEWS}; no colours",
    "pillow": f"the whole recipe of {recipe.VIEWS}: crops, colours, blur, normalised tensors",
}


class Failed(Exception):
    """The yardstick cannot be measured; says why."""


class Yardstick:
    """One of `stock.LOADERS` on the images of `folder`, with `threads` threads where it has threads of its own."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the process)
        path = os.pathsep.join(p for p in (str(_ROOT), os.environ.get("PYTHONPATH", "")) if p)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fastssl.bench.stock", name, str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},  # what costs CPU time is compared
        )

    def ready(self) -> float:
        """Wait until it is compiled and idle; -> seconds that took.  Raises Failed."""
        return self._answer()["startup_s"]

    def measure(self, seconds: float, workers: int) -> Rate:
        """One measurement; it is idle before and after.  Raises Failed."""
        try:
            self._process.stdin.write(json.dumps({"seconds": seconds, "workers": workers}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise Failed(self._reason()) from error
        return Rate(**self._answer())

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise Failed(self._reason())
        return json.loads(line)

    def _reason(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1] if lines else f"its process ended with status {status}"

    def close(self) -> None:
        """Ends whatever it is at; nothing of it is kept."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def sweep(cores: int) -> list[int]:
    """Worker counts to try: 0, the powers of two below the number of cores, and that number."""
    return sorted({0, cores, *(1 << k for k in range(cores.bit_length()) if 1 << k < cores)})
