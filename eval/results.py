"""What evaluations write: numbers with everything that differs from their protocol, and files that are whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

from fastssl.checkpoint import CheckpointError
from fastssl.config import ConfigError
from fastssl.distributed import Dist
from fastssl.files import whole
from loaders.errors import DataError

FOLLOWS = ("milestones", "warmup_epochs", "k")
"""Settings of protocols that are not named where they differ: they follow from the epochs, or stand beside each number."""


def run_as(protocol: object, published: object, *, without: Sequence[str] = (), **more: object) -> str:
    """The protocol's name and everything that differs: "linear/dino, 5 of 100 epochs, crop 64 instead of 224, subset first:20".

    published   the same protocol with its published settings
    without     further settings not to compare
    more        what no protocol sets; empty ones are left out
    """
    parts = [protocol.name]
    for name in (f.name for f in fields(protocol) if f.name not in (*FOLLOWS, *without)):
        ours, theirs = getattr(protocol, name), getattr(published, name)
        if ours != theirs:
            parts.append(f"{ours} of {theirs} epochs" if name == "epochs" else f"{name} {ours} instead of {theirs or 'none'}")
    return ", ".join([*parts, *(f"{name} {value}" for name, value in more.items() if value)])


def table_line(origin: Mapping[str, object], protocol: str, number: str) -> str:
    """A line for a table of results in Markdown: what was evaluated, the protocol, the number."""
    what = " ".join(str(origin[name]) for name in ("method", "arch", "network") if origin[name] is not None)
    step = "" if origin["step"] is None else f", step {origin['step']}"
    return f"| {what}{step} | {protocol} | {number} |"


# ------------------------------------------------------------------------------------------------ files


def beside(checkpoint: str, *parts: str) -> Path | None:
    """CHECKPOINT without its suffix, then the parts that are not empty, joined by dots; None for a random backbone."""
    if checkpoint.startswith("random:"):
        return None
    path = Path(checkpoint)
    return path.with_name(".".join([path.stem, *(p.replace("/", "-").replace(":", "-") for p in parts if p)]))


def data_name(data: str) -> str:
    """What names a data set in a file's name."""
    return Path(data).resolve().name


def result_path(checkpoint: str, out: Path | None, protocol: str, network: str, data: str, *parts: str, seed: int = 0) -> Path | None:
    """`out`, or CHECKPOINT.PROTOCOL.NETWORK.DATA[.PARTS][.seedN].json; None for a random backbone.  ConfigError where nothing can be
    written."""
    named = beside(checkpoint, protocol, network, data_name(data), *parts, f"seed{seed}" if seed else "")
    if out is None and named is not None:
        out = named.with_name(named.name + ".json")
    if out is not None:
        check_writable(out)
    return out


def side_file(out: Path, kind: str) -> Path:
    """What lies beside the result OUT.json: OUT.KIND.pt."""
    return out.with_name(f"{out.name.removesuffix('.json')}.{kind}.pt")


def check_same(out: Path | None, *, data: str, **of: object) -> None:
    """ConfigError when another evaluation's result is at `out`: it and the model beside it would be lost.

    data   where the data are
    of     further entries of the result that say which evaluation it is of; those that the file lacks are not compared
    """
    if out is None or not out.exists():
        return
    try:
        found = dict(json.loads(out.read_text()))
    except (ValueError, TypeError):
        raise ConfigError(f"{out} is there, and no result of an evaluation. Choose another file with --out FILE.json.") from None
    of["data"], found["data"] = (str(Path(folder).resolve()) for folder in (data, found.get("data", data)))
    if different := [n for n in of if found.get(n, of[n]) != of[n]]:
        shown = "; ".join(f"{n} was {found[n]} and is {of[n]}" for n in different)
        raise ConfigError(f"{out} is the result of another evaluation: {shown}. Write elsewhere with --out FILE.json, or move it away.")


def check_writable(out: Path) -> None:
    """ConfigError unless a file can be written there."""
    if out.is_dir():
        raise ConfigError(f"{out} is a folder, and the result a file. Choose one with --out FILE.json.")
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(
            f"The result cannot be written to {out}: its folder is missing or read-only. Choose another with --out FILE.json."
        )


@contextmanager
def together(dist: Dist, path: Path) -> Iterator[None]:
    """What one rank alone or each rank by itself does, such as writing `path`.  Every rank enters, and leaves after all are done.

    An error that has a message for the user, or a disk that is full, stops every rank with that message.
    """
    failed = None
    try:
        yield
    except OSError as error:
        with suppress(OSError):
            path.with_name(path.name + ".partial").unlink()
        failed = ConfigError(f"{path} cannot be written ({error}). Free some space, or choose another place.")
    except (CheckpointError, ConfigError, DataError) as error:
        failed = error
    for error in dist.gather_objects(failed):
        if error is not None:
            raise error


def write_result(path: Path, result: dict) -> None:
    """Write one evaluation's JSON; the file appears under its name only when complete."""
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    whole(path, lambda partial: partial.write_text(text))


def publish(result: dict, lines: Sequence[str], out: Path | None, dist: Dist, *, trained: bool = False) -> None:
    """Write the result to `out` (None: nowhere) and print the lines, on rank 0: the other ranks' arguments are not looked at.

    trained: by an evaluation that can be continued.  What that needs is removed, now that the result is there
    """
    if out is not None:
        with together(dist, out):
            if dist.is_main:
                write_result(out, result)
                if trained:
                    side_file(out, "state").unlink(missing_ok=True)
    if dist.is_main:
        print(*lines, *([f"written to {out}"] if out is not None else []), sep="\n")
