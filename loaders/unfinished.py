"""Files that appear complete and together, or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from loaders.errors import DataError


def partial(path: Path) -> Path:
    """Where a file is written until it is complete."""
    return path.with_name(path.name + ".partial")


class Unfinished:
    """A set of files of one folder, written under temporary names.

    `first` stays open and locked until `close`, so that two processes never write the same set.  `close` puts all files in
    place, or removes them and every folder that was made for them.
    """

    def __init__(self, first: Path) -> None:
        self._first = first
        self._files: list[Path] = []
        self._made = [p for p in (first.parent, *first.parent.parents) if not p.exists()]
        try:
            first.parent.mkdir(parents=True, exist_ok=True)
            self.file = self._locked()
        except OSError as e:
            self._remove_folders()
            raise DataError(f"Cannot write {first}: {e.strerror}. Choose another folder.") from e
        self.file.truncate(0)  # what a killed process left
        self._files.append(first)

    def _locked(self) -> BinaryIO:
        """The first file, open and locked."""
        name = partial(self._first)
        while True:
            file = open(os.open(name, os.O_WRONLY | os.O_CREAT, 0o666), "wb", buffering=1 << 20)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                file.close()
                raise DataError(f"Another process is writing {name}. Wait for it, or choose another folder.") from e
            except OSError:
                return file  # a file system without locks
            # Between the two calls another process may have finished, and this would be its file.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(name)):
                    return file
            file.close()

    def create(self, path: Path) -> BinaryIO:
        """Another file of the set, open for writing; `sync` and close it."""
        self._files.append(path)
        return open(partial(path), "wb", buffering=1 << 20)

    @staticmethod
    def sync(file: BinaryIO) -> None:
        """Bring what was written to the disk."""
        file.flush()
        os.fsync(file.fileno())

    def close(self, complete: bool, error: BaseException | None = None, stale: Iterable[Path] = ()) -> None:
        """Put all files in place and remove those of `stale`; if not `complete`, leave everything as it was.

        `error`: what ended the writing; a full disk is raised as a DataError.
        """
        try:
            if complete:
                # Sidecars first: a crash in between leaves a set whose checksums disagree, never one without its checks.
                for path in sorted(self._files, key=lambda p: p.suffix != ".json"):
                    os.replace(partial(path), path)
                    self._files.remove(path)  # the temporary name is free, and may be another process's now
                for path in stale:
                    path.unlink(missing_ok=True)
        finally:
            for path in self._files:
                partial(path).unlink(missing_ok=True)
            with suppress(OSError):
                self.file.close()
            if not complete:
                self._remove_folders()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"The disk of {self._first.parent} is full; {self._first.name} was not written. Free space or choose another folder."
            ) from error

    def _remove_folders(self) -> None:
        for folder in self._made:
            with suppress(OSError):
                folder.rmdir()
