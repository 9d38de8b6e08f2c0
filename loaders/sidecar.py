"""A JSON file next to a .beton or a set of shards: what their formats have no room for, and the checksums that notice a change.

Class and sample names, source and options of the conversion; bytes, height, width and CRC-32 of every sample; SHA-256 sums
of the tables it belongs to and of itself.  Per-sample columns are compressed, about 15 bytes a sample (20 MB for ImageNet).
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

VERSION = 2
_KEYS = {"num_samples", "source", "options", "sha256", "classes", "names", "bytes", "height", "width", "crc32"}
_OWN_SUM = "sha256_of_the_rest"


def sidecar_path(beton: Path) -> Path:
    return beton.with_name(beton.name + ".json")


def convert_again(data: Path, source: object = None) -> str:
    """The next step of an error: the command that makes SPLIT.beton or shards (SPLIT.json) anew from what they were made of."""
    folder = Path(source) if isinstance(source, str) and source else Path("DIR")
    root = folder.parent if folder.name == data.stem else folder
    shards = " --format webdataset" if data.suffix == ".json" else ""
    return f"Convert again with: python -m convert.imagenet --source {root} --out {data.parent}{shards} --overwrite"


def sha256(parts: Iterable[np.ndarray | bytes]) -> str:
    """Of contiguous arrays or bytes, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.view(np.uint8) if isinstance(part, np.ndarray) else part)
    return digest.hexdigest()


def _own_sum(content: Mapping) -> str:
    """Of everything in the sidecar but this sum, whatever the white space."""
    return sha256([json.dumps({k: v for k, v in content.items() if k != _OWN_SUM}).encode()])


@dataclass(frozen=True)
class Sidecar:
    """An open sidecar."""

    path: Path
    data: Path
    """What it describes: the .beton, or for shards itself."""
    content: Mapping

    @classmethod
    def load(cls, path: Path, data: Path) -> Sidecar | None:
        """The sidecar of `data` at `path`, or None where there is none.  Raises DataError for one that is damaged."""
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text())
            version, source = content["version"], content.get("source")
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise DataError(f"{path}, with names and checksums, cannot be read ({e}). {convert_again(data)}") from e
        if version != VERSION:
            raise DataError(f"{path} is a sidecar of another version (found {version}, expected {VERSION}). {convert_again(data, source)}")
        if content.get(_OWN_SUM) != _own_sum(content) or _KEYS - content.keys():
            # Its source may be what changed.
            raise DataError(f"{path} is damaged: it is not as it was written. {convert_again(data)}")
        return cls(path, data, content)

    @property
    def again(self) -> str:
        return convert_again(self.data, self.content["source"])

    def check(self, num_samples: int, sums: Mapping[str, str]) -> None:
        """Raise DataError unless the data is what this sidecar was written for."""
        changed = [name for name, value in sums.items() if self.content["sha256"].get(name) != value]
        if self.content["num_samples"] != num_samples:
            changed.append("number of samples")
        if changed:
            if self.path == self.data:
                subject, remedy = f"The set of shards of {self.path} is", ""
            else:
                remedy = f" (If another program wrote {self.data.name} since, delete {self.path.name} instead.)"
                subject = f"{self.data} is"
            raise DataError(
                f"{subject} not as it was written: checksums in {self.path.name} differ for {', '.join(changed)}. {self.again}{remedy}"
            )

    def names(self) -> list[str]:
        return self._unpack("names").decode("utf-8", "surrogateescape").split("\0")

    def column(self, key: str, dtype: str) -> np.ndarray:
        """[N] of a per-sample column."""
        return np.frombuffer(self._unpack(key), dtype)

    def _unpack(self, key: str) -> bytes:
        return zlib.decompress(base64.b64decode(self.content[key]))


def dump(
    file,
    *,
    source: str | None,
    options: Mapping,
    classes: Sequence[str] | None,
    names: Sequence[str],
    sums: Mapping[str, str],
    columns: Mapping[str, np.ndarray],
    **own: object,
) -> None:
    """Write a sidecar to an open binary file.  `columns`: bytes <u4, height and width <u2, crc32 <u4, each [N], and others;
    `own`: what only this kind of data set has."""

    def pack(raw: bytes) -> str:
        return base64.b64encode(zlib.compress(raw)).decode()

    content = {
        "version": VERSION,
        "num_samples": len(names),
        "source": source,
        "options": dict(options),
        "sha256": dict(sums),
        "classes": None if classes is None else list(classes),
        **own,
        "packing": "base64(zlib(x)); names: joined by NUL; bytes, crc32: <u4 each; height, width: <u2 each; label: <i8 each",
        "names": pack("\0".join(names).encode("utf-8", "surrogateescape")),
        **{key: pack(column.tobytes()) for key, column in columns.items()},
    }
    # As it will be read: a tuple among the options comes back as a list.
    content = json.loads(json.dumps(content))
    file.write(json.dumps(content | {_OWN_SUM: _own_sum(content)}, indent=1).encode())
