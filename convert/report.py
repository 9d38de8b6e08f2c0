"""What a conversion did with every image: short for the terminal, complete in OUT/conversion_report.json."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from convert.progress import gigabytes
from convert.sources import Split
from loaders.errors import DataError

FILE = "conversion_report.json"
_LISTED = 3


@dataclass(frozen=True, kw_only=True)
class Report:
    """One split."""

    split: Split
    path: Path
    """The .beton, or the NAME.json of shards."""
    images: int
    per_class: Mapping[str, int] | None
    """Images by class name; None without labels."""
    kept: int
    """Images stored with their original bytes."""
    re_encoded: int
    """Images stored as JPEGs of ours."""
    raw: int
    """Images stored as pixels; kept, re-encoded and raw ones add up to `images`."""
    resized: int
    """Images stored smaller than they were."""
    skipped: Sequence[tuple[str, str]]
    """Names and reasons of what --on-bad skip left out."""
    bytes: int
    seconds: float

    @property
    def classes(self) -> int:
        """Classes with images."""
        return sum(count > 0 for count in (self.per_class or {}).values())

    def spread(self) -> tuple[int, float, int]:
        """Fewest, median and most images of a class."""
        counts = self.per_class.values()
        return min(counts), statistics.median(counts), max(counts)

    def __str__(self) -> str:
        done = {"kept": self.kept, "re-encoded": self.re_encoded, "raw": self.raw, "resized": self.resized}
        parts = [
            f"{self.images:,} images " + (f"of {self.classes:,} classes" if self.per_class else "without labels"),
            gigabytes(self.bytes),
            f"in {timedelta(seconds=round(self.seconds))} ({self.images / self.seconds:,.0f} images/s)",
        ]
        if self.per_class:
            fewest, median, most = self.spread()
            parts.append(f"{fewest:,} to {most:,} images a class (median {median:,g})")
        parts.append(", ".join(f"{count:,} {what}" for what, count in done.items() if count))
        text = f"{self.path}: {', '.join(parts)}"
        if self.skipped:
            shown = "; ".join(f"{name} ({reason})" for name, reason in self.skipped[:_LISTED])
            text += f"; {len(self.skipped):,} skipped: {shown}{'; ...' if len(self.skipped) > _LISTED else ''}"
        return text

    def as_json(self) -> dict[str, object]:
        fewest, median, most = self.spread() if self.per_class else (None, None, None)
        return {
            "path": str(self.path),
            "images": self.images,
            "per_class": self.per_class and {"min": fewest, "median": median, "max": most, "counts": dict(self.per_class)},
            "kept": self.kept,
            "re_encoded": self.re_encoded,
            "raw": self.raw,
            "resized": self.resized,
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
            "bytes": self.bytes,
            "seconds": round(self.seconds, 1),
        }


def write(folder: Path, source: Path, options: Mapping[str, object], reports: Sequence[Report]) -> Path:
    """Put FOLDER/conversion_report.json in place at once; returns its path."""
    path = folder / FILE
    content = {"source": str(source.absolute()), "options": dict(options), "splits": {r.split: r.as_json() for r in reports}}
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w") as f:
            json.dump(content, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except OSError as e:
        raise DataError(f"The data is complete, but {path} cannot be written: {e.strerror}. Free space; the data can be used.") from e
    finally:
        partial.unlink(missing_ok=True)
    return path
