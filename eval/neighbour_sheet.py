"""A contact sheet of nearest neighbours: some queries, each with the images that its features are closest to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from eval.extract import Part
from eval.neighbours import search
from eval.results import together
from fastssl.distributed import Dist
from fastssl.files import whole
from fastssl.pictures import CAPTION, CELL, COLOURS, FRAME, GAP, MARGIN, framed
from loaders.build import EvalLoader
from loaders.geometry import Geometry

QUERIES, NEIGHBOURS = 8, 5
FONT = 12
"""Pixels."""
RIGHT, WRONG, QUERY = (COLOURS.index(colour) for colour in ("#2ca02c", "#d62728", "#7f7f7f"))
"""Frames: the query's class, another class, the query itself."""


def draw(path: Path, bank: Part, query: Part, *, title: str, dist: Dist) -> None:
    """Write the sheet: queries spread evenly over their set, left, then their neighbours with cosines.  Every rank calls it."""
    ids = query.loader.ids
    shown = torch.from_numpy(ids[np.unique(np.linspace(0, len(ids) - 1, QUERIES).round().astype(np.int64))])
    mine = query.bank[torch.isin(query.bank.index, shown.to(query.bank.index.device))]
    near = search(bank.bank, mine, k=NEIGHBOURS, dist=dist)
    rows = dist.gather_objects([t.cpu().numpy() for t in (mine.index, mine.labels, near.index, near.label, near.value)])
    with together(dist, path):
        if dist.is_main:
            columns = [np.concatenate(column) for column in zip(*rows, strict=True)]
            order = columns[0].argsort()
            page = sheet(title, bank.loader, query.loader, *(column[order] for column in columns), dist)
            whole(path, lambda partial: page.save(partial, format="PNG"))


def sheet(
    title: str,
    bank: EvalLoader,
    query: EvalLoader,
    asked: np.ndarray,
    truth: np.ndarray,
    index: np.ndarray,
    label: np.ndarray,
    value: np.ndarray,
    dist: Dist,
) -> Image.Image:
    """asked, truth: sample ids and labels [q]; index, label, value: sample ids, labels and cosines of the neighbours [q, k]."""
    of_bank, of_query = images(bank, index.ravel(), dist), images(query, asked, dist)
    row = 2 * CAPTION + CELL + GAP
    width = 2 * MARGIN + (1 + index.shape[1]) * (CELL + GAP)
    page = Image.new("RGB", (width, 2 * MARGIN + 2 * CAPTION + len(asked) * row), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=FONT)

    def place(column: int, line: int, image: Image.Image, frame: int, captions: Sequence[str]) -> None:
        x, y = MARGIN + column * (CELL + GAP), MARGIN + 2 * CAPTION + line * row
        for i, caption in enumerate(captions):
            draw.text((x, y + i * CAPTION), _cut(caption, font), fill="black" if i == 0 else "#555555", font=font)
        inner = CELL - 2 * FRAME
        page.paste(framed(ImageOps.fit(image, (inner, inner)), CELL, frame), (x, y + 2 * CAPTION))

    draw.text((MARGIN, MARGIN), title, fill="black", font=font)
    draw.text((MARGIN, MARGIN + CAPTION), "query, then its nearest; green: of its class, red: of another", fill="#555555", font=font)
    for i, sample in enumerate(asked):
        place(0, i, of_query[sample], QUERY, (_class(query, truth[i]), f"#{sample}"))
        for j in range(index.shape[1]):
            frame = RIGHT if label[i, j] == truth[i] else WRONG
            place(1 + j, i, of_bank[index[i, j]], frame, (_class(bank, label[i, j]), f"#{index[i, j]}   cosine {value[i, j]:.3f}"))
    return page


def images(loader: EvalLoader, ids: np.ndarray, dist: Dist) -> dict[int, Image.Image]:
    """Whole images by their sample ids, decoded by this rank alone."""
    ids, alone = np.unique(ids), replace(dist, rank=0, world=1)
    out = {}
    for batch in EvalLoader(loader.decoder, Geometry(()), dist=alone, batch=len(ids), prefetch=1, ids=ids):
        pictures = [Image.fromarray(batch.image(i).cpu().clone().numpy()) for i in range(len(batch))]
        out |= dict(zip(batch.index.tolist(), pictures, strict=True))
    return out


def _class(loader: EvalLoader, label: int) -> str:
    return str(loader.classes[label]) if loader.classes else f"class {label}"


def _cut(text: str, font: ImageFont.FreeTypeFont) -> str:
    """`text`, short enough for a column."""
    if font.getlength(text) <= CELL:
        return text
    while text and font.getlength(text + "...") > CELL:
        text = text[:-1]
    return text + "..."
