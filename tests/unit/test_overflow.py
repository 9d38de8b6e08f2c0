"""One forward pass that overflows costs one step: nothing that lives on, in no method, stays non-finite."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastssl.batch import Group, Views, masked_patches
from fastssl.config import EfficiencyConfig
from fastssl.distributed import Dist
from fastssl.engine import prepare, train_step
from fastssl.methods import METHODS
from fastssl.models.vit import ViT
from fastssl.presets import PRESETS
from tests.golden.dino_family import TinyConv

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))
BAD = 2
"""The step that overflows."""


def crops(sizes: tuple[int, ...], step: int, *, masks: bool) -> Views:
    """Eight images; of the bad step one of them is too bright for float32."""
    r = torch.Generator().manual_seed(step)
    pixels = [torch.randn(8, 3, s, s, generator=r) for s in sizes]
    if step == BAD:
        pixels[0][0] *= 1e38
    groups = []
    for size in dict.fromkeys(sizes):
        of = tuple(v for v, s in enumerate(sizes) if s == size)
        groups.append(Group(size, of, torch.cat([pixels[v] for v in of])))
    views = Views(groups=tuple(groups), boxes=None, flips=None, source_hw=None, index=torch.arange(8))
    if not masks:
        return views
    hidden = torch.rand(8, 2, 4, 4, generator=r) < 0.3
    return replace(views, masks=hidden, masked=torch.from_numpy(masked_patches(hidden.numpy())))


@pytest.mark.parametrize(
    ("preset", "norm", "sizes"),
    [
        ("dino_vit_mini", "local", (32, 32, 16, 16)),
        ("dino_mini", "local", (16, 16, 8, 8)),
        ("ibot_mini", "local", (32, 32, 16, 16)),
        ("byol_mini", "local", (16, 16)),
        ("byol_mini", "eman", (16, 16)),
        ("mocov2_mini", "shuffle", (16, 16)),
        ("mocov2_mini", "eman", (16, 16)),
        ("mocov3_mini", "local", (16, 16)),
        ("simclr_mini", "sync", (16, 16)),
    ],
)
def test_training_goes_on_after_an_overflow(preset: str, norm: str, sizes: tuple[int, ...]):
    cfg = PRESETS[preset]()
    cfg = replace(cfg, model=replace(cfg.model, norm=norm), train=replace(cfg.train, global_batch_size=8))
    cfg = replace(cfg, efficiency=EfficiencyConfig(dtype="fp32", compile="off"))
    torch.manual_seed(0)
    transformer = preset in ("dino_vit_mini", "ibot_mini")
    method = METHODS[cfg.method.name](cfg.method, lambda: ViT(16, 2, 2, 8, image_size=32) if transformer else TinyConv((6, 8, 8, 16)), norm)
    state = prepare(method, cfg, ALONE, 4)
    losses = [float(train_step(state, [crops(sizes, step, masks=preset == "ibot_mini")]).loss) for step in range(BAD + 3)]
    assert [step for step, loss in enumerate(losses) if not torch.isfinite(torch.tensor(loss))] == [BAD]
    assert float(state.metrics._skipped) == 1
    assert [name for name, t in method.state_dict().items() if t.is_floating_point() and not t.isfinite().all()] == []
