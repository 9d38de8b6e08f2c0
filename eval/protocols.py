"""The named settings of evaluations: a number without its protocol's name cannot be compared with anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fastssl.config import ConfigError


def check_crop(crop: int, resize: int) -> None:
    """ConfigError unless a centre crop fits in images whose shorter side is `resize`, pixels."""
    if crop > resize:
        raise ConfigError(f"A centre crop of {crop} does not fit in images resized to {resize}: lower --crop or raise --resize.")


@dataclass(frozen=True, kw_only=True)
class WeightedKNN:
    """Every validation image asks the training set; neighbours vote with weight exp(cosine / temperature).

    Source: Caron et al., ICCV 2021 (DINO), its k-NN evaluation: shorter side 256 bicubic, centre crop 224, L2-normalised
    pooled features, k in {10, 20, 100, 200} of which 20 is the one reported (methods/dino.md, 9.1).  DINO and its followers
    measure the target ("teacher") network, the others the online network.

    knn/dino    as above
    knn/ibot    the same on [CLS] (methods/ibot.md, 10)
    knn/sfrik   the same of the online network; top-5 counts the first k classes where k < 5 (methods/sfrik.md, 10).  STL10: the
                images as they are, --resize 96 --crop 96
    """

    splits: ClassVar[tuple[str, ...]] = ("train", "val")
    name: str = "knn/dino"
    k: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07
    resize: int = 256
    crop: int = 224
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    top5_within_k: bool = False
    """Of fewer than five neighbours no more classes than neighbours are counted."""


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


KNN_PROTOCOLS = {
    p.name: p for p in (WeightedKNN(), WeightedKNN(name="knn/ibot"), WeightedKNN(name="knn/sfrik", top5_within_k=True), LewelMonitor())
}


@dataclass(frozen=True, kw_only=True)
class LogisticRegression:
    """`logreg/sfrik`: a linear classifier on kept features, without augmentation.

    Source: SFRIK's code (methods/sfrik.md, 10): features of bicubic 256 / centre crop 224, not normalised; weight from N(0, 0.01),
    bias 0; SGD with momentum 0.9 and the decay on both, the learning rate not scaled with the batch and on a cosine that is stepped
    once an epoch; order of torch's DistributedSampler with seed 0; the last batch may be smaller.
    """

    name: str = "logreg/sfrik"
    epochs: int = 100
    batch: int = 256
    lr: float = 0.4
    sgd_momentum: float = 0.9
    weight_decay: float = 1e-6
    init_std: float = 0.01
    resize: int = 256
    crop: int = 224
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
