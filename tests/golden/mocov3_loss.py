"""The MoCo v3 loss on several ranks: apart from the other kinds, so that the ranks' processes load no more than it needs."""

from __future__ import annotations

import numpy as np
import torch

from fastssl.collectives import gathered
from fastssl.losses.contrastive import in_batch_contrast
from fastssl.methods.mocov3 import MoCoV3
from fastssl.precision import unit_rows
from tests.golden.kind import Arrays
from tests.golden.toy import ToyBackbone
from tests.ranks import run_ranks


def prefixes(arrays: Arrays, ending: str) -> list[str]:
    """x for every array named x.`ending`."""
    return [k.removesuffix(f".{ending}") for k in arrays if k.endswith(f".{ending}")]


def loss_of_rank(rank: int, world: int, case: Arrays) -> Arrays:
    q1, q2, k1, k2 = (torch.from_numpy(np.array(case[name][rank])) for name in ("q1", "q2", "k1", "k2"))
    q1.requires_grad_(), q2.requires_grad_()
    cfg = MoCoV3.Config(hidden=4, dim=q1.shape[1], temperature=float(case["temperature"]))
    total = MoCoV3(cfg, lambda: ToyBackbone(1, 2), "local").contrast(q1, q2, k1, k2)
    total.backward()
    with torch.no_grad():
        u1, u2, v1, v2 = map(unit_rows, (q1, q2, k1, k2))
        l12, l21 = (in_batch_contrast(u, v, gathered(v), cfg.temperature) for u, v in ((u1, v2), (u2, v1)))
    scalars = {"loss_q1_k2_per_rank": l12, "loss_q2_k1_per_rank": l21, "total_per_rank": total.detach()}
    return {**{k: v.numpy() for k, v in scalars.items()}, "grad_q1": q1.grad.numpy(), "grad_q2": q2.grad.numpy()}


def mocov3_loss(arrays: Arrays) -> Arrays:
    out: Arrays = {"n_cases": np.array(len(prefixes(arrays, "q1")))}
    for name in prefixes(arrays, "q1"):
        case = {k.removeprefix(f"{name}."): a for k, a in arrays.items() if k.startswith(f"{name}.")}
        world = int(case["world_size"])
        ranks = [loss_of_rank(0, 1, case)] if world == 1 else run_ranks(world, loss_of_rank, case)
        out |= {f"{name}.{k}": np.stack([r[k] for r in ranks]) for k in ranks[0]}
    return out
