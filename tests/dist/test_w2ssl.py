"""W2SSL on 1, 2 and 4 gloo ranks: the same montages, losses and weights, and the bytes that move between ranks in a step."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl.batch import Group, Views
from fastssl.config import EfficiencyConfig
from fastssl.distributed import Dist
from fastssl.engine import prepare, train_step
from fastssl.methods.w2ssl import W2SSL
from fastssl.models.montage import drawn_rows
from fastssl.optim.schedules import Sched
from fastssl.presets import PRESETS
from tests.golden.toy import ToyBackbone
from tests.ranks import run_ranks

IMAGES, SIZE, STEPS = 16, 8, 3
DIM = 128
"""Of w2ssl_mini's projections."""
FOUR = pytest.param(4, marks=pytest.mark.slow)


def views_of(rank: int, world: int, parts: int, step: int, dtype: torch.dtype) -> Views:
    """This rank's images of the step's global batch."""
    share = IMAGES // world
    generator = torch.Generator().manual_seed(step)
    both = torch.randn(2, parts, IMAGES, 3, SIZE, SIZE, generator=generator, dtype=torch.float64).to(dtype)
    mine = both[:, :, rank * share : (rank + 1) * share].flatten(1, 2)
    groups = tuple(
        Group(SIZE, tuple(range(v * parts, (v + 1) * parts)), x.contiguous(memory_format=torch.channels_last)) for v, x in enumerate(mine)
    )
    return Views(groups=groups, boxes=None, flips=None, source_hw=None, index=torch.arange(share))


def method_of(parts: int, permutation: str, norm: str) -> W2SSL:
    torch.manual_seed(0)
    cfg = dataclasses.replace(PRESETS["w2ssl_mini"]().method, parts=parts, permutation=permutation)
    return W2SSL(cfg, lambda: ToyBackbone(6, 16), norm)


def train(rank: int, world: int, parts: int, permutation: str, compiled: bool = False) -> dict[str, torch.Tensor]:
    cfg = PRESETS["w2ssl_mini"]()
    cfg = dataclasses.replace(
        cfg,
        optim=dataclasses.replace(cfg.optim, warmup_epochs=0),
        train=dataclasses.replace(cfg.train, global_batch_size=IMAGES),
        efficiency=EfficiencyConfig(dtype="fp64", compile="off"),
    )
    method = method_of(parts, permutation, "sync")
    if compiled:
        method.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    state = prepare(method, cfg, Dist(rank, world, rank, world, torch.device("cpu")), steps_per_epoch=4)
    out = [train_step(state, [views_of(rank, world, parts, t, torch.float64)]) for t in range(STEPS)]
    return {**{k: torch.stack([o.logs[k] for o in out]) for k in ("loss_loc", "loss_crop")}, **method.state_dict()}


class Collectives(TorchDispatchMode):
    """Counts the bytes that this rank gets from others."""

    def __init__(self, rank: int, world: int):
        super().__init__()
        self.rank, self.world, self.counted = rank, world, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        match func.overloadpacket._qualified_op_name:
            case "c10d::alltoall_base_":
                arrived, _, _, received, _ = args[:5]
                self.counted["pixels"] += arrived[: sum(received) - received[self.rank]].nbytes
            case "_c10d_functional::all_gather_into_tensor":
                self.counted["rows" if args[0].ndim == 2 else "log-sum-exps"] += args[0].nbytes * (self.world - 1)
            case "_c10d_functional::all_reduce":
                self.counted["sums"] += args[0].nbytes
            case name if "c10d" in name and not name.endswith(("wait_tensor", "wrap_tensor_autograd")):
                self.counted[name] += 1  # none that this test does not know
        return func(*args, **(kwargs or {}))


def moved(rank: int, world: int, permutation: str) -> Counter:
    """Bytes that arrive at this rank from others in one step's arrangement and losses, in bf16 pixels; without SyncBN and gradients."""
    method, sched = method_of(2, permutation, "local"), Sched(0, 0.0, 0.0, 1.0)
    with Collectives(rank, world) as collectives:
        montages = method.arrange(views_of(rank, world, 2, 0, torch.bfloat16), sched)
        with torch.autocast("cpu", torch.bfloat16):
            loss = method(montages, sched).loss
        loss.backward()
    return collectives.counted


def on_ranks(rank: int, world: int) -> dict:
    """Everything these tests ask of one set of processes."""
    trained = {(parts, permutation): train(rank, world, parts, permutation) for parts, permutation in TRAINED}
    return {**trained, **{p: moved(rank, world, p) for p in ("global", "rank")}}


TRAINED = ((2, "global"), (4, "global"), (2, "rank"))


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), FOUR])
def ranks(request) -> list[dict]:
    return run_ranks(request.param, on_ranks)


@pytest.mark.parametrize("parts", [2, 4])
def test_any_number_of_ranks_is_one(ranks: list[dict], parts: int):
    one = train(0, 1, parts, "global")
    found = [dict(r[parts, "global"]) for r in ranks]
    location = torch.stack([r.pop("loss_loc") for r in found]).mean(0)
    torch.testing.assert_close(location, one.pop("loss_loc"), rtol=1e-10, atol=0)
    for name, expected in one.items():
        for rank in found:
            torch.testing.assert_close(rank[name], expected, rtol=1e-7, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_montages_of_a_rank_have_the_global_losses(ranks: list[dict]):
    """Other montages, the same patches: of the first step the loss is not the one of a global permutation but near it, on all ranks."""
    found = [r[2, "rank"]["loss_crop"] for r in ranks]
    for other in found[1:]:
        assert torch.equal(other, found[0])
    official = ranks[0][2, "global"]["loss_crop"]
    assert not torch.equal(found[0], official)
    torch.testing.assert_close(found[0][0], official[0], rtol=0.1, atol=0)


def test_bytes_that_arrive(ranks: list[dict]):
    """Pixels: the patches whose image is another rank's, of two views, two bytes a value.  Rows: of two comparisons the others' queries
    and keys, in fp32, and a log-sum-exp of each."""
    world, rows = len(ranks), 2 * IMAGES
    home = drawn_rows(2, IMAGES, world, seed=0, step=0, within="global") % IMAGES // (IMAGES // world)
    for rank, found in enumerate(ranks):
        others = 2 * 2 * rows * (world - 1) // world
        losses = {"rows": others * DIM * 4, "log-sum-exps": others * 4, "sums": 2 * 4}
        foreign = int((home[rank] != rank).sum())
        assert found["global"] == {"pixels": 2 * foreign * 3 * SIZE * SIZE * 2, **losses}
        assert found["rank"] == losses


@pytest.mark.parametrize("world", [2, 4, 8])
def test_most_patches_change_ranks(world: int):
    """What the calculated bytes of a published batch rest on."""
    home = drawn_rows(2, 512, world, seed=0, step=0, within="global") % 512 // (512 // world)
    assert np.mean(home != np.arange(world)[:, None]) == pytest.approx((world - 1) / world, abs=0.03)


def compiled_and_not(rank: int, world: int) -> tuple[dict, dict, int]:
    eager = train(rank, world, 2, "global")
    torch._dynamo.utils.counters.clear()
    return eager, train(rank, world, 2, "global", compiled=True), torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_one_graph_on_two_ranks():
    for eager, compiled, graphs in run_ranks(2, compiled_and_not):
        assert graphs == 1
        torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-11)
