"""GPU tests and benchmarks on this machine:  python -m scripts.gpu_check [--beton FILE]   (`make gpu-check`)

Writes one JSON to benchmarks/results, named after the GPU.  Without CUDA it says so and ends with status 0.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

import torch

from convert.imagenet import convert_imagenet
from convert.tiles import write_tiles
from fastssl.checkpoint import versions
from scripts.demo import DATA

RESULTS = Path(__file__).parents[1] / "benchmarks/results"


def gpu_tests(folder: Path) -> dict[str, object]:
    """Outcome of `pytest -m gpu`: counts, and the names of what failed."""
    xml = folder / "gpu.xml"
    subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", f"--junit-xml={xml}"])
    if not xml.is_file():
        return {"tests": 0, "failed": ["pytest wrote no report"]}
    cases = list(ElementTree.parse(xml).iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"tests": len(cases), "skipped": skipped, "failed": failed}


def bench(name: str, folder: Path, *flags: str) -> dict | str:
    out = folder / f"{name}.json"
    done = subprocess.run([sys.executable, "-m", "fastssl.bench", name, *flags, "--out", str(out)])
    return json.loads(out.read_text()) if done.returncode == 0 else f"ended with status {done.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--beton", type=Path, help="images to measure the loader on (default: the demo's tiles, which are small)")
    beton = parser.parse_args().beton
    if not torch.cuda.is_available():
        print("gpu-check: this torch reaches no CUDA device; nothing to check. `make report` says what is missing.")
        return
    if beton is None:
        beton = DATA / "train.beton"
        if not beton.is_file():
            convert_imagenet(write_tiles(DATA / "tiles"), DATA)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tests = gpu_tests(folder)
        benches = {"augment": bench("augment", folder), "loader": bench("loader", folder, "--path", str(beton))}
    device = torch.cuda.get_device_name(0)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "device": device,
        "devices": torch.cuda.device_count(),
        "versions": versions(),
        "tests": tests,
        **benches,
        "beton": str(beton),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"gpu_{re.sub(r'[^a-z0-9]+', '_', device.lower())}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"gpu-check: {tests['tests']} tests, {len(tests['failed'])} failed; {path}")
    sys.exit(bool(tests["failed"]) or any(isinstance(found, str) for found in benches.values()))


if __name__ == "__main__":
    main()
