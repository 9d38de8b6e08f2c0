"""The backbone of a checkpoint for other libraries:  python -m convert.checkpoint runs/dino/checkpoint_last.pt --format timm --out vit.pth

Formats: convert/exports.py.  The file appears under its name only when complete.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from safetensors import SafetensorError

from convert.command import say
from convert.exports import FORMATS, Exported
from fastssl.models.official import left_out
from fastssl.models.weights import CheckpointError, load_backbone

FormatName = Literal["torchvision", "timm", "safetensors", "detectron2", "detectron2-fpn", "mmseg", "mmdet", "huggingface", "onnx"]


@dataclass(frozen=True)
class Args:
    """Export the backbone of a checkpoint, without its heads."""

    checkpoint: Annotated[str, tyro.conf.Positional]
    """A run's checkpoint_last.pt or backbone.safetensors, or weights by torchvision's or timm's names."""
    format: FormatName
    """torchvision, timm, safetensors: weights by name (those of ViTs differ). detectron2: a pickle that C4 and FPN detectors match;
    detectron2-fpn: their own names. mmseg, mmdet: OpenMMLab's backbones. huggingface: a folder that timm opens. onnx: a graph."""
    out: Path
    """File to write (huggingface: folder)."""
    network: Literal["auto", "online", "target"] = "auto"
    """Network of a training checkpoint. auto: the one that its method is evaluated by."""
    overwrite: bool = False
    """Replace what is there."""


def export(args: Args) -> str:
    """Write `args.out`.  Returns what was written and how it is loaded.  CheckpointError, and nothing written, if it cannot be."""
    form = FORMATS[args.format]
    if form.suffixes and args.out.suffix not in form.suffixes:
        raise CheckpointError(f"The format {args.format} is written to {' or '.join(form.suffixes)} files: change --out {args.out}.")
    if args.out.exists() and not args.overwrite:
        raise CheckpointError(f"{args.out} exists already. Add --overwrite, or choose another with --out.")
    if args.out.exists() and args.out.is_dir() != (not form.suffixes):
        raise CheckpointError(f"{args.out} is {'a folder' if args.out.is_dir() else 'a file'}. Choose another with --out.")
    backbone, about = load_backbone(args.checkpoint, network=args.network)
    origin = {key: str(about[key]) for key in ("method", "preset", "step", "network") if about[key] is not None}
    exported = Exported(backbone, about["arch"], origin, **(about["normalisation"] or {}))
    if exported.family not in form.families:
        able = ", ".join(name for name, other in FORMATS.items() if exported.family in other.families)
        what = exported.arch + " with LayerScale" * (exported.family == "scaled_vit")
        raise CheckpointError(f"{args.format} has no network that {what} would fit. Choose one of: {able}.")
    try:
        with _complete(args.out) as partial:
            form.write(exported, partial)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Could not write {args.out}: {error}. Free some space, or choose another place with --out.") from error
    lines = [f"Wrote {args.out}: {exported.arch}, {', '.join(f'{k} {v}' for k, v in origin.items())}."]
    if about["dropped"]:
        lines.append(f"Left out: {left_out(about['dropped'])}.")
    lines.append(f"Load it with: {form.load_line(exported, args.out)}")
    return "\n".join(lines)


@contextmanager
def _complete(out: Path) -> Iterator[Path]:
    """Where to write; moved to `out` at the end, gone after an error.  An existing folder keeps its other files."""
    partial = out.with_name(f"{out.name}.partial")
    _remove(partial)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        for file in partial.iterdir() if partial.is_dir() else [partial]:
            file.chmod(0o666 & ~_umask())  # safetensors lets nobody else read what it writes
        if out.is_dir():
            for file in partial.iterdir():
                file.replace(out / file.name)
        else:
            partial.replace(out)
    finally:
        _remove(partial)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = tyro.cli(Args, prog="python -m convert.checkpoint", args=argv)
    try:
        say(export(args))
    except CheckpointError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
