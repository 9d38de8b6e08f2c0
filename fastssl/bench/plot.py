"""The loader bench as a picture: rates of every stored form next to their bound, and CPU time per image next to other loaders."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

WARM, COLD, BOUND, OTHERS = "#1f77b4", "#9ecae1", "#7f7f7f", "#d95f0e"
_WIDTH, _ROW, _FRAME, _DPI = 14.0, 0.27, 0.85, 110
"""Inches: of the page, of a bar, of an axis's title and ticks; dots per inch."""

Bar = tuple[str, float, str, str]
"""Label, value, text at its end, colour."""


def save_plot(result: dict, path: Path) -> None:
    """Draw the result of `report.result` as a PNG."""
    rates = [(form, _rates(form)) for form in result["forms"]]
    costs = _costs(result)
    heights = [_FRAME + _ROW * len(bars) for _, bars in rates]
    page = max(sum(heights), _FRAME + _ROW * len(costs)) + 0.9
    figure = Figure(figsize=(_WIDTH, page), dpi=_DPI, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.0, 1.0))
    figure.suptitle(
        f"{result['origin']}: {result['threads']} threads on {result['cores']} cores of {result['cpu']}, "
        f"medians of {result['rounds']} alternating rounds",
        fontsize=11,
    )
    axes = left.subplots(len(rates), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (form, bars) in zip(axes, rates, strict=True):
        draw_bars(axis, bars, f"{form['name']}: source images per second" + (" (share of the bound)" if form["ceiling"] else ""))
    draw_bars(right.subplots(), costs, f"{result['reference']['form']}: CPU ms per source image,\nfor {result['views']} views of it")
    figure.savefig(path, format="png")


def _rates(form: dict) -> list[Bar]:
    bars: list[Bar] = []
    for name, row in form["backends"].items():
        share = row["warm"]["share_of_ceiling"]
        text = f"{row['warm']['images_per_s']:,.0f}" + (f"  ({share:.0%})" if share is not None else "")
        bars.append((f"{name}, warm", row["warm"]["images_per_s"], text, WARM))
        if row["cold"]:
            text = f"{row['cold']['images_per_s']:,.0f}  ({row['cold']['megabytes_per_s']:,.0f} MB/s)"
            bars.append((f"{name}, cold", row["cold"]["images_per_s"], text, COLD))
    if form["ceiling"]:
        rate = form["ceiling"]["images_per_s"]
        bars.append((form["ceiling"]["what"], rate, f"{rate:,.0f}", BOUND))
    return bars


def _costs(result: dict) -> list[Bar]:
    form = next(f for f in result["forms"] if f["name"] == result["reference"]["form"])
    bars: list[Bar] = []
    for name, row in form["backends"].items():
        cpu = row["warm"]["cpu_ms_per_image"]
        bars.append((f"fastssl, {name}\n(decoded images and boxes)", cpu, f"{cpu:.2f}", WARM))
    if form["ceiling"]:
        cpu = form["ceiling"]["cpu_ms_per_image"]
        bars.append((form["ceiling"]["what"], cpu, f"{cpu:.2f}", BOUND))
    for row in result["yardsticks"]:
        unit, what = ("workers", "whole recipe") if row["name"] == "pillow" else ("threads", "decode and crop")
        text = f"{row['cpu_ms_per_image']:.2f}  ({row['cpu_time_of_ours']:.1f} x)"
        bars.append((f"{row['title']}\n({what}, {row['workers']} {unit})", row["cpu_ms_per_image"], text, OTHERS))
    return bars


def draw_bars(axis: Axes, bars: list[Bar], title: str) -> None:
    """Horizontal bars, the first one on top."""
    labels, values, texts, colours = zip(*bars, strict=True)
    drawn = axis.barh(range(len(bars)), values, color=colours)
    axis.bar_label(drawn, labels=texts, padding=4, fontsize=9)
    axis.set_yticks(range(len(bars)), labels, fontsize=9)
    axis.set_ylim(len(bars) - 0.4, -0.6)
    axis.margins(x=0.28)  # room for the texts
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
