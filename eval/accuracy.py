"""Top-1, top-5 and per-class accuracy of one or several classifiers over a labelled set, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import Dist


@dataclass(frozen=True)
class Accuracy:
    """Of K classifiers on the images of all ranks."""

    hits: Tensor
    """int64 [K, C]: images of each class that were recognised."""
    hits5: Tensor
    """int64 [K]: images whose class was among the five highest."""
    images: Tensor
    """int64 [C]: images of each class."""
    loss: list[float]
    """[K]: mean cross-entropy."""

    @property
    def top1(self) -> list[float]:
        """[K], percent."""
        return [100 * int(n) / int(self.images.sum()) for n in self.hits.sum(1)]

    @property
    def top5(self) -> list[float]:
        """[K], percent."""
        return [100 * int(n) / int(self.images.sum()) for n in self.hits5]

    def per_class(self, classifier: int, names: Sequence[str] | None) -> dict[str, float | None]:
        """Top-1 in percent of each class by its name, or else its label; None for a class without images."""
        counts = zip(self.hits[classifier].tolist(), self.images.tolist(), strict=True)
        return {names[c] if names else str(c): 100 * h / n if n else None for c, (h, n) in enumerate(counts)}


def accuracy(scored: Iterable[tuple[Tensor, Tensor]], num_classes: int, dist: Dist) -> Accuracy:
    """Count over batches of this rank's images, (logits, labels) each, and add up the ranks: every rank gets the same.

    logits [B, C] of one classifier or [K, B, C] of several; labels int64 [B] in 0 .. C - 1.  Classes with equal logits rank by
    their label, so a collapsed classifier answers 0; one that is not finite recognises nothing.  ValueError without any image.
    """
    counts: list[Tensor] = []
    for logits, labels in scored:
        logits = logits.unsqueeze(0) if logits.dim() == 2 else logits
        rank = truth_rank(logits, labels)
        loss = F.cross_entropy(
            logits.movedim(0, -1).to(torch.promote_types(logits.dtype, torch.float32)),
            labels[:, None].expand(-1, len(logits)),
            reduction="none",
        )
        classes = F.one_hot(labels, num_classes).double()
        new = [(rank == 0).double() @ classes, (rank < 5).sum(1).double(), classes.sum(0), loss.double().sum(0)]
        counts = [a + b for a, b in zip(counts, new, strict=True)] if counts else new
    shares = [share for share in dist.gather_objects([t.cpu() for t in counts]) if share]
    if not shares:
        raise ValueError("there are no images to classify")
    hits, hits5, images, loss = (torch.stack(parts).sum(0) for parts in zip(*shares, strict=True))
    return Accuracy(hits.long(), hits5.long(), images.long(), (loss / images.sum()).tolist())


NO_RANK = 2**31


def truth_rank(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes are ranked before the true one, equal ones by label.  logits [K, B, C], labels [B] -> int64 [K, B].

    A label that is none of the C classes has no rank: NO_RANK.
    """
    known = labels < logits.shape[2]
    truth = logits.gather(2, torch.where(known, labels, 0).expand(len(logits), -1)[..., None])
    classes = torch.arange(logits.shape[2], device=logits.device)
    behind = (logits < truth) | ((logits == truth) & (classes > labels[:, None]))
    return torch.where(known, logits.shape[2] - 1 - behind.sum(2), NO_RANK)
