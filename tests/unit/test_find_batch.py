"""The search for the largest batch, with a stand-in for the memory."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastssl.bench import find_batch as search
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


@pytest.mark.parametrize("gradients, bytes_each", [("auto", 4), ("bf16", 6)])
def test_steps_run_beside_the_buckets_of_several_ranks(gradients: str, bytes_each: int, monkeypatch):
    """DDP holds every gradient all the time; alone they come as activations go."""
    cfg, made = PRESETS["byol_mini"](), []
    cfg = replace(cfg, efficiency=replace(cfg.efficiency, gradient_dtype=gradients))
    method = torch.nn.Linear(10, 7)
    method.bias.requires_grad_(False)
    empty = torch.empty
    monkeypatch.setattr(search, "one_rank", lambda *args: SimpleNamespace(state=SimpleNamespace(method=method), views=None))
    monkeypatch.setattr(search, "train_step", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "empty", lambda n, **how: made.append(n * how["dtype"].itemsize) or empty(n, **how))
    assert search.fits(cfg, Dist(0, 1, 0, 1, torch.device("cpu")), 8) and made == [70 * bytes_each]


@pytest.mark.parametrize("preset, said", [("byol_mini", False), ("sfrik_mini", True)])
def test_what_is_not_counted_is_said(preset: str, said: bool, monkeypatch):
    for name in ("set_per_process_memory_fraction", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**30)
    monkeypatch.setattr(search, "fits", lambda cfg, dist, batch: batch <= 16)
    lines = []
    assert search.find_batch(PRESETS[preset](), Dist(0, 1, 0, 1, torch.device("cuda", 0)), lines.append) == 16
    assert ("the rows of other ranks" in lines[-1]) is said and "at most 16 images per GPU" in lines[-1]


def test_a_cpu_is_refused():
    with pytest.raises(ConfigError, match="CUDA"):
        find_batch(PRESETS["byol_mini"](), Dist(0, 1, 0, 1, torch.device("cpu")), print)
