"""Exact nearest neighbours of features that stay sharded over ranks.

Queries visit every shard chunk by chunk, each shard answers with its k best, and these are merged.  Features are put on a
grid (see `_grid`) on which dot products have no rounding error: neither the order of a sum nor the shape of a matrix product
shows, so the result is the same for any number of ranks, equal similarities are equal, and ties go to the smaller sample id.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn

from eval.features import Bank
from fastssl.distributed import Dist

CHUNK, TILE = 4096, 8192
"""Queries (of all ranks together) and bank rows per matrix product: 256 MB of similarities."""

STEPS = 2.0**25
"""Grid points per unit."""
NOBODY = 2**62
"""Stands for a neighbour that is missing."""


@dataclass
class Neighbours:
    """The k nearest bank images of n queries, nearest first, ties by sample id."""

    value: Tensor
    """float64 [n, k]: cosine similarity, or squared distance of the unit vectors."""
    index: Tensor
    """int64 [n, k]: sample ids."""
    label: Tensor
    """int64 [n, k]."""


def _grid(features: Tensor) -> Tensor:
    """float [n, D] -> unit rows in whole multiples of 1 / STEPS, as float64 [n, D] of integers.

    Products of such integers and all partial sums of a row stay below 2**53, where float64 arithmetic is exact.  The grid
    (3e-8) moves a similarity by about 1e-8.  The squares of a norm are added pairwise, by elementwise sums alone, because the
    order inside a library's row sum depends on the shape.
    """
    x = features.double()
    squares = x.square()
    while (width := squares.shape[1]) > 1:
        half = (width + 1) // 2
        squares = squares[:, :half] + nn.functional.pad(squares[:, half:], (0, 2 * half - width))
    return (x / squares.sqrt_().clamp_min_(1e-12)).mul_(STEPS).round_()


def _take(candidates: Tensor, column: Tensor) -> Tensor:
    return candidates.gather(1, column[..., None].expand(-1, -1, 3))


def _best(candidates: Tensor, k: int) -> Tensor:
    """[q, m, 3] (score, sample id, label) -> the [q, k, 3] of highest score, equal ones by sample id."""
    candidates = _take(candidates, candidates[..., 1].argsort(dim=1))
    return _take(candidates, candidates[..., 0].argsort(dim=1, descending=True, stable=True)[:, :k])


def _top(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Score and column of the k highest of each row; of equal ones the leftmost.

    topk may return any of the columns that tie with the k-th, so rows with more such columns than room are sorted.
    """
    value, column = score.topk(k, dim=1)
    crowded = (score >= value[:, -1:]).sum(1) > k
    if crowded.any():
        column[crowded] = score[crowded].argsort(dim=1, descending=True, stable=True)[:, :k]
        value = score.gather(1, column)
    return value, column


def _search_shard(bank: Bank, order: Tensor, queries: Tensor, k: int, squared_l2: bool, tile: int) -> Tensor:
    """This rank's k best rows for every query: int64 [q, k, 3] of score, sample id and label, padded with NOBODY."""
    best = torch.tensor((-NOBODY, NOBODY, 0), device=queries.device).expand(len(queries), k, 3)
    for rows in order.split(tile):
        part = bank[rows]
        keys = _grid(part.features)
        score = queries @ keys.T
        if squared_l2:
            score = score.mul_(2).sub_(keys.square().sum(1))
        value, column = _top(score, min(k, len(rows)))
        found = torch.stack((value.long(), part.index[column], part.labels[column]), dim=2)
        best = _best(torch.cat((best, found), dim=1), k)
    return best


def search(bank: Bank, query: Bank, *, k: int, dist: Dist, squared_l2: bool = False, chunk: int = CHUNK, tile: int = TILE) -> Neighbours:
    """The k images of all ranks' banks that are nearest to each of this rank's queries; all of them if there are fewer.

    By cosine similarity, or with `squared_l2` by squared distance of the unit vectors.  Every rank must call it, also with an
    empty shard.  `chunk` and `tile` bound the memory and do not change the result.
    """
    sizes = dist.gather_objects((len(bank), len(query)))
    k = min(k, sum(n for n, _ in sizes))
    rows, order = max(1, chunk // dist.world), bank.index.argsort()
    found = []
    for start in range(0, max(n for _, n in sizes), rows):
        mine = query.features[start : start + rows]
        ours = _all_gather(mine, rows, dist)
        best = _search_shard(bank, order, _grid(ours), k, squared_l2, tile)
        answers = _all_to_all(best, dist).unflatten(0, (dist.world, -1)).transpose(0, 1).flatten(1, 2)
        found.append(_best(answers[: len(mine)], k))
    score, index, label = (torch.cat(found) if found else bank.index.new_empty(0, k, 3)).unbind(2)
    value = score.double()  # dividing int64 by a Python float would give float32
    if squared_l2:
        own = torch.cat([_grid(part).square().sum(1) for part in query.features.split(rows)])
        return Neighbours((own[:, None] - value) / STEPS**2, index, label)
    return Neighbours(value / STEPS**2, index, label)


def _all_gather(x: Tensor, rows: int, dist: Dist) -> Tensor:
    """Every rank's [<= rows, D] as [world * rows, D], short ones padded with zeros; alone: x itself."""
    if dist.world == 1:
        return x
    out = x.new_empty(dist.world * rows, x.shape[1])
    torch.distributed.all_gather_into_tensor(out, nn.functional.pad(x, (0, 0, 0, rows - len(x))))
    return out


def _all_to_all(x: Tensor, dist: Dist) -> Tensor:
    """Block r of the first dimension goes to rank r; what comes back is in rank order."""
    if dist.world == 1:
        return x
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.distributed.all_to_all_single(out, x.contiguous())
    return out
