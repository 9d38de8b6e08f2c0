"""The augmentation bench as a picture: recipes as bars, operations as points next to the memory floor."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

COLOURS = {
    "triton": "#1f77b4",
    "numba": "#1f77b4",
    "torch": "#9ecae1",
    "pillow": "#d95f0e",
    "torchvision": "#31a354",
    "torchvision_batch": "#a1d99b",
    "kornia": "#756bb1",
    "dali": "#e7298a",
}
FLOOR = "#7f7f7f"
_WIDTH, _ROW, _FRAME, _DPI = 14.0, 0.27, 0.85, 110
"""Inches: of the page, of a bar, of an axis's title and ticks; dots per inch."""


def save_plot(result: dict, path: Path) -> None:
    """Draw the result of `augment_report.result` as a PNG."""
    recipes = [row for row in result["rows"] if row["kind"] == "recipe"]
    operations = [row for row in result["rows"] if row["kind"] == "operation"]
    heights = [_FRAME + _ROW * (len(row["results"]) + 1) for row in recipes]
    page = max(sum(heights), _FRAME + 2 * _ROW * len(operations)) + 0.9
    figure = Figure(figsize=(_WIDTH, page), dpi=_DPI, layout="constrained")
    unit = "CPU ms (1 thread)" if result["device_type"] == "cpu" else "ms"
    figure.suptitle(
        f"Augmentation on {result['device']}: {unit} per 512 views, {result['dtype']}, medians of {result['rounds']} alternating rounds",
        fontsize=11,
    )
    left, right = figure.subfigures(1, 2, width_ratios=(1.0, 1.0))
    if recipes:
        axes = left.subplots(len(recipes), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axis, row in zip(axes, recipes, strict=True):
            _bars(axis, row, result["titles"])
    if operations:
        _points(right.subplots(), operations, result["titles"])
    figure.savefig(path, format="png")


def _bars(axis: Axes, row: dict, titles: dict[str, str]) -> None:
    labels, values, texts, colours = [], [], [], []
    for name, one in row["results"].items():
        labels.append(titles[name])
        values.append(one["ms_per_512_views"])
        ratio = "" if name == next(iter(row["results"])) else f"  ({one['time_over_ours']:.1f} x)"
        texts.append(f"{one['ms_per_512_views']:,.1f}{ratio}")
        colours.append(COLOURS[name])
    floor = row["floor_ms_per_512_views"]
    drawn = axis.barh(range(len(labels) + 1), [*values, floor], color=[*colours, FLOOR])
    axis.bar_label(drawn, labels=[*texts, f"{floor:,.2f}"], padding=4, fontsize=9)
    axis.set_yticks(range(len(labels) + 1), [*labels, "memory floor"], fontsize=9)
    axis.set_ylim(len(labels) + 0.6, -0.6)
    axis.margins(x=0.28)  # room for the texts
    _finish(axis, f"{row['name']}: {row['sizes']}")


def _points(axis: Axes, rows: list[dict], titles: dict[str, str]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row["results"]))
    for name in names:
        found = {y: row["results"][name] for y, row in enumerate(rows) if name in row["results"]}
        # a fused operation can cost nothing that is measurable, and has no rate then
        at = {y: one["ms_per_512_views"] for y, one in found.items() if one["views_per_s"]}
        style = {"marker": "D", "s": 60, "zorder": 3} if name == names[0] else {"marker": "o", "s": 36}
        axis.scatter(at.values(), at.keys(), color=COLOURS[name], label=titles[name], **style)
    floors = [row["floor_ms_per_512_views"] for row in rows]
    axis.scatter(floors, range(len(rows)), color=FLOOR, marker="|", s=220, label="memory floor")
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=9)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3, frameon=False)
    _finish(axis, f"operations, {rows[0]['sizes']} (ours: what a crop takes longer with it)")


def _finish(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
