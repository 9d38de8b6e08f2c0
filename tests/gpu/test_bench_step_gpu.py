"""The step bench on CUDA: what only a GPU can count."""

import json

import pytest
import torch

from fastssl.bench import step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("preset", ["lewel_mini", "dino_vit_mini", "ibot_mini", "w2ssl_mini"])
def test_a_compiled_step(preset: str, tmp_path):
    torch._dynamo.reset()
    step.bench(preset, batch=16, device="cuda", compile="on", rounds=2, steps=6, warmup=3, out=tmp_path)
    r = json.loads((tmp_path / f"step_{preset}.json").read_text())
    assert r["compiled"] and r["kernels"] > 100
    assert (r["host_syncs"], r["graph_breaks"], r["recompiles"]) == (0, 0, 0)
    assert 0 <= r["idle_ms"] < r["step_ms"] and r["gemm_tflop_per_s"] > 1 and r["copy_gb_per_s"] > 50
    assert all(ms > 0 for part, ms in r["phases_ms"].items() if part in ("augment", "student_forward", "target_forward", "backward"))


def test_memory_of_a_replayed_step(tmp_path):
    """Replaying allocates nothing, but what was captured needs as much memory as the same kernels one by one."""
    peak = {}
    for graphs in (False, True):
        torch._dynamo.reset()
        step.bench("dino_vit_mini", batch=32, device="cuda", cuda_graphs=graphs, parts=False, rounds=1, steps=3, warmup=3, out=tmp_path)
        r = json.loads((tmp_path / "step_dino_vit_mini.json").read_text())
        peak[graphs] = r["peak_mib"] - r["held_mib"]
    assert peak[True] > 0.7 * peak[False] > 0
