"""Features of frozen backbones over a data set."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from fastssl.batch import ImageBatch, Views
from fastssl.collectives import rank
from fastssl.config import ConfigError
from fastssl.models.features import Backbone
from fastssl.precision import autocast


@dataclass
class Bank:
    """Features of this rank's n images."""

    features: Tensor
    """float32 [n, D], as the backbone gave them."""
    labels: Tensor | None
    """int64 [n]; None for unlabelled images."""
    index: Tensor
    """int64 [n]: sample ids, unique over all ranks."""

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Tensor | slice) -> Bank:
        labels = None if self.labels is None else self.labels[rows]
        return Bank(self.features[rows], labels, self.index[rows])


def check_kind(backbone: Backbone, kind: str) -> None:
    """ConfigError unless `feature` has such features of this backbone."""
    blocks = getattr(backbone, "blocks", None)  # of ViTs
    last = _last(kind)
    if kind not in ("pooled", "cls", "patches", "cls+patches") and last is None:
        raise ConfigError(
            f"There are no features '{kind}'. Choose pooled, or of ViTs cls, lastN ([CLS] of N blocks), patches, cls+patches."
        )
    if kind != "pooled" and blocks is None:
        raise ConfigError(f"The features '{kind}' are of ViTs, and this backbone is a {type(backbone).__name__}. Choose pooled.")
    if last is not None and not 1 <= last <= len(blocks):
        raise ConfigError(f"The features '{kind}' need {last} blocks, and this ViT has {len(blocks)}. Choose last1 to last{len(blocks)}.")


def feature(backbone: Backbone, x: Tensor, kind: str) -> Tensor:
    """The vectors of images [B, 3, h, w]: [B, width], not normalised.

    pooled        what the backbone pools, [B, D]: ViTs [CLS], the others the mean over positions
    cls           [CLS], [B, D]
    lastN         [CLS] after each of the last N blocks, side by side, [B, N D]
    patches       mean patch token, [B, D]
    cls+patches   [CLS] and mean patch token, interleaved as DINO does, [B, 2 D]
    """
    if kind in ("pooled", "cls"):
        return backbone(x).pooled
    if kind == "patches":
        return backbone(x).tokens.mean(1)
    from fastssl.models.vit import probe_features  # timm takes seconds to load, and ResNets need none of it

    return probe_features(backbone.last_blocks(x, _last(kind) or 1), average=kind == "cls+patches")


def width(backbone: Backbone, kind: str) -> int:
    return backbone.num_features * (_last(kind) or (2 if kind == "cls+patches" else 1))


def _last(kind: str) -> int | None:
    """N of lastN."""
    number = kind.removeprefix("last")
    return int(number) if kind.startswith("last") and number.isdecimal() else None


def extract(
    backbone: Backbone,
    loader: Iterable[ImageBatch],
    augment: Callable[[ImageBatch], Views],
    dtype: torch.dtype,
    *,
    count: int,
    kind: str = "pooled",
    what: str = "features",
) -> Bank:
    """Features of all `count` images of this rank's `loader`.  Further arguments as for `extracted`."""
    device = next(backbone.parameters()).device
    # filled in place: to join the batches at the end would take the memory twice
    features = torch.empty(count, width(backbone, kind), device=device)
    labels, index = (torch.empty(count, dtype=torch.int64, device=device) for _ in range(2))
    start, labelled = 0, True
    for part in extracted(backbone, loader, augment, dtype, kind=kind, what=what):
        rows = slice(start, start + len(part))
        features[rows], index[rows], labelled = part.features, part.index, part.labels is not None
        if labelled:
            labels[rows] = part.labels
        start = rows.stop
    return Bank(features, labels if labelled else None, index)


@torch.no_grad()
def extracted(
    backbone: Backbone,
    loader: Iterable[ImageBatch],
    augment: Callable[[ImageBatch], Views],
    dtype: torch.dtype,
    *,
    kind: str = "pooled",
    what: str = "features",
) -> Iterator[Bank]:
    """Features of one batch of this rank's `loader` after another, by `backbone` in eval mode.

    dtype   autocast type of the forward pass; float32 and float64 run without autocast
    kind    which features, see `feature`
    what    label of the progress bar, which rank 0 shows on a terminal

    The training mode of every submodule is put back afterwards, and no buffer changes: a live network can be passed.
    """
    device = next(backbone.parameters()).device
    modes = {module: module.training for module in backbone.modules()}
    try:
        backbone.eval()
        for batch in _progress(loader, what):
            with autocast(device, dtype):
                (images,) = augment(batch).per_view()
                found = feature(backbone, images, kind).float()
            yield Bank(found, None if batch.label is None else batch.label.clone(), batch.index.clone())
    finally:
        for module, mode in modes.items():
            module.training = mode


class SharedFeatures:
    """Features of whole passes over one data set, in memory, for further evaluations of a frozen backbone on the same crops.

    limit: bytes per rank; passes that would go beyond are not kept.
    """

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self.passes: dict[Hashable, list[Bank]] = {}

    def of(self, key: Hashable, run: Callable[[], Iterable[Bank]]) -> Iterator[Bank]:
        """What `run` gives, batch after batch; kept under `key` once all were taken."""
        if key in self.passes:
            yield from self.passes[key]
            return
        kept, size = [], 0
        for part in run():
            yield part
            size += part.features.nbytes
            if self.size + size <= self.limit:
                kept.append(part)
            else:
                kept.clear()
        if self.size + size <= self.limit:
            self.passes[key], self.size = kept, self.size + size


def _progress(loader: Iterable[ImageBatch], what: str) -> Iterable[ImageBatch]:
    return tqdm(loader, desc=what, unit="batch", leave=False, disable=rank() > 0 or not sys.stderr.isatty())
