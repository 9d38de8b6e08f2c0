"""After the first steps nothing is compiled again and no memory is gained."""

from __future__ import annotations

import dataclasses
import gc

import psutil
import pytest
import torch

from fastssl.augment import Augmenter
from fastssl.bench.augment_work import material
from fastssl.config import EfficiencyConfig
from fastssl.distributed import Dist
from fastssl.engine import prepare, train_step
from fastssl.method import Method
from fastssl.methods import METHODS
from fastssl.presets import PRESETS
from tests.golden.toy import ToyBackbone

CPU = torch.device("cpu")
WARM_UP, STEPS, EPOCH = 20, 200, 15
"""The warm-up ends after the epoch in which DINO leaves its last layer alone."""


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["lewel_mini", "dino_mini", "sfrik_mini"])
def test_200_steps(preset: str, monkeypatch):
    """Dynamo's part of compilation, which decides what is compiled again, without Inductor's."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(Method, "compile", lambda self, **options: torch.nn.Module.compile(self, backend="eager", **options))
    cfg = PRESETS[preset]()
    views = tuple(dataclasses.replace(v, crop=dataclasses.replace(v.crop, size=v.crop.size // 4)) for v in cfg.views)
    train = dataclasses.replace(cfg.train, epochs=-(-(WARM_UP + STEPS) // EPOCH))
    cfg = dataclasses.replace(cfg, views=views, train=train, efficiency=EfficiencyConfig(dtype="fp32", compile="on"))
    torch.manual_seed(0)
    method = METHODS[cfg.method.name](cfg.method, lambda: ToyBackbone(4, 8), "local")
    state = prepare(method, cfg, Dist(0, 1, 0, 1, CPU), steps_per_epoch=EPOCH)
    augment, images = Augmenter(views, device=CPU, dtype=torch.float32, seed=0), material(views, 8, CPU).batch

    def run(steps: int) -> None:
        for _ in range(steps):
            images.step, images.epoch = state.step, state.step // EPOCH
            train_step(state, [augment(images)])

    def held() -> tuple[int, int]:
        """Tensors alive, and bytes of this process."""
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects()), psutil.Process().memory_info().rss

    run(WARM_UP)
    tensors, bytes_ = held()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(STEPS)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0
    after, bytes_after = held()
    assert after == tensors
    assert bytes_after - bytes_ < 4 << 20
