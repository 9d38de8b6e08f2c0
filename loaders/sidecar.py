"""FILE.json next to a .beton: what FFCV's format has no room for, and the checksums that notice a changed table.

Class and sample names, source and options of the conversion; bytes, height, width and CRC-32 of every sample; SHA-256 of
header, labels and tables.  One JSON file; per-sample columns are compressed, about 15 bytes a sample (20 MB for ImageNet).
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loaders.errors import DataError

VERSION = 1
_KEYS = {"num_samples", "source", "options", "sha256", "classes", "names", "bytes", "height", "width", "crc32"}


def sidecar_path(beton: Path) -> Path:
    return beton.with_name(beton.name + ".json")


def convert_again(beton: Path, source: object = None) -> str:
    """The next step of an error: the command that makes the .beton anew from the folder it was made of."""
    folder = Path(source) if isinstance(source, str) and source else Path("DIR")
    root = folder.parent if folder.name == beton.stem else folder
    return f"Convert again with: python -m convert.imagenet --source {root} --out {beton.parent} --overwrite"


def checksums(head: Iterable[np.ndarray], labels: Iterable[np.ndarray], tables: Iterable[np.ndarray]) -> dict[str, str]:
    """SHA-256 of each group of contiguous arrays.  The tables hold the labels too; a sum of their own names the culprit."""
    sums = {}
    for name, parts in (("header", head), ("labels", labels), ("tables", tables)):
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part.view(np.uint8))
        sums[name] = digest.hexdigest()
    return sums


@dataclass(frozen=True)
class Sidecar:
    """An open sidecar."""

    beton: Path
    content: Mapping

    @classmethod
    def load(cls, beton: Path) -> Sidecar | None:
        """The sidecar of a .beton, or None where there is none.  Raises DataError for one that is damaged."""
        path = sidecar_path(beton)
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text())
            version, sums, source = content["version"], content.get("sha256"), content.get("source")
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise DataError(f"{path}, the sidecar of {beton.name}, cannot be read ({e}). {convert_again(beton)}") from e
        if version != VERSION:
            raise DataError(f"{path} is a sidecar of another version (found {version}, expected {VERSION}). {convert_again(beton, source)}")
        if absent := _KEYS - content.keys():
            raise DataError(f"{path} is incomplete: it lacks {', '.join(sorted(absent))}. {convert_again(beton, source)}")
        if not isinstance(sums, dict):
            raise DataError(f"{path} is damaged: its checksums are no table. {convert_again(beton, source)}")
        return cls(beton, content)

    @property
    def again(self) -> str:
        return convert_again(self.beton, self.content["source"])

    def check(self, num_samples: int, sums: Mapping[str, str]) -> None:
        """Raise DataError unless the .beton is the one this sidecar was written for."""
        changed = [name for name, value in sums.items() if self.content["sha256"].get(name) != value]
        if self.content["num_samples"] != num_samples:
            changed.append("number of samples")
        if changed:
            path = sidecar_path(self.beton)
            raise DataError(
                f"{self.beton} is not as it was written: checksums in {path.name} differ for {', '.join(changed)}. {self.again} "
                f"(If another program wrote {self.beton.name} since, delete {path.name} instead.)"
            )

    def names(self) -> list[str]:
        return self._unpack("names").decode("utf-8", "surrogateescape").split("\0")

    def column(self, key: str, dtype: str) -> np.ndarray:
        """[N] of a per-sample column."""
        return np.frombuffer(self._unpack(key), dtype)

    def _unpack(self, key: str) -> bytes:
        try:
            return zlib.decompress(base64.b64decode(self.content[key]))
        except (ValueError, TypeError, zlib.error) as e:
            raise DataError(f"{sidecar_path(self.beton)} is damaged: {key} cannot be unpacked ({e}). {self.again}") from e


def dump(
    file,
    *,
    source: str | None,
    options: Mapping,
    classes: Sequence[str] | None,
    names: Sequence[str],
    sums: Mapping[str, str],
    columns: Mapping[str, np.ndarray],
) -> None:
    """Write a sidecar to an open text file.  `columns`: bytes <u4, height and width <u2, crc32 <u4, each [N]."""

    def pack(raw: bytes) -> str:
        return base64.b64encode(zlib.compress(raw)).decode()

    content = {
        "version": VERSION,
        "num_samples": len(names),
        "source": source,
        "options": dict(options),
        "sha256": dict(sums),
        "classes": None if classes is None else list(classes),
        "packing": "base64(zlib(x)); names: joined by NUL; bytes, crc32: <u4 each; height, width: <u2 each",
        "names": pack("\0".join(names).encode("utf-8", "surrogateescape")),
        **{key: pack(column.tobytes()) for key, column in columns.items()},
    }
    json.dump(content, file, indent=1)
