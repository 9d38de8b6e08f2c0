"""Files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def whole(path: Path, save: Callable[[Path], object]) -> None:
    """save(a temporary name), then rename it to `path`; nothing is left of a failure."""
    partial = path.with_name(path.name + ".partial")
    try:
        save(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
