"""What a bench leaves on disk: a JSON file, and a picture beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from fastssl.files import whole


def write_json(result: dict, path: Path) -> None:
    """The JSON, in a folder that is made if need be; never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole(path, lambda p: p.write_text(json.dumps(result, indent=1) + "\n"))


def write(result: dict, path: Path, save_plot: Callable[[dict, Path], None]) -> None:
    """The JSON, and the plot of the same name."""
    write_json(result, path)
    whole(path.with_suffix(".png"), lambda p: save_plot(result, p))
