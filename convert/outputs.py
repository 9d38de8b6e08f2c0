"""What is looked at of the files that will be written, before hours of work: what is there already, and whether the disk has room."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from convert.progress import gigabytes, note
from loaders import shards, sidecar
from loaders.errors import DataError


def check_existing(paths: Sequence[Path], overwrite: bool, sources: Collection[Path] = ()) -> list[list[Path]]:
    """Raise DataError for what exists of `paths` (each a SPLIT.beton, or the SPLIT.json of shards), or of the same splits in the
    other format: of both, loaders would open the .beton, whichever is new.

    sources: files that are read; beside them the other format is but a copy.  Returns the files of each split in the other
    format, which go when the new ones are in place (`remove_replaced`).
    """
    taken = [path for path in paths if path.exists() or (path.suffix == ".json" and shards.is_shards(path.parent, path.stem))]
    read = {source.resolve() for source in sources}
    others = [files for path in paths if (files := _in_other_format(path)) and read.isdisjoint(file.resolve() for file in files)]
    if (taken or others) and not overwrite:
        found = [str(path) for path in [*taken, *(files[0] for files in others)]]
        why = " (of a split in both formats loaders open the .beton)" if others else ""
        raise DataError(
            f"{' and '.join(found)} exist{'s' * (len(found) == 1)} already{why}. Add --overwrite, or choose another folder with --out."
        )
    return others


def _in_other_format(path: Path) -> list[Path]:
    """Files of the same split in the format that `path` is not.  Tars without our sidecar are somebody's, and no loader opens them."""
    if path.suffix == ".beton":
        tars, table = shards.find_tars(path.parent, path.stem), shards.sidecar_path(path.parent, path.stem)
        files = [table, *tars, *(tar.with_suffix(".idx") for tar in tars)] if tars else []
    else:
        beton = path.with_suffix(".beton")
        files = [beton, sidecar.sidecar_path(beton)]
    return files if files and files[0].exists() else []


def remove_replaced(splits: Sequence[Sequence[Path]]) -> None:
    """Remove what `check_existing` gave."""
    for files in splits:
        for file in files:
            file.unlink(missing_ok=True)
        note(f"{files[0]} is replaced by the new files and was removed.")


def check_space(needed: int, out: Path, advice: str = "") -> None:
    """Raise DataError where the disk of the folder `out` has no `needed` bytes.  `advice`: what else may help."""
    free = shutil.disk_usage(next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())).free
    if needed > free:
        raise DataError(
            f"This needs about {gigabytes(needed)}, but the disk of {out.absolute()} has {gigabytes(free)} free. Free space, or choose "
            f"another folder with --out{advice}."
        )
