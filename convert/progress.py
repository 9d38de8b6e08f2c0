"""How far a long conversion is: one bar on a terminal, a plain line every ten seconds elsewhere (logs, Slurm)."""

from __future__ import annotations

import sys
import time
from datetime import timedelta


def note(text: str) -> None:
    """A remark for the user, apart from results: standard error."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def gigabytes(size: float) -> str:
    """Bytes as people read them: MB below one GB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


class Progress:
    """Counts images towards `total`; shows rate, time left and a remark."""

    def __init__(self, label: str, total: int, *, every: float = 10.0) -> None:
        self._label, self._total, self._every = label, total, every
        self._done, self._start = 0, time.monotonic()
        self._next_line = self._start + every
        self._bar = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, desc=self._label, unit="img", dynamic_ncols=True, mininterval=0.5)
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, remark: str = "") -> None:
        """One more image is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(remark, refresh=False)
            self._bar.update()
        elif (now := time.monotonic()) >= self._next_line:
            self._next_line = now + self._every
            print(self._line(now - self._start, remark), file=sys.stderr, flush=True)

    def _line(self, seconds: float, remark: str) -> str:
        rate = self._done / seconds
        left = timedelta(seconds=round((self._total - self._done) / rate))
        parts = (
            f"{self._label} {self._done:,} / {self._total:,} images ({100 * self._done / self._total:.1f} %)",
            f"{rate:,.0f} img/s",
            f"{left} left",
            remark,
        )
        return " | ".join(part for part in parts if part)
