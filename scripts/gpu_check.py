"""GPU tests and benchmarks on this machine:  python -m scripts.gpu_check [--only tests step ...]   (`make gpu-check`)

Everything goes into one JSON in benchmarks/results, named after the GPU; parts that are measured again replace what it held, so that
they can be run one at a time.  `python -m scripts.gpu_report FILE` makes tables and a plot of it.  Without CUDA it says what it
skipped and ends with status 0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

import torch

from convert.imagenet import convert_imagenet
from convert.tiles import write_tiles
from fastssl.bench.files import write_json
from fastssl.bench.machine import described, slug
from fastssl.checkpoint import versions
from fastssl.presets import PRESETS
from scripts.demo import DATA

RESULTS = Path(__file__).parents[1] / "benchmarks/results"
PARTS = ("tests", "augment", "loader", "step", "train")
MEASURED = ("lewel_b_eman_r50_200ep", "scfs_r50_200ep", "sere_vits16_100ep", "sfrik_r50_200ep", "w2ssl_r50_200ep_bs1024")
"""The five methods as published; step and train take the published images per GPU, transformers with CUDA graphs."""


def gpu_tests(folder: Path) -> dict[str, object]:
    """Outcome of `pytest -m gpu`: counts, and the names of what failed."""
    xml = folder / "gpu.xml"
    subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", f"--junit-xml={xml}"])
    if not xml.is_file():
        return {"tests": 0, "skipped": 0, "failed": ["pytest wrote no report"]}
    cases = list(ElementTree.parse(xml).iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"tests": len(cases), "skipped": skipped, "failed": failed}


def bench(name: str, folder: Path, *flags: str) -> dict | str:
    """What `python -m fastssl.bench NAME` wrote, or how it failed."""
    out = folder / f"{name}.json"
    done = subprocess.run([sys.executable, "-m", "fastssl.bench", name, *flags, "--out", str(out)])
    return json.loads(out.read_text()) if done.returncode == 0 else f"ended with status {done.returncode}"


def measured(part: str, folder: Path, presets: list[str], beton: Path, *flags: str) -> dict | str:
    """Of `step`, which takes `flags`, and `train` by preset; launched one by one, the kernels of a transformer wait for the host."""
    if part == "tests":
        return gpu_tests(folder)
    if part == "augment":
        return bench("augment", folder)
    if part == "loader":
        return bench("loader", folder, "--path", str(beton))
    more = ("--path", str(beton)) if part == "train" else flags
    return {preset: bench(part, folder, "--preset", preset, *more, *graphs(preset)) for preset in presets}


def graphs(preset: str) -> list[str]:
    return [] if PRESETS[preset]().model.arch.startswith("resnet") else ["--cuda-graphs"]


def failures(part: str, found: dict | str) -> list[str]:
    """One line for each thing of a part that did not work."""
    if isinstance(found, str):
        return [f"{part}: {found}"]
    if part == "tests":
        return [f"tests: {name}" for name in found["failed"]]
    return [f"{part} {name}: {one}" for name, one in found.items() if isinstance(one, str)] if part in ("step", "train") else []


def main() -> None:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=" | ".join(PARTS))
    parser.add_argument("--presets", nargs="+", default=MEASURED, choices=PRESETS, metavar="PRESET", help="of step and train")
    parser.add_argument("--no-parts", action="store_true", help="step: the whole step alone, which halves what is compiled")
    parser.add_argument("--beton", type=Path, help="images for loader and train (default: the demo's tiles, which are small)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: this torch reaches no CUDA device; `make report` says what is missing.  Skipped:")
        for part in args.only:
            print(f"  {part}" + (f" of {', '.join(args.presets)}" if part in ("step", "train") else ""))
        return
    beton = args.beton or DATA / "train.beton"
    if args.beton is None and not beton.is_file():
        convert_imagenet(write_tiles(DATA / "tiles"), DATA)
    device = torch.cuda.get_device_name(0)
    path = RESULTS / f"gpu_{slug(device)}.json"
    result = json.loads(path.read_text()) if path.is_file() else {}
    failed: list[str] = []
    for part in args.only:
        with tempfile.TemporaryDirectory() as folder:
            found = measured(part, Path(folder), args.presets, beton, *["--no-parts"] * args.no_parts)
        failed += failures(part, found)
        if part in ("step", "train"):
            found = result.get(part, {}) | found
        result |= {
            "device": device,
            "devices": torch.cuda.device_count(),
            "machine": described(torch.device("cuda", 0)),
            "versions": versions(),
            "date": time.strftime("%Y-%m-%d"),
            "beton": str(beton),
            part: found,
        }
        write_json(result, path)  # after each part: the last ones take long
    print(f"gpu-check: {', '.join(args.only)} in {path}", *failed, sep="\n  failed: ")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
