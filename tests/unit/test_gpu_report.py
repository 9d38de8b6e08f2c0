"""`make gpu-check` and its report, without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastssl.bench import machine
from fastssl.bench.training import per_rank
from fastssl.presets import PRESETS
from scripts import gpu_check, gpu_report


def step(device: str, arch: str, **changed) -> dict:
    """The values of a step bench's JSON that the report reads."""
    resnet = arch.startswith("resnet")
    phases = {
        "augment": 2.0,
        "student_forward": 30.0,
        "target_forward": 10.0,
        "heads_and_loss": 8.0,
        "backward": 40.0,
        "communication": 0.0,
    }
    values = {"device": device, "arch": arch, "batch": 100, "dtype": "bfloat16", "images_per_s": 1000.0, "step_ms": 100.0}
    roofs = {
        "memory_roof_ms": 60.0 if resnet else None,
        "share_of_memory_roof": 0.6 if resnet else None,
        "compute_roof_ms": 25.0,
        "mfu": 0.25,
    }
    counts = {"kernels": 900, "host_syncs": 0, "graph_breaks": 0, "idle_ms": 2.0}
    alone = {"norm_collectives_left_out": 0, "samples_left_out": False}
    times = {"step_ms_p5": 99.0, "step_ms_p95": 101.0, "peak_mib": 10240.0, "phases_ms": {**phases, "update": 12.0}}
    return {**values, **roofs, **counts, **alone, **times, **changed}


def result(device: str, steps: dict) -> dict:
    return {
        "device": device,
        "date": "2026-01-01",
        "machine": {"cpu": "EPYC", "ram_gib": 128.0},
        "versions": {"commit": "abcdef0123456789", "torch": "2.13"},
        "step": steps,
    }


def test_projections_by_hand():
    """1e9 parameters: 7 GB to send.  A100 to V100 by memory 2.04 / 0.90, by products 312 / 125."""
    found = gpu_report.projections(step("NVIDIA A100-SXM4-80GB", "resnet50"), 10**9)
    assert found["A100"] == pytest.approx(8 * 100 / (0.100 + 7 / 220))
    assert found["V100"] == pytest.approx(8 * 100 / (0.100 * 2.04 / 0.90 + 7 / 130))
    found = gpu_report.projections(step("NVIDIA A100-SXM4-80GB", "vit_small_patch16"), 0)
    assert found["V100"] == pytest.approx(8 * 100 / (0.100 * 312 / 125))
    found = gpu_report.projections(step("NVIDIA A100-SXM4-80GB", "resnet50", norm_collectives_left_out=400), 0)
    assert found["A100"] == pytest.approx(8 * 100 / (0.100 + 400 * 30e-6)), "an exchange takes as long on any kind"


def test_what_is_not_projected():
    a100 = "NVIDIA A100-SXM4-80GB"
    steps = {
        "byol_mini": step(a100, "resnet50", idle_ms=12.0),
        "sfrik_mini": step(a100, "resnet50", samples_left_out=True, norm_collectives_left_out=9),
    }
    text = gpu_report.tables(gpu_report.derived(result(a100, steps)))
    assert "No projection of `byol_mini`: the device is idle for 12% of the step" in text
    assert "No projection of `sfrik_mini`: ranks compare" in text and "| 9 + samples |" in text
    assert "Projection, not" not in text and "cpu EPYC; ram gib 128" in text


def test_the_report(tmp_path: Path, monkeypatch, capsys):
    device, path = "NVIDIA H100 80GB HBM3", tmp_path / "gpu_h100.json"
    steps = {"byol_mini": step(device, "resnet50"), "dino_vit_mini": step(device, "vit_small_patch16"), "sfrik_mini": "ended with status 1"}
    train = {"images_per_s": {"end to end": 800.0, "augment + step": 900.0}, "data_stall": 0.11, "binds": "decoding"}
    path.write_text(
        json.dumps({**result(device, steps), "train": {"byol_mini": train, "sfrik_mini": "ended with status 1"}, "beton": "x.beton"})
    )
    monkeypatch.setattr(sys, "argv", ["gpu_report", str(path)])
    gpu_report.main()
    measured, projected = capsys.readouterr().out.split("Projection, not a measurement")
    assert "60% of memory roof, 55%" in measured and "25% MFU, 22%" in measured and "not measured: ended with status 1" in measured
    assert "backward 40%, student forward 30%, clip + optimizer + EMA 12%" in measured
    assert "| `byol_mini` | 800 | 900 | 11% | decoding |" in measured
    assert "sfrik_mini" not in projected and projected.count("`byol_mini`") == 1
    assert (tmp_path / "gpu_h100_report.png").stat().st_size > 1000
    assert set(json.loads((tmp_path / "gpu_h100_report.json").read_text())["measured"]) == {"byol_mini", "dino_vit_mini"}


def test_a_device_without_a_datasheet_has_no_projections():
    d = gpu_report.derived(result("Some GPU", {"byol_mini": step("Some GPU", "resnet50")}))
    assert "No projection of `byol_mini`: the datasheet of Some GPU is not listed" in gpu_report.tables(d)


def test_a_file_that_is_not_there(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_report", "nowhere.json"])
    with pytest.raises(SystemExit, match="make gpu-check"):
        gpu_report.main()


def test_gpu_check_without_cuda_says_what_it_skipped(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    gpu_check.main()
    skipped = capsys.readouterr().out.split("Skipped:")[1].split("\n")[1:-1]
    assert [line.split()[0] for line in skipped] == list(gpu_check.PARTS)


def test_gpu_check_replaces_what_was_measured_again(tmp_path: Path, monkeypatch):
    """And reports what failed, in the file and in its status."""
    for name, value in {"is_available": lambda: True, "get_device_name": lambda i=0: "Some GPU", "device_count": lambda: 1}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_check, "described", lambda device: {"driver": "580.159.04"})
    runs: list[dict] = [{"a": {"ms": 1}, "b": "ended with status 1"}, {"b": {"ms": 2}}]
    monkeypatch.setattr(gpu_check, "measured", lambda part, *args: runs.pop(0))
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--only", "step", "--beton", "x.beton"])
    for status in (1, 0):
        with pytest.raises(SystemExit) as end:
            gpu_check.main()
        assert end.value.code == status
    found = json.loads((tmp_path / "gpu_some_gpu.json").read_text())
    assert found["step"] == {"a": {"ms": 1}, "b": {"ms": 2}} and found["machine"]["driver"] == "580.159.04"


def test_the_five_methods_are_measured_as_published(tmp_path: Path, monkeypatch):
    """Images of a rank by the methods' specifications; only transformers are replayed as graphs."""
    cuda = torch.device("cuda")
    assert [per_rank(PRESETS[name](), cuda) for name in gpu_check.MEASURED] == [128, 32, 128, 256, 256]
    assert per_rank(PRESETS["w2ssl_r50_200ep_bs256"](), cuda) == 128
    monkeypatch.setattr(gpu_check, "bench", lambda part, folder, *flags: flags)
    for part in ("step", "train"):
        found = gpu_check.measured(part, tmp_path, list(gpu_check.MEASURED), Path("x.beton"))
        assert [name for name, flags in found.items() if "--cuda-graphs" in flags] == ["sere_vits16_100ep"]


def test_what_nvidia_smi_tells(monkeypatch):
    asked = []

    def run(command, **how):
        asked.extend(command)
        return SimpleNamespace(stdout="580.159.04, 700.00, [N/A]\n")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234-abc"))
    monkeypatch.setattr(machine.subprocess, "run", run)
    found = machine.described(torch.device("cuda", 0))
    assert "--id=GPU-1234-abc" in asked and "--query-gpu=driver_version,power.limit,clocks.max.sm" in asked
    assert (found["driver"], found["power_limit_w"], found["most_sm_mhz"]) == ("580.159.04", 700.0, "[N/A]")
    assert found["cpu"] and found["cores"] > 0 and found["ram_gib"] > 0
    monkeypatch.setattr(machine.subprocess, "run", lambda *args, **how: (_ for _ in ()).throw(FileNotFoundError("nvidia-smi")))
    assert machine.clocks(torch.device("cuda", 0)) == {} == machine.clocks(torch.device("cpu"))
    assert set(machine.described(torch.device("cuda", 0))) == set(machine.described(torch.device("cpu")))
