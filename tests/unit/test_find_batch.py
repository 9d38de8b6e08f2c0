"""The search for the largest batch, with a stand-in for the memory."""

from __future__ import annotations

import pytest
import torch

from fastssl.bench.find_batch import find_batch, largest
from fastssl.config import ConfigError
from fastssl.distributed import Dist
from fastssl.presets import PRESETS


@pytest.mark.parametrize("limit", [0, 7, 8, 15, 31, 32, 33, 64, 100, 999, 5000])
def test_the_largest_that_fits(limit: int):
    tried = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    found, best = largest(fits), limit // 8 * 8
    assert found <= best and best - found <= max(0, found // 32) and found % 8 == 0
    assert len(tried) == len(set(tried)) <= 16


def test_a_cpu_is_refused():
    with pytest.raises(ConfigError, match="CUDA"):
        find_batch(PRESETS["byol_mini"](), Dist(0, 1, 0, 1, torch.device("cpu")), print)
