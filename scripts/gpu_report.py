"""What `make gpu-check` found, for the README:  python -m scripts.gpu_report benchmarks/results/gpu_NAME.json

Prints what was measured as Markdown tables (the step, and training from stored images), and what is derived as another one: projections
to eight GPUs, by the formula that stands above them.  Writes the numbers to NAME_report.json and a plot beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from fastssl.bench.files import write
from fastssl.bench.roof import PEAKS, datasheet
from fastssl.bench.step_report import costs, host_binds, title
from fastssl.methods import build_method
from fastssl.presets import PRESETS

GPUS = 8
BUS = {"V100": 130, "A100": 220, "H100": 400}
"""GB/s: assumed rate of an all-reduce in NVLink's ring of 8 (bytes that a rank sends, over the time)."""
LATENCY_US = 30
"""Assumed for an exchange of SyncBatchNorm's statistics between 8 GPUs: a few KB, which nothing hides."""
IMAGES = 1_281_167
"""Of ImageNet's training set."""
GOALS = {
    "resnet": {"V100": 0.45, "A100": 0.55, "H100": 0.55, "H200": 0.55},
    "vit_small": {"V100": 0.25, "A100": 0.35, "H100": 0.22, "H200": 0.22},
    "vit_base": {"V100": 0.30, "A100": 0.40, "H100": 0.30, "H200": 0.30},
}
"""Share of the memory roof (ResNets) or MFU (ViTs) that we want to reach."""
FORMULA = f"""Projection, not a measurement: {GPUS} GPUs of a kind run at the share of their roof that the measured GPU reached, and hide
nothing of what they exchange:  images/s = {GPUS} x batch / (t r + x + c).  t: measured ms of a step; r: ratio of the datasheets, of
memory rates for ResNets and of dense 16-bit products for transformers; x, gradients: 2 x {GPUS - 1}/{GPUS} x 4 bytes x trained parameters
/ bus, with bus = {", ".join(f"{rate} GB/s ({name})" for name, rate in BUS.items())}, which is assumed; c, SyncBatchNorm: {LATENCY_US} us,
which is assumed, x its exchanges that the measured step left out.  Loading is left out."""


# ------------------------------------------------------------------------------------------------ numbers


def kind(device: str) -> str | None:
    """The datasheet's name of a device; None when it is not listed."""
    peak = datasheet(device)
    return next((name for name, values in PEAKS.items() if peak is not None and name in device), None)


def share(step: dict) -> float | None:
    """What the goals are in: of the memory roof for ResNets, MFU for others."""
    return step["share_of_memory_roof"] if step["memory_roof_ms"] is not None else step["mfu"]


def goal(step: dict) -> float | None:
    name = kind(step["device"])
    return next((goals.get(name) for family, goals in GOALS.items() if step["arch"].startswith(family)), None)


def trained_parameters(preset: str) -> int:
    """Numbers that ranks exchange gradients of."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_method(PRESETS[preset]()).parameters() if p.requires_grad)


def why_not(step: dict) -> str | None:
    """What forbids to project a step; None where nothing does."""
    if datasheet(step["device"]) is None:
        return f"the datasheet of {step['device']} is not listed (fastssl/bench/roof.py)"
    if host_binds(step):
        return f"the device is idle for {step['idle_ms'] / step['step_ms']:.0%} of the step: a host does not scale as a device does"
    if step["samples_left_out"]:
        return "ranks compare or mix samples of each other, which was not measured"
    return None


def projections(step: dict, parameters: int) -> dict[str, float]:
    """Images per second of eight GPUs of each kind; none where `why_not` has a reason."""
    if why_not(step):
        return {}
    here = datasheet(step["device"])
    memory, batch = step["memory_roof_ms"] is not None, step["batch"]
    alone_ms = step["step_ms"] - step["phases_ms"].get("communication", 0.0)
    out = {}
    for name, bus in BUS.items():
        there = PEAKS[name]
        ratio = here.tb_per_s / there.tb_per_s if memory else here.tflop_per_s / there.tflop_per_s
        exchange_ms = 1e3 * 2 * (GPUS - 1) / GPUS * 4 * parameters / (1e9 * bus)
        norms_ms = 1e-3 * LATENCY_US * step["norm_collectives_left_out"]
        out[name] = GPUS * batch / (alone_ms * ratio + exchange_ms + norms_ms) * 1e3
    return out


def derived(result: dict) -> dict:
    """What the tables and the plot show, measured and derived apart."""
    steps = {preset: step for preset, step in result.get("step", {}).items() if isinstance(step, dict)}
    failed = {preset: step for preset, step in result.get("step", {}).items() if isinstance(step, str)}
    parameters = {preset: trained_parameters(preset) for preset in steps}
    return {
        "device": result["device"],
        "date": result["date"],
        "commit": result["versions"]["commit"],
        "torch": result["versions"]["torch"],
        "measured": {preset: {**step, "share": share(step), "goal": goal(step)} for preset, step in steps.items()},
        "not_measured": failed,
        "trained": {preset: train for preset, train in result.get("train", {}).items() if isinstance(train, dict)},
        "images": result.get("beton", ""),
        "projected_images_per_s": {preset: projections(step, parameters[preset]) for preset, step in steps.items()},
        "not_projected": {preset: reason for preset, step in steps.items() if (reason := why_not(step))},
        "trained_parameters": parameters,
        "machine": result["machine"],
    }


# ------------------------------------------------------------------------------------------------ text


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def heading(*cells: str) -> list[str]:
    return [row(*cells), "|" + "---|" * len(cells)]


def tables(d: dict) -> str:
    """Markdown."""
    lines = [
        f"Measured on one {d['device']} (torch {d['torch']}, commit {d['commit'][:10]}, {d['date']}), random images on the device.",
        "; ".join(
            f"{name.replace('_', ' ')} {value:,.0f}" if isinstance(value, float) else f"{name} {value}"
            for name, value in d["machine"].items()
        )
        + ".",
        "One process: BatchNorm takes the statistics of its images, and losses compare those. The last column counts the exchanges of",
        "SyncBatchNorm that this leaves out; + samples: those of other ranks are left out, too.",
        "",
    ]
    columns = ("preset", "images per GPU", "type", "images/s", "ms a step (5 %, 95 %)", "share, goal", "peak GiB")
    lines += heading(*columns, "idle ms", "kernels, waits, graph breaks", "largest costs", "left out")
    for preset, s in d["measured"].items():
        what = "memory roof" if s["memory_roof_ms"] is not None else "MFU"
        reached = "-" if s["share"] is None else f"{s['share']:.0%} of {what}" if what == "memory roof" else f"{s['share']:.0%} MFU"
        wanted = "no goal" if s["goal"] is None else f"{s['goal']:.0%}"
        lines.append(
            row(
                *(f"`{preset}`", s["batch"], s["dtype"], f"{s['images_per_s']:,.0f}"),
                f"{s['step_ms']:.1f} ({s['step_ms_p5']:.1f}, {s['step_ms_p95']:.1f})",
                *(
                    f"{reached}, {wanted}",
                    f"{s['peak_mib'] / 1024:.1f}",
                    f"{s['idle_ms']:.1f}",
                    f"{s['kernels']}, {s['host_syncs']}, {s['graph_breaks']}",
                ),
                costs(s),
                f"{s['norm_collectives_left_out']}" + " + samples" * s["samples_left_out"],
            )
        )
    lines += [f"| `{preset}` | not measured: {why} |" + " |" * 9 for preset, why in d["not_measured"].items()]
    if d["trained"]:
        lines += ["", f"Measured, from {d['images']}, decoding included:", ""]
        lines += heading("preset", "images/s", "without loading", "data stall", "what binds")
    for preset, t in d["trained"].items():
        rates = t["images_per_s"]
        cells = f"{rates['end to end']:,.0f}", f"{rates['augment + step']:,.0f}", f"{t['data_stall']:.0%}", t["binds"]
        lines.append(row(f"`{preset}`", *cells))
    withheld = [f"No projection of `{preset}`: {reason}." for preset, reason in d["not_projected"].items()]
    if not any(d["projected_images_per_s"].values()):
        return "\n".join([*lines, "", *withheld])
    lines += ["", FORMULA, "", *heading("preset", *(f"{GPUS} x {name}: images/s (minutes an epoch)" for name in BUS))]
    for preset, rates in d["projected_images_per_s"].items():
        if rates:
            lines.append(row(f"`{preset}`", *(f"{rate:,.0f} ({IMAGES / rate / 60:.1f})" for rate in rates.values())))
    return "\n".join([*lines, "", *withheld])


# ------------------------------------------------------------------------------------------------ plot


def save_plot(d: dict, path: Path) -> None:
    """Left the measured parts of a step, per image, next to its roof; right the projections, hatched."""
    figure = Figure(figsize=(13, 1.6 + 0.6 * len(d["measured"])), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(d["measured"])
    for y, step in enumerate(d["measured"].values()):
        start, batch = 0.0, step["batch"]
        for i, (part, ms) in enumerate((p, ms) for p, ms in step["phases_ms"].items() if p != "augment"):
            left.barh(y, ms / batch, left=start, color=f"C{i}", label=title(part) if y == 0 else None)
            start += ms / batch
        roof = step["memory_roof_ms"] if step["memory_roof_ms"] is not None else step["compute_roof_ms"]
        left.plot([roof / batch] * 2, [y - 0.4, y + 0.4], color="black", linewidth=2, label="roof" if y == 0 else None)
        for i, (gpu, rate) in enumerate(d["projected_images_per_s"][names[y]].items()):
            right.barh(y + 0.26 * (i - 1), rate, 0.24, color=f"C{i}", hatch="///", alpha=0.6, label=f"{GPUS} x {gpu}" if y == 0 else None)
    for axis in (left, right):
        axis.set_yticks(range(len(names)), names if axis is left else [""] * len(names))
        axis.invert_yaxis()
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)
    left.set_title(f"measured on one {d['device']}: ms per image", fontsize=10)
    right.set_title("projected (not measured): images per second", fontsize=10)
    figure.savefig(path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.gpu_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="what make gpu-check wrote")
    path = parser.parse_args().file
    if not path.is_file():
        sys.exit(f"There is no {path}. `make gpu-check` writes it on a machine with a GPU.")
    d = derived(json.loads(path.read_text()))
    if not d["measured"]:
        sys.exit(f"{path} holds no measured step: python -m scripts.gpu_check --only step")
    write(d, path.with_name(f"{path.stem}_report.json"), save_plot)
    print(tables(d))


if __name__ == "__main__":
    main()
