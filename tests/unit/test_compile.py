"""The compiled forward pass: the eager losses, one graph without breaks, nothing compiled again after the first step."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastssl.config import EfficiencyConfig
from fastssl.distributed import Dist
from fastssl.engine import prepare, train_step
from fastssl.methods import METHODS
from fastssl.presets import PRESETS
from tests.golden.toy import ToyBackbone, two_views

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))


def losses(preset: str, norm: str, compile: str, steps: int = 4) -> torch.Tensor:
    cfg = PRESETS[preset]()
    cfg = dataclasses.replace(
        cfg, model=dataclasses.replace(cfg.model, norm=norm), efficiency=EfficiencyConfig(dtype="fp64", compile=compile)
    )
    torch.manual_seed(0)
    method = METHODS[cfg.method.name](cfg.method, lambda: ToyBackbone(4, 8), cfg.model.norm)
    state = prepare(method, cfg, ALONE, steps_per_epoch=4)
    x1, x2 = torch.randn(2, 6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).numpy()
    return torch.stack([train_step(state, [two_views(x1, x2)]).loss for _ in range(steps)])


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["eman", "local"])
@pytest.mark.parametrize("preset", ["byol_mini", "lewel_mini"])
def test_compiled_is_eager(preset: str, norm: str):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = losses(preset, norm, "on")
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(compiled, losses(preset, norm, "off"), rtol=1e-9, atol=0)


@pytest.mark.slow
def test_a_kept_last_batch_is_a_second_graph():
    """Epochs of two full batches and a smaller one: two graphs, compiled in the first epoch and not again."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    cfg = PRESETS["byol_mini"]()
    cfg = dataclasses.replace(cfg, efficiency=EfficiencyConfig(dtype="fp64", compile="on"))
    torch.manual_seed(0)
    method = METHODS[cfg.method.name](cfg.method, lambda: ToyBackbone(4, 8), cfg.model.norm)
    state = prepare(method, cfg, ALONE, steps_per_epoch=3)
    x = torch.randn(2, 6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).numpy()
    graphs = []
    for _ in range(3):
        for size in (6, 6, 4):
            assert torch.isfinite(train_step(state, [two_views(*x[:, :size])]).loss)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [2, 2, 2]
