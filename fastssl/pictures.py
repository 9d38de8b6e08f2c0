"""What a run looks like: views.png (source images, their boxes, the augmented views) and curves.png (loss, rates, k-NN).

Both are for people: a wrong crop, a colour that is too strong or a loss that does not move is seen at a glance.  Files are
written under a temporary name and renamed, so a viewer never meets half a picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from fastssl.batch import ImageBatch, Views
from fastssl.files import whole
from fastssl.metrics import Record, read_jsonl
from fastssl.views import Photometric, ViewSpec

COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#e377c2", "#8c564b", "#bcbd22", "#7f7f7f")
"""Of the views, in order; more views begin again."""
CELL, GAP, CAPTION, MARGIN, FRAME = 160, 12, 18, 16, 3
"""Pixels of views.png: side of a picture, space between them, height of a caption, border of the page, width of a frame."""

WIDTH_INCHES, MAIN_INCHES, ROW_INCHES, DPI = 12.0, 6.4, 1.9, 100
"""Of curves.png: the page's width, height of its four panels, what a row of terms adds."""
TERMS_PER_ROW = 4
SIDES = {"left": 0.06, "right": 0.94}
MARKERS_UP_TO = 40
"""A line of few points shows them."""
TITLE_ABOVE_EPOCHS = 24
"""Points."""


# ------------------------------------------------------------------------------------------------ views.png


def save_views(batch: ImageBatch, views: Views, spec: ViewSpec, path: Path, samples: int = 6) -> None:
    """One row per sample: the source image with its boxes, then every view in the colour of its box.  Synchronises with the device."""
    count = min(samples, len(batch))
    shown = [(v, denormalise(x[:count], spec[v].photometric)) for v, x in pixels_of_views(views)]
    boxes, flips, index = views.boxes[:count].tolist(), views.flips[:count].tolist(), views.index[:count].tolist()
    sources = [Image.fromarray(batch.image(i).cpu().numpy()) for i in range(count)]
    scales = [CELL / source.height for source in sources]
    # very wide images would make the page mostly empty
    scales = [min(scale, 2 * CELL / source.width) for scale, source in zip(scales, sources, strict=True)]
    source_width = max([CELL, *(round(scale * source.width) for scale, source in zip(scales, sources, strict=True))])

    width = 2 * MARGIN + source_width + len(shown) * (CELL + GAP)
    height = 2 * MARGIN + count * (CELL + CAPTION) + (count - 1) * GAP
    page = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=12)

    for i, (source, scale) in enumerate(zip(sources, scales, strict=True)):
        top = MARGIN + i * (CELL + CAPTION + GAP)
        draw.text((MARGIN, top), f"#{index[i]}   {source.width} x {source.height} px", fill="black", font=font)
        page.paste(with_boxes(source, scale, enumerate(boxes[i])), (MARGIN, top + CAPTION))
        for column, (v, pixels) in enumerate(shown):
            left = MARGIN + source_width + GAP + column * (CELL + GAP)
            caption = f"view {v + 1}   {pixels.shape[1]} px" + ("   flipped" if flips[i][v] else "")
            draw.text((left, top), caption, fill="black", font=font)
            page.paste(framed(picture(pixels[i]), CELL, v), (left, top + CAPTION))
    whole(path, lambda partial: page.save(partial, format="PNG"))


def pixels_of_views(views: Views) -> Iterator[tuple[int, torch.Tensor]]:
    """(view id, [B, 3, s, s]) of every view in the declared order; a view handed out as patches comes once per patch."""
    for group in views.groups:
        yield from zip(group.views, group.pixels.chunk(len(group.views)), strict=True)


def denormalise(x: torch.Tensor, photometric: Photometric) -> torch.Tensor:
    """[n, 3, s, s] normalised -> float32 [n, s, s, 3] on the host, in grey levels: 0..255, not rounded."""
    mean, std = (torch.tensor(t)[:, None, None] for t in (photometric.mean, photometric.std))
    return ((x.float().cpu() * std + mean) * 255).permute(0, 2, 3, 1).contiguous()


def picture(levels: torch.Tensor) -> Image.Image:
    """Grey levels [h, w, 3], any floats -> the nearest 8-bit image."""
    return Image.fromarray(levels.round().clamp(0, 255).byte().numpy())


def framed(image: Image.Image, side: int, v: int) -> Image.Image:
    """The image in a frame of view v's colour, side x side pixels in all."""
    inner = side - 2 * FRAME
    return ImageOps.expand(image.resize((inner, inner), Image.Resampling.BICUBIC), FRAME, fill=COLOURS[v % len(COLOURS)])


def with_boxes(source: Image.Image, scale: float, boxes: Iterable[tuple[int, Sequence[float]]]) -> Image.Image:
    """The source, resized by `scale`, with outlines.  boxes: view id (its colour); top, left, height, width in source pixels."""
    size = max(1, round(scale * source.width)), max(1, round(scale * source.height))
    resized = source.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(resized)
    for v, (top, left, height, width) in boxes:
        x0, y0 = round(scale * left), round(scale * top)
        x1 = min(max(round(scale * (left + width)) - 1, x0 + 1), size[0] - 1)
        y1 = min(max(round(scale * (top + height)) - 1, y0 + 1), size[1] - 1)
        corners = min(x0, x1), min(y0, y1), x1, y1
        draw.rectangle(corners, outline=COLOURS[v % len(COLOURS)], width=2)
    return resized


# ------------------------------------------------------------------------------------------------ curves.png


def save_curves(metrics_jsonl: Path, path: Path) -> None:
    """Loss, learning rate and EMA momentum, k-NN accuracy, images/s, and each term a method logs, over steps and epochs.

    Reads the records of `RunLog`; without a single one nothing is written.
    """
    # here, because loading it takes a second that most commands need not spend
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_jsonl(metrics_jsonl)
    if not records:
        return
    series = _series(records)
    accuracy = {name: line for name, line in series.items() if name.startswith("eval/") and name.endswith("top1")}
    terms = {name: line for name, line in series.items() if name.startswith("train/") and name != "train/loss"}
    # counters of the engine that never left zero say nothing
    terms = {name: line for name, line in terms.items() if any(line[1])}
    rows = math.ceil(len(terms) / TERMS_PER_ROW)

    height = MAIN_INCHES + rows * ROW_INCHES
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DPI)
    FigureCanvasAgg(figure)
    main = figure.add_gridspec(2, 2, **SIDES, top=1 - 0.75 / height, bottom=(rows * ROW_INCHES + 0.55) / height, hspace=0.36, wspace=0.16)
    loss, rate = figure.add_subplot(main[0, 0]), figure.add_subplot(main[0, 1])
    speed = figure.add_subplot(main[1, 1] if accuracy else main[1, :])

    _line(loss, "loss", series.get("train/loss"), COLOURS[1], pad=TITLE_ABOVE_EPOCHS)
    _line(rate, "learning rate", series.get("sched/lr"), COLOURS[3], pad=TITLE_ABOVE_EPOCHS, color=COLOURS[3])
    if "sched/ema" in series:
        rate.tick_params(axis="y", colors=COLOURS[3])
        momentum = rate.twinx()
        _line(momentum, "EMA momentum", series["sched/ema"], COLOURS[4], pad=TITLE_ABOVE_EPOCHS, loc="right", color=COLOURS[4])
        momentum.ticklabel_format(useOffset=False)
        momentum.grid(False)
        momentum.tick_params(axis="y", colors=COLOURS[4])
    _line(speed, "images/s", series.get("perf/img_per_s"), COLOURS[2])
    speed.set_ylim(bottom=0)
    if accuracy:
        knn = figure.add_subplot(main[1, 0])
        for i, (name, line) in enumerate(accuracy.items()):
            knn.plot(*line, color=COLOURS[i % len(COLOURS)], marker="o", markersize=3.5, linewidth=1.2, label=_short(name))
        _style(knn, "k-NN top-1, %")
        knn.legend(fontsize=8, frameon=False)
    if terms:
        columns = min(len(terms), TERMS_PER_ROW)
        small = figure.add_gridspec(
            rows, columns, **SIDES, top=(rows * ROW_INCHES - 0.3) / height, bottom=0.35 / height, hspace=0.55, wspace=0.28
        )
        for i, (name, line) in enumerate(terms.items()):
            _line(figure.add_subplot(small[divmod(i, columns)]), _short(name), line, "#444444", small=True)

    last, per_epoch = max(record["step"] for record in records), _steps_per_epoch(records)
    for ax in figure.axes:
        ax.set_xlim(0, 1.01 * max(last, 1))
    for ax in (loss, rate) if per_epoch else ():
        epochs = ax.secondary_xaxis("top", functions=(lambda step: step / per_epoch, lambda epoch: epoch * per_epoch))
        epochs.tick_params(labelsize=8, colors="#777777")
        epochs.spines["top"].set_color("#bbbbbb")
        epochs.set_xlabel("epoch", fontsize=8, color="#777777")
    whole(path, lambda partial: figure.savefig(partial, format="png"))


def _series(records: list[Record]) -> dict[str, tuple[list[float], list[float]]]:
    """name -> (steps, values), without the values that were not finite (null)."""
    out: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        for name, value in record.items():
            if "/" in name and value is not None:
                steps, values = out.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    return out


def _steps_per_epoch(records: list[Record]) -> float | None:
    known = [record["step"] / record["epoch"] for record in records if record.get("epoch")]
    return known[-1] if known else None


def _short(name: str) -> str:
    return name.partition("/")[2]


def _line(ax, title: str, line: tuple[list[float], list[float]] | None, colour: str, **style) -> None:
    if line:
        ax.plot(*line, color=colour, linewidth=1.2, marker="o" if len(line[0]) <= MARKERS_UP_TO else None, markersize=3)
    _style(ax, title, **style)


def _style(ax, title: str, *, small: bool = False, pad: float = 5, loc: str = "left", color: str = "black") -> None:
    # a given height keeps matplotlib from moving the title above the epochs, one panel higher than the other
    ax.set_title(title, loc=loc, fontsize=8 if small else 10, y=1.0, pad=pad, color=color)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["right", "top"]].set_visible(False)
    ax.tick_params(labelsize=7 if small else 8)
    ax.locator_params(nbins=4 if small else 6)
    if not small:
        ax.set_xlabel("step", fontsize=8)
