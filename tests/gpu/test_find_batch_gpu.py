"""The search for the largest batch with real steps, in 2 GiB of a GPU's memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastssl.bench import find_batch as search
from fastssl.config import EfficiencyConfig
from fastssl.distributed import Dist
from fastssl.presets import PRESETS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def test_finds_a_batch_between_one_that_fits_and_one_that_does_not(monkeypatch):
    monkeypatch.setattr(search, "SHARE", 2 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    cfg, said = dataclasses.replace(PRESETS["byol_mini"](), efficiency=EfficiencyConfig(compile="off")), []
    try:
        batch = search.find_batch(cfg, Dist(0, 1, 0, 1, torch.device("cuda", 0)), said.append)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert batch >= 8 and f"at most {batch} images" in said[-1]
    assert any("GiB" in line for line in said[:-1]) and any("does not fit" in line for line in said[:-1])
