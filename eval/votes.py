"""What neighbours say: weighted and plain votes, and the accuracies that come of them.  n queries, k neighbours each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from eval.accuracy import truth_rank
from eval.features import Bank
from eval.neighbours import CHUNK, Neighbours, search
from eval.protocols import LewelMonitor
from fastssl.distributed import Dist


def votes(weight: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Sum of the weights [n, k] of each class's neighbours: [n, num_classes].  One neighbour at a time: a fixed order."""
    out = weight.new_zeros(len(weight), num_classes)
    row = torch.arange(len(weight), device=weight.device)
    for j in range(weight.shape[1]):
        out[row, label[:, j]] += weight[:, j]
    return out


def _percent(hits: Sequence[int], count: int, dist: Dist) -> list[float]:
    """Hits per hundred of all ranks' queries."""
    totals = np.sum(dist.gather_objects((*hits, count)), axis=0)
    return [100.0 * int(h) / int(totals[-1]) for h in totals[:-1]]


def knn(
    bank: Bank, query: Bank, *, k: Sequence[int], temperature: float, num_classes: int, dist: Dist, top5_within_k: bool = False
) -> dict[str, float]:
    """Weighted k-NN accuracy (protocol knn/dino) of all ranks' queries against all ranks' banks, in percent.

    Neighbours vote with exp(cosine / temperature).  -> {"knn<k>_top1", "knn<k>_top5"} for every k; a k beyond the size of
    the bank lets the whole bank vote.  top5_within_k: "top-5" is the first min(5, k) classes.  NaN where features are not finite:
    the network diverged.
    """
    names = [f"knn{n}_top{top}" for n in k for top in (1, 5)]
    if not all(dist.gather_objects(bool(bank.features.isfinite().all() and query.features.isfinite().all()))):
        return dict.fromkeys(names, math.nan)
    near = search(bank, query, k=max(k), dist=dist)
    hits = dict.fromkeys(names, 0)
    for value, label, truth in zip(near.value.split(CHUNK), near.label.split(CHUNK), query.labels.split(CHUNK), strict=True):
        weight = torch.exp(value / temperature)
        for n in k:
            (rank,) = truth_rank(votes(weight[:, :n], label[:, :n], num_classes)[None], truth)
            hits[f"knn{n}_top1"] += int((rank < 1).sum())
            hits[f"knn{n}_top5"] += int((rank < (min(5, n) if top5_within_k else 5)).sum())
    return dict(zip(names, _percent(list(hits.values()), len(query), dist), strict=True))


def keep_index(labels: np.ndarray, num_classes: int, fraction: float) -> np.ndarray:
    """Ids of the first `fraction` of each class, class by class, in file order (methods/lewel.md, 11.1).

    labels: int [n] in file order.  A class of c images keeps min(max(1, round(fraction * c)), c), halves rounded to even.
    """
    labels = np.asarray(labels)
    members = [np.flatnonzero(labels == c) for c in range(num_classes)]
    return np.concatenate([ids[: max(1, round(fraction * len(ids)))] for ids in members])


def majority_knn(memory: Bank, queries: Bank, *, k: int, num_classes: int, dist: Dist) -> tuple[Neighbours, Tensor, float]:
    """Nearest by squared L2 distance, one vote each, ties to the smallest label.

    -> neighbours and predictions [n] of this rank's queries, and the top-1 accuracy of all ranks' in percent.
    """
    near = search(memory, queries, k=k, dist=dist, squared_l2=True)
    prediction = votes(torch.ones_like(near.value), near.label, num_classes).argmax(1)
    (accuracy,) = _percent([int((prediction == queries.labels).sum())], len(queries), dist)
    return near, prediction, accuracy


def lewel_monitor(bank: Bank, labels: np.ndarray, *, protocol: LewelMonitor, dist: Dist) -> dict[str, float]:
    """LEWEL's monitor (protocol knn/lewel-monitor) from this rank's features of the validation set.

    labels: those of the whole set in file order.  -> {"knn<k>_top1"} in percent; NaN where features are not finite.
    """
    num_classes = int(np.max(labels)) + 1
    if not all(dist.gather_objects(bool(bank.features.isfinite().all()))):
        return {f"knn{k}_top1": math.nan for k in protocol.k}

    def first(fraction: float) -> Bank:
        return bank[torch.isin(bank.index, torch.as_tensor(keep_index(labels, num_classes, fraction), device=bank.index.device))]

    memory, queries = first(protocol.memory), first(protocol.queries)
    return {f"knn{k}_top1": majority_knn(memory, queries, k=k, num_classes=num_classes, dist=dist)[2] for k in protocol.k}
