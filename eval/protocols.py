"""The named settings of evaluations: a number without its protocol's name cannot be compared with anything."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class WeightedKNN:
    """`knn/dino`: every validation image asks the training set; neighbours vote with weight exp(cosine / temperature).

    Source: Caron et al., ICCV 2021 (DINO), its k-NN evaluation: shorter side 256 bicubic, centre crop 224, L2-normalised
    pooled features, k in {10, 20, 100, 200} of which 20 is the one reported (methods/dino.md, 9.1).  DINO and its followers
    measure the target ("teacher") network, the others the online network.
    """

    splits: ClassVar[tuple[str, ...]] = ("train", "val")
    name: str = "knn/dino"
    k: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07
    resize: int = 256
    crop: int = 224
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"


@dataclass(frozen=True, kw_only=True)
class LewelMonitor:
    """`knn/lewel-monitor`: memory and queries both come from the validation set, so queries find themselves.

    Source: the k-NN curve of LEWEL's training code (methods/lewel.md, 11.1): memory = the first 10 % of each class in file
    order, queries = the first 50 %, k = 20 by squared L2 distance of normalised features, plain majority.  Much higher than
    a real k-NN accuracy: for comparing with that code's curves only.
    """

    splits: ClassVar[tuple[str, ...]] = ("val",)
    name: str = "knn/lewel-monitor"
    k: tuple[int, ...] = (20,)
    memory: float = 0.1
    queries: float = 0.5
    resize: int = 256
    crop: int = 224
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


KNN_PROTOCOLS = {p.name: p for p in (WeightedKNN(), LewelMonitor())}


def write_result(path: Path, result: dict) -> None:
    """Write one evaluation's JSON; the file appears under its name only when complete."""
    temporary = path.with_name(path.name + ".partial")
    try:
        temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
