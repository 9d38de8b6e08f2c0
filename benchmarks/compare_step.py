"""Our training step and a plain one, side by side:  python -m benchmarks.compare_step [--rounds 5]

LEWEL, DINO (2 + 6 crops) and SFRIK of the mini presets; the plain step is `reference_step.py`.  Both start from the same weights and
take turns on the same views, with the same types and threads, round after round; the ratio is taken within a round, and its
median reported.  Times: CPU time on a CPU, between events on CUDA.  Prints a table and writes JSON to benchmarks/results.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from benchmarks.reference_step import REFERENCES, plain_views
from fastssl.bench.augment_clock import samples
from fastssl.bench.files import write_json
from fastssl.bench.machine import device_name, slug
from fastssl.bench.training import one_rank
from fastssl.checkpoint import versions
from fastssl.config import EfficiencyConfig, RunConfig
from fastssl.distributed import Dist
from fastssl.engine import compiles, train_step
from fastssl.presets import PRESETS
from fastssl.recipes import dino

ROOT = Path(__file__).parents[1]
NAMES = ("lewel", "dino", "sfrik")


def mini(name: str) -> RunConfig:
    """The mini preset; DINO's with six local crops."""
    cfg = PRESETS[f"{name}_mini"]()
    return replace(cfg, views=dino(size=64, local_size=32, local_crops=6)) if name == "dino" else cfg


def compare(cfg: RunConfig, device: torch.device, *, batch: int, rounds: int, steps: int) -> dict:
    """Times of both, ms a step."""
    rank = one_rank(cfg, Dist(0, 1, 0, 1, device), batch)
    state, reference, crops = rank.state, REFERENCES[cfg.method.name](cfg), plain_views(rank.views)
    reference.load(state.method)
    theirs_done = 0

    def ours() -> float:
        return train_step(state, [rank.views]).loss

    def theirs() -> float:
        nonlocal theirs_done
        theirs_done += 1
        return reference.step(crops, state.schedules.at(theirs_done - 1), state.dtype)

    losses = {"ours": float(ours()), "reference": float(theirs())}  # also the warm-up
    times: dict[str, list[float]] = {"ours": [], "reference": []}
    ours(), theirs()
    for _ in range(rounds):
        for side, run in (("ours", ours), ("reference", theirs)):
            times[side].append(median(samples(run, device, steps)))
    return {
        "preset": cfg.preset,
        "views": rank.views_per_image,
        "batch": rank.batch,
        "dtype": str(state.dtype).removeprefix("torch."),
        "compiled": compiles(cfg, device),
        "first_loss": losses,
        **{f"{side}_ms": median(values) for side, values in times.items()},
        **{f"{side}_ms_rounds": values for side, values in times.items()},
        "ratio": median(b / a for a, b in zip(times["ours"], times["reference"], strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns that both take")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn; their median counts")
    parser.add_argument("--batch", type=int, default=64, help="images of a step")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--threads", type=int, default=1, help="torch's threads on a CPU")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="autocast type of both")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/compare_step_DEVICE.json")
    args = parser.parse_args()
    if min(args.rounds, args.steps, args.threads) < 1 or args.batch < 2:
        sys.exit("compare_step: --rounds, --steps and --threads must be at least 1, --batch at least 2.")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("compare_step: this torch reaches no CUDA device. Take --device cpu.")
    device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    torch.set_num_threads(args.threads)
    rows = {}
    for name in args.methods:
        cfg = replace(mini(name), efficiency=EfficiencyConfig(dtype=args.dtype))
        rows[name] = compare(cfg, device, batch=args.batch, rounds=args.rounds, steps=args.steps)
        row = rows[name]
        print(f"{name}: {row['ours_ms']:.0f} ms, reference {row['reference_ms']:.0f} ms, x {row['ratio']:.2f}", flush=True)
    result = {
        "command": f"python -m benchmarks.compare_step {' '.join(sys.argv[1:])}".strip(),
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(device),
        "threads": args.threads,
        "rounds": args.rounds,
        "steps": args.steps,
        "rows": rows,
        "versions": {"python": platform.python_version(), **versions()},
    }
    path = args.out or ROOT / f"benchmarks/results/compare_step_{slug(result['device'])}.json"
    write_json(result, path)
    unit = f"CPU, {args.threads} thread{'s' * (args.threads > 1)}" if device.type == "cpu" else "events"
    print(f"\n| full step, ms ({unit}), batch {args.batch} | fastssl | plain reference | |\n|---|---|---|---|")
    for name, row in rows.items():
        what = f"{name}, ResNet-18, {row['views']} views, {row['dtype']}{', compiled' * row['compiled']}"
        print(f"| {what} | {row['ours_ms']:.0f} | {row['reference_ms']:.0f} | x {row['ratio']:.2f} |")
    print(f"\n{path}")


if __name__ == "__main__":
    main()
