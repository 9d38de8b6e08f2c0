"""The step bench as a picture: the parts of a step one after the other, its kernels by kind, and the roofs."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from fastssl.bench.step_report import title

COLOURS = {
    "augment": "#d95f0e",
    "student_forward": "#1f77b4",
    "target_forward": "#9ecae1",
    "heads_and_loss": "#31a354",
    "backward": "#756bb1",
    "communication": "#e7298a",
    "update": "#fdae6b",
    "step": "#756bb1",
}
ROOF = "#7f7f7f"
_SIZE, _DPI = (11.0, 3.8), 110
"""Inches; dots per inch."""


def save_plot(result: dict, path: Path) -> None:
    """Draw the result of `step_report.result` as a PNG."""
    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    axis = figure.subplots()
    left = 0.0
    for part, ms in result["phases_ms"].items():
        if part == "augment":
            axis.barh(1, ms, color=COLOURS[part], label=f"{title(part)} {ms:,.1f}")
        elif ms > 0:
            axis.barh(0, ms, left=left, color=COLOURS[part], label=f"{title(part)} {ms:,.1f}")
            left += ms
    labels = ["step", "augment"]
    if kinds := result.get("kernel_ms"):
        at = 0.0
        for i, (kind, ms) in enumerate(kinds.items()):
            axis.barh(len(labels), ms, left=at, color=f"C{i}", alpha=0.7, label=f"{kind} {ms:,.1f}")
            at += ms
        labels.append("kernels")
    roofs = {"compute": result["compute_roof_ms"], "memory": result["memory_roof_ms"]}
    for name, ms in roofs.items():
        if ms is not None:
            axis.barh(len(labels), ms, color=ROOF)
            axis.text(ms, len(labels), f"  {ms:,.1f}  ({ms / result['step_ms']:.0%} of the step)", va="center", fontsize=9)
            labels.append(f"{name} roof")
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_xlim(0, 1.02 * max(left, result["step_ms"], *(ms or 0 for ms in roofs.values()), result["phases_ms"]["augment"]))
    axis.set_xlabel("CPU ms (1 thread)" if result["device_type"] == "cpu" else "ms")
    axis.legend(fontsize=8 if kinds else 9, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axis.set_title(
        f"{result['preset']} on {result['device']}: {result['batch']} images x ({result['sizes']}), {result['dtype']}, "
        f"{result['images_per_s']:,.1f} images/s",
        fontsize=10,
        loc="left",
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    figure.savefig(path, format="png")
