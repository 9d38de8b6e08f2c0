"""Linear evaluation on one and on two gloo processes: the same numbers, also for a last batch that the ranks cannot share."""

import numpy as np
import pytest
import torch

from eval import linear
from eval.linear_protocols import LINEAR_PROTOCOLS, changed
from fastssl.distributed import Dist
from fastssl.models.weights import load_backbone
from tests.ranks import run_ranks


def evaluate(rank: int, world: int, data: str, out) -> dict:
    """Steps of 16 images in forward passes of 4; of 45 images the last step has 13, filled up to a multiple of the passes."""
    dist = Dist(rank, world, rank, world, torch.device("cpu"))
    backbone, _ = load_backbone("random:resnet18:1")
    protocol = changed(LINEAR_PROTOCOLS["linear/dino"], epochs=2, batch=16, resize=40, crop=32, base_lr=40.0)
    options = {"subset": "first:15", "forward": 4, "workers": 1, "quiet": True, "sweep": "lr"}
    return linear.measure(backbone, data, protocol, dist=dist, out=out, **options)


@pytest.mark.slow
def test_one_and_two_processes_measure_the_same(class_folders, tmp_path):
    alone = evaluate(0, 1, str(class_folders), tmp_path / "1.json")
    both = run_ranks(2, evaluate, str(class_folders), tmp_path / "2.json")
    assert both[0] == both[1]
    for name in ("top1", "top5", "best_top1", "last_top1", "per_class", "num_train"):
        assert both[0][name] == alone[name], name
    np.testing.assert_allclose([c["loss"] for c in both[0]["curve"]], [c["loss"] for c in alone["curve"]], rtol=1e-4)
    one, two = (torch.load(tmp_path / f"{n}.head.pt", weights_only=True)["weight"] for n in (1, 2))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
