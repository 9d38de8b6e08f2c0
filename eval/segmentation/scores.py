"""How well predicted label maps agree with the annotated ones (methods/transfer.md 5.5 and 5.7)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fastssl.collectives import total

BETA2 = 0.3
"""Of the F-measure."""


@dataclass
class Scores:
    """What a pass over the images counts; `shared` adds up the ranks' counts.  Labels and predictions: integers of equal shape.

    absent   what a class that neither is nor was predicted counts as in the mean: nothing (mmsegmentation), or zero (ImageNet-S)
    """

    classes: int
    ignore: int
    absent: Literal["nothing", "zero"] = "nothing"
    device: torch.device | str = "cpu"
    confusion: Tensor = field(init=False)
    """int64 [classes, classes]: pixels by label and prediction."""
    f_measures: Tensor = field(init=False)
    """float64 [2]: sum over images of foreground F-measures, and images."""

    def __post_init__(self) -> None:
        self.confusion = torch.zeros(self.classes, self.classes, dtype=torch.int64, device=self.device)
        self.f_measures = torch.zeros(2, dtype=torch.float64, device=self.device)

    def add(self, prediction: Tensor, label: Tensor) -> None:
        """One image."""
        kept = label != self.ignore
        label, prediction = label[kept].long(), prediction[kept].long()
        self.confusion += torch.bincount(label * self.classes + prediction, minlength=self.classes**2).view_as(self.confusion)
        self.f_measures += torch.stack((_f_measure(prediction > 0, label > 0), self.f_measures.new_ones(())))

    def shared(self) -> Scores:
        """Of all ranks; every rank calls it."""
        out = Scores(self.classes, self.ignore, self.absent, self.device)
        out.confusion, out.f_measures = total(self.confusion), total(self.f_measures)
        return out

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """float64 [classes]: pixels of the intersection, of the union, of the label."""
        table = self.confusion.double()
        hit, labelled = table.diagonal(), table.sum(1)
        return hit, labelled + table.sum(0) - hit, labelled

    @property
    def iou(self) -> Tensor:
        """[classes], fractions.  NaN where a class is nowhere, or 0."""
        hit, union, _ = self.parts
        return hit / (union + 1e-10) if self.absent == "zero" else hit / union

    @property
    def accuracy(self) -> Tensor:
        """[classes], fractions of the labelled pixels; NaN where there are none."""
        hit, _, labelled = self.parts
        return hit / labelled

    def result(self) -> dict[str, float | list[float | None]]:
        """mIoU, mAcc and aAcc in percent, and each class's IoU (None: it is nowhere); of ImageNet-S also the F-measure."""
        hit, _, labelled = self.parts
        iou = self.iou
        out = {"mIoU": float(iou.nanmean()), "mAcc": float(self.accuracy.nanmean()), "aAcc": float(hit.sum() / labelled.sum())}
        if self.absent == "zero":
            out["F"] = float(self.f_measures[0] / self.f_measures[1])
        percent = {name: 100 * value for name, value in out.items()}
        return percent | {"iou": [None if v != v else 100 * v for v in iou.tolist()]}


def _f_measure(prediction: Tensor, label: Tensor) -> Tensor:
    """(1 + b) P R / (b P + R) of the foreground of an image, b = 0.3.  bool -> float64."""
    hit = (prediction & label).sum().double()
    precision, recall = hit / (prediction.sum() + 1e-10), hit / (label.sum() + 1e-10)
    return (1 + BETA2) * precision * recall / (BETA2 * precision + recall + 1e-10)
