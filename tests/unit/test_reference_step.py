"""The plain steps that ours is compared with compute the same losses, step after step."""

from dataclasses import replace

import pytest
import torch

from benchmarks import compare_step
from benchmarks.reference_step import REFERENCES, plain_views
from fastssl.bench.training import one_rank
from fastssl.config import EfficiencyConfig
from fastssl.distributed import Dist
from fastssl.engine import train_step
from fastssl.optim.schedules import Schedules
from fastssl.views import ViewSpec

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))


def smaller(views: ViewSpec) -> ViewSpec:
    """Of 64 px: 48, of 32: 32; two local crops."""
    return tuple(replace(v, crop=replace(v.crop, size=min(v.crop.size, 48))) for v in views[:4])


def both(name: str):
    """Ours and the reference, with the same weights, in double: rank, reference, its crops."""
    cfg = compare_step.mini(name)
    cfg = replace(cfg, views=smaller(cfg.views), efficiency=EfficiencyConfig(dtype="fp64"))
    rank = one_rank(cfg, ALONE, batch=4)
    lr = {"lewel": 0.5, "dino": 1e-4, "sfrik": 0.5}[name]
    # Past the warm-up and past DINO's frozen layer, so that a step changes something.
    rank.state.schedules = Schedules(epoch=lambda s: 1, lr=lambda s: lr, weight_decay=lambda s: 0.1, ema_momentum=lambda s: 0.9)
    reference = REFERENCES[name](rank.state.cfg)
    reference.load(rank.state.method)
    return rank, reference, plain_views(rank.views)


@pytest.mark.parametrize("name", compare_step.NAMES)
def test_first_losses_agree(name: str):
    rank, reference, crops = both(name)
    method, sched = rank.state.method, rank.state.schedules.at(0)
    method.before_step(sched)
    with torch.no_grad():
        found, expected = method(rank.views, sched).loss, reference.loss(crops, sched)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, check_dtype=False)  # the plain losses are single


@pytest.mark.slow
@pytest.mark.parametrize("name", compare_step.NAMES)
def test_losses_of_three_steps_agree(name: str):
    rank, reference, crops = both(name)
    state, losses = rank.state, {"ours": [], "reference": []}
    for s in range(3):
        losses["reference"].append(reference.step(crops, state.schedules.at(s), state.dtype))
        losses["ours"].append(float(train_step(state, [rank.views]).loss))
    assert losses["ours"] == pytest.approx(losses["reference"], rel=1e-5)
    assert abs(losses["ours"][2] - losses["ours"][0]) > 0.01 * losses["ours"][0], "the optimizer did nothing"


def test_dino_is_compared_with_two_and_six_crops():
    sizes = [v.crop.size for v in compare_step.mini("dino").views]
    assert sizes == [64, 64] + 6 * [32]
