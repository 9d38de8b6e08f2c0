"""The whole path in a few minutes:  make demo [DEMO_DATA=DIR]

Photograph tiles (or a sample of your class folders) -> .beton -> LEWEL, preset lewel_mini, through train.py -> k-NN accuracy of
the random and of the trained backbone -> a table.  Nothing here that cannot be typed by hand: each command is printed first.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path

from convert.tiles import write_tiles
from fastssl.presets import PRESETS
from loaders.class_folders import scan
from loaders.errors import DataError

PRESET = "lewel_mini"
DATA = Path("data/demo")
TRAIN_IMAGES, VAL_IMAGES = 1600, 400
"""About what the tiles have; of larger data a sample of that size is taken, so that the demo stays a matter of minutes."""


def sample(source: Path, out: Path) -> Path:
    """Link images of class folders into OUT/{train,val}/CLASS: train/ and val/ of `source`, or a fifth of each class for val.

    Which images is decided by a hash of their names, with the same share of every class.  Raises DataError when there are none.
    """
    if (source / "train").is_dir():
        if not (source / "val").is_dir():
            raise DataError(
                f"{source} has train/ but no val/. Add val/, or give one tree of class folders: make demo DEMO_DATA={source / 'train'}"
            )
        splits = [(name, source / name, by_class(source / name), limit) for name, limit in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES))]
    else:
        classes = by_class(source)
        val = {c: names[: len(names) // 5] for c, names in classes.items()}
        train = {c: names[len(names) // 5 :] for c, names in classes.items()}
        splits = [("train", source, train, TRAIN_IMAGES), ("val", source, val, VAL_IMAGES)]
    shutil.rmtree(out, ignore_errors=True)
    for split, folder, classes, limit in splits:
        total = sum(map(len, classes.values()))
        for c, names in classes.items():
            keep = names if total <= limit else names[: max(1, len(names) * limit // total)]
            for name in keep:
                link = out / split / c / Path(name).relative_to(c)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to((folder / name).resolve())
    return out


def by_class(folder: Path) -> dict[str, list[str]]:
    """Image paths below `folder` of each class, in the order of their hashes."""
    found, labels, classes = scan(folder)
    files: dict[str, list[str]] = {c: [] for c in classes}
    for name, label in zip(found, labels, strict=True):
        files[classes[label]].append(name)
    return {c: sorted(names, key=lambda n: zlib.crc32(n.encode())) for c, names in files.items()}


def run(title: str, *words: str, quiet: bool = False) -> None:
    """One command of ours; ends the demo with the command's own message and status when it fails."""
    command = [sys.executable, *words]
    print(f"\n--- {title}\n$ {shlex.join(['python', *words])}", flush=True)
    status = subprocess.run(command, stdout=subprocess.DEVNULL if quiet else None).returncode
    if status:
        sys.exit(status if status > 0 else 128 - status)


def free_run_folder() -> Path:
    folder, number = Path("runs/demo"), 2
    while folder.exists():
        folder, number = Path(f"runs/demo-{number}"), number + 1
    return folder


def images_per_second(folder: Path) -> float:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(r["perf/img_per_s"] for r in records if "perf/img_per_s" in r)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--data", type=Path, help="class folders, or train/ and val/ with class folders (default: the photograph tiles)")
    source = parser.parse_args().data
    os.chdir(Path(__file__).parents[1])
    start = time.monotonic()

    if source is None:
        tree, data = write_tiles(DATA / "tiles"), DATA
    else:
        data = DATA.with_name("demo-own")
        tree = sample(source.expanduser(), data / "sample")
    count = {split: sum(1 for p in (tree / split).rglob("*") if p.is_file()) for split in ("train", "val")}
    print(f"{count['train']:,} training and {count['val']:,} validation images in {tree}", flush=True)
    run("convert to .beton, once", "-m", "convert.imagenet", "--source", str(tree), "--out", str(data), "--overwrite")

    # fewer images than the tiles: as many steps, in more epochs
    cfg = PRESETS[PRESET]()
    epochs = max(cfg.train.epochs, cfg.train.epochs * TRAIN_IMAGES // count["train"])
    folder = free_run_folder()
    began = time.monotonic()
    flags = ["--data.path", str(data), "--log.name", folder.name, "--train.epochs", str(epochs)]
    run(f"train LEWEL: {epochs} epochs", "train.py", "--preset", PRESET, *flags)
    minutes = (time.monotonic() - began) / 60

    knn = {}
    size = ["--resize", str(cfg.eval.resize), "--crop", str(cfg.eval.crop)]
    backbones = {"random": f"random:{cfg.model.arch}:{cfg.train.seed}", "trained": str(folder / "checkpoint_last.pt")}
    for name, backbone in backbones.items():
        out = folder / f"knn_{name}.json"
        run(
            f"k-NN of the {name} backbone",
            "-m",
            "eval.knn",
            "--checkpoint",
            backbone,
            "--data",
            str(data),
            *size,
            "--k",
            "20",
            "--out",
            str(out),
            quiet=True,
        )
        knn[name] = json.loads(out.read_text())["knn20_top1"]

    rows = {
        "k-NN top-1, random backbone": f"{knn['random']:.1f} %",
        "k-NN top-1, trained backbone": f"{knn['trained']:.1f} %  ({knn['trained'] - knn['random']:+.1f}; protocol knn/dino, k = 20)",
        "training": f"{images_per_second(folder):.0f} images/s, {minutes:.1f} min",
        "run folder": f"{folder}/",
        "curves": f"{folder / 'curves.png'}",
        "what the network sees": f"{folder / 'views.png'}",
        "whole demo": f"{(time.monotonic() - start) / 60:.1f} min",
    }
    width = max(map(len, rows))
    print(f"\n{'-' * 78}")
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    print(f"{'-' * 78}\nNext: make convert-imagenet IMAGENET=DIR, then torchrun --nproc-per-node 8 train.py --method lewel")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"demo: {error}")
