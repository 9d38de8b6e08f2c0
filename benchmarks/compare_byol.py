"""BYOL here and on lightly 1.6, side by side:  python -m benchmarks.compare_byol

Same tiles, ResNet-18, 64 px crops of the same range, batch, head widths, cores.  First images/s: the two take turns, A B A B;
medians, and the ratio within each turn.  Then k-NN at equal wall-clock time: ours runs its preset, theirs gets exactly the
seconds that whole process took.  Prints a table and writes benchmarks/results/compare_byol.json.  Needs .venv-lightly (see
benchmarks/requirements-lightly.txt) and an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from convert.imagenet import convert_imagenet
from convert.tiles import write_tiles
from fastssl.presets import PRESETS

ROOT = Path(__file__).parents[1]
LIGHTLY = ROOT / ".venv-lightly/bin/python"
PRESET = "byol_mini"


def run(*command: object) -> str:
    """stdout of a command; its stderr passes through only when it fails."""
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with status {done.returncode}:\n{done.stderr}")
    return done.stdout


def ours(data: Path, folder: Path, seed: int, *flags: object) -> Path:
    """Train byol_mini without its monitors, which the other side has not; -> run folder."""
    quiet = ["--eval.knn-every-epochs", 0, "--log.pictures", False, "--log.dir", folder, "--log.name", "ours"]
    run(sys.executable, "train.py", "--preset", PRESET, "--data.path", data, "--train.seed", seed, *quiet, *flags)
    return folder / "ours"


def our_rate(folder: Path) -> float:
    """Images/s after the first record, which holds the warm-up."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [r["perf/step_ms"] for r in records if "perf/step_ms" in r][1:]
    return 1000 * PRESETS[PRESET]().train.global_batch_size / statistics.mean(steps)


def theirs(tiles: Path, workers: int, seed: int, *flags: object) -> dict:
    """-> the last record of lightly_byol.py."""
    cfg = PRESETS[PRESET]()
    same = [
        "--batch",
        cfg.train.global_batch_size,
        "--size",
        cfg.views[0].crop.size,
        "--hidden",
        cfg.method.hidden,
        "--dim",
        cfg.method.dim,
    ]
    script = ROOT / "benchmarks/lightly_byol.py"
    return json.loads(run(LIGHTLY, script, "--data", tiles / "train", "--workers", workers, "--seed", seed, *same, *flags).splitlines()[-1])


def knn(checkpoint: object, data: Path, folder: Path) -> float:
    """knn20_top1, percent, with the preset's evaluation size."""
    e, out = PRESETS[PRESET]().eval, folder / "knn.json"
    run(sys.executable, "-m", "eval.knn", "--checkpoint", checkpoint, "--data", data, "--resize", e.resize, "--crop", e.crop, "--out", out)
    return json.loads(out.read_text())["knn20_top1"]


def compare_rates(data: Path, tiles: Path, workers: int, rounds: int, images: int) -> dict:
    steps = images // PRESETS[PRESET]().train.global_batch_size
    rates: dict[str, list[float]] = {"ours": [], "ours_fp32": [], "lightly": []}
    for number in range(rounds):
        for name, dtype in (("ours", "auto"), ("ours_fp32", "fp32")):
            with tempfile.TemporaryDirectory() as folder:
                flags = ("--train.max-steps", steps, "--efficiency.dtype", dtype)
                rates[name].append(our_rate(ours(data, Path(folder), 0, *flags)))
        rates["lightly"].append(theirs(tiles, workers, 0, "--images", images)["img_per_s"])
        print(f"turn {number + 1}: " + ", ".join(f"{name} {r[-1]:.1f}" for name, r in rates.items()) + " images/s", flush=True)
    return rates


def median_ratio(rates: dict, name: str) -> float:
    """Of the turns' ratios: the machine's drift hits both sides of a turn."""
    return statistics.median(a / b for a, b in zip(rates[name], rates["lightly"], strict=True))


def compare_knn(data: Path, tiles: Path, workers: int, seed: int, lr: float) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.monotonic()
        run_folder = ours(data, folder, seed)
        seconds = time.monotonic() - start
        backbone = folder / "lightly.safetensors"
        record = theirs(tiles, workers, seed, "--wall-clock", seconds, "--lr", lr, "--out", backbone)
        result = {
            "seed": seed,
            "seconds": seconds,
            "random": knn(f"random:{PRESETS[PRESET]().model.arch}:{seed}", data, folder),
            "ours": knn(run_folder / "checkpoint_last.pt", data, folder),
            "lightly": knn(backbone, data, folder),
            "lightly_images": record["images"],
        }
    print(f"seed {seed}: {result}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of the rate comparison")
    parser.add_argument("--images", type=int, default=3200, help="images per turn and side")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="seeds of the k-NN comparison; none: rates only")
    parser.add_argument("--lr", type=float, default=1.0, help="of lightly's SGD: the best here of 0.06 (its documentation's), 0.3 and 1.0")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/compare_byol.json")
    args = parser.parse_args()
    if not LIGHTLY.exists():
        sys.exit(
            "benchmarks: .venv-lightly is missing. Build it with: uv venv .venv-lightly && "
            "uv pip install --python .venv-lightly/bin/python -r benchmarks/requirements-lightly.txt"
        )
    tiles, data = write_tiles(ROOT / "data/demo/tiles"), ROOT / "data/demo"
    if not (data / "train.beton").exists():
        convert_imagenet(tiles, data)

    probe = {workers: theirs(tiles, workers, 0, "--images", 960)["img_per_s"] for workers in (0, 1, 2)}
    workers = max(probe, key=probe.__getitem__)
    print(f"lightly with 0, 1, 2 workers: {', '.join(f'{r:.1f}' for r in probe.values())} images/s; taking {workers}", flush=True)
    rates = compare_rates(data, tiles, workers, args.rounds, args.images)
    points = [compare_knn(data, tiles, workers, seed, args.lr) for seed in args.seeds]

    cores = len(os.sched_getaffinity(0))
    result = {"cores": cores, "lightly_workers": probe, "lightly_lr": args.lr, "rates": rates, "knn": points}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n| BYOL, ResNet-18, 64 px, {cores} cores | fastssl | lightly 1.6 | |\n|---|---|---|---|")
    theirs_median = statistics.median(rates["lightly"])
    for name, dtype in (("ours", "bf16 against its fp32"), ("ours_fp32", "both fp32")):
        figure = f"{statistics.median(rates[name]):.0f} | {theirs_median:.0f} | x {median_ratio(rates, name):.2f}"
        print(f"| images/s, {dtype}, median of {args.rounds} | {figure} |")
    for p in points:
        left = f"k-NN after {p['seconds']:.0f} s, seed {p['seed']} (random {p['random']:.1f})"
        print(f"| {left} | {p['ours']:.1f} | {p['lightly']:.1f} | {p['ours'] - p['lightly']:+.1f} |")
    if points:
        means = [statistics.mean(p[side] for p in points) for side in ("ours", "lightly")]
        print(f"| k-NN, mean of {len(points)} seeds | {means[0]:.1f} | {means[1]:.1f} | {means[0] - means[1]:+.1f} |")
    print(f"\n{args.out}")


if __name__ == "__main__":
    main()
