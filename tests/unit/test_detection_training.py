"""The detection command: presets, training, resuming, results.  Small detectors on made-up images."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.detection import training
from eval.detection.command import command, measure, summary
from eval.detection.presets import DETECTION_PRESETS, changed
from fastssl.config import ConfigError
from tests.conftest import environment
from tests.detection import ALONE, backbone_state, small, write_detection_data

# methods/transfer.md section 2: detector, classes, mask, images a step, lr, iterations, milestones, warm-up, smallest training side
PUBLISHED = {
    "moco_coco_c4_2x": ("c4", 80, True, 16, 0.02, 180_000, (120_000, 160_000), 1000, 640),
    "lewel_coco_c4_1x": ("c4", 80, True, 16, 0.02, 90_000, (60_000, 80_000), 1000, 640),
    "lewel_coco_fpn_1x": ("fpn", 80, True, 16, 0.02, 90_000, (60_000, 80_000), 1000, 640),
    "lewel_coco_fpn_2x": ("fpn", 80, True, 16, 0.02, 180_000, (120_000, 160_000), 1000, 640),
    "moco_voc_c4_24k": ("c4", 20, False, 16, 0.02, 24_000, (18_000, 22_000), 100, 480),
    "w2ssl_coco_fpn": ("fpn", 80, False, 8, 0.01, 180_000, (120_000, 160_000), 1000, 640),
    "w2ssl_coco_mask_fpn": ("fpn", 80, True, 8, 0.01, 180_000, (120_000, 160_000), 1000, 640),
    "w2ssl_voc_fpn": ("fpn", 20, False, 8, 0.01, 24_000, (18_000, 22_000), 100, 480),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_detection_data(tmp_path_factory.mktemp("detection"))


# ------------------------------------------------------------------------------------------------ presets


@pytest.mark.parametrize("name", DETECTION_PRESETS)
def test_dry_run_prints_the_published_values(name, capsys):
    command(["--preset", name, "--dry-run"])
    shown = capsys.readouterr().out
    values = {words[0]: words[1:] for line in shown.splitlines() if (words := line.split())}
    if name not in PUBLISHED:
        assert name.endswith("_mini")
        return
    head, classes, mask, batch, lr, iterations, milestones, warmup, side = PUBLISHED[name]
    assert values["head"] == [head] and values["classes"] == [str(classes)] and values["mask"] == [str(mask)]
    assert values["batch"] == [str(batch)] and values["base_lr"] == [str(lr)] and values["warmup"] == [str(warmup)]
    assert values["iterations"] == [str(iterations)] and values["milestones"] == [str(m) for m in milestones]
    assert values["train_sides"] == [str(s) for s in range(side, 801, 32)] and values["test_side"] == ["800"]
    assert values["weight_decay"] == ["0.0001"] and values["sgd_momentum"] == ["0.9"] and values["precise_bn"] == ["200"]
    assert values["mask_norm"] == [str(name != "w2ssl_coco_mask_fpn")]
    pre_test = "6000" if head == "c4" or name.startswith("w2ssl") else "1000"
    assert values["rpn_pre_nms_test"] == [pre_test] and values["rpn_post_nms_train"] == ["2000" if head == "c4" else "1000"]
    assert f"{lr / 1000:.6g} at 0, {lr:.6g} at {warmup}, {lr / 10:.6g} at {milestones[0]}" in shown


def test_another_batch_scales_rate_and_schedule():
    preset = changed(DETECTION_PRESETS["lewel_coco_fpn_1x"], batch=4)
    assert (preset.base_lr, preset.iterations, preset.milestones) == (0.005, 360_000, (240_000, 320_000))
    assert preset.warmup == 1000
    assert preset.run_as == "detection/lewel_coco_fpn_1x, batch 4 instead of 16 (lr 0.005, 360000 iterations)"


def test_what_differs_is_named():
    preset = changed(DETECTION_PRESETS["moco_voc_c4_24k"], iterations=240, lr_mult=2.0, syncbn="naive", arch="resnet18")
    assert (preset.milestones, preset.warmup) == ((180, 220), 1)
    assert preset.lr(1) == pytest.approx(0.04)
    assert preset.run_as == (
        "detection/moco_voc_c4_24k, iterations 240 instead of 24000, lr_mult 2.0 instead of 1.0, arch resnet18 instead of resnet50, "
        "syncbn naive instead of sync"
    )


@pytest.mark.parametrize("option", [{"batch": 0}, {"iterations": 0}, {"lr_mult": 0.0}, {"lr_mult": float("nan")}, {"precise_bn": -1}])
def test_impossible_values_are_refused(option):
    with pytest.raises(ConfigError):
        changed(DETECTION_PRESETS["coco_fpn_mini"], **option)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--preset", "lewel_coco_fpn"], "Did you mean"),
        (["--preset", "coco_fpn_mini"], "Give a backbone with --checkpoint"),
        pytest.param(
            ["--preset", "coco_fpn_mini", "--checkpoint", "random:vit_tiny_patch16", "--data", "x"],
            "detection takes ResNets",
            marks=pytest.mark.slow,  # timm takes seconds to load
        ),
        (["--preset", "coco_fpn_mini", "--checkpoint", "random:resnet18", "--data", "/none"], "There is no /none/annotations"),
        (["--preset", "coco_fpn_mini", "--checkpoint", "random:resnet18", "--data", "x", "--out", "/none/a.json"], "cannot be written"),
    ],
)
def test_the_command_refuses_with_a_reason(flags, said):
    with pytest.raises(SystemExit, match=said):
        command(flags)


# ------------------------------------------------------------------------------------------------ training


def test_training_measuring_and_going_on(data, tmp_path, monkeypatch):
    """Two iterations in one go, and interrupted after the first: the same detector, to the bit."""
    whole = measure(backbone_state(), str(data), small(), dist=ALONE, workers=1, out=tmp_path / "whole.json", quiet=True)
    assert set(whole["box"]) >= {"AP", "AP50", "AP75"} and set(whole["mask"]) >= {"AP", "APs"}
    assert whole["num_train"] == whole["num_val"] == 4 and whole["num_found"] > 0
    assert whole["settings"]["detector"]["classes"] == 2 and "classes 2 instead of 80" in whole["run_as"]
    assert [r["iteration"] for r in whole["curve"]] == [1, 2]
    assert {"loss", "rpn_cls", "rpn_loc", "cls", "box_reg", "mask"} < set(whole["curve"][0])
    assert len(summary(whole)) == 2

    monkeypatch.setattr(training, "SAVE_SECONDS", -1.0)
    step = training.Training.step

    def stops(self, samples):
        if self.iteration == 1:
            raise KeyboardInterrupt
        return step(self, samples)

    out = tmp_path / "parts.json"
    monkeypatch.setattr(training.Training, "step", stops)
    with pytest.raises(KeyboardInterrupt):
        measure(backbone_state(), str(data), small(), dist=ALONE, workers=1, out=out, quiet=True)
    monkeypatch.setattr(training.Training, "step", step)
    assert out.with_suffix(".state.pt").exists()
    with pytest.raises(ConfigError, match="seed was 0 and is 1"):
        measure(backbone_state(), str(data), small(), dist=ALONE, workers=1, out=out, quiet=True, seed=1)
    parts = measure(backbone_state(), str(data), small(), dist=ALONE, workers=1, out=out, quiet=True)
    assert parts == whole
    first, second = (torch.load(tmp_path / f"{name}.model.pt")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_divergence_is_an_error(data):
    with pytest.raises(ConfigError, match="diverged.*--lr-mult"):
        measure(backbone_state(), str(data), replace(small(iterations=3), lr_mult=1e9), dist=ALONE, workers=1, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in DETECTION_PRESETS if n.endswith("_mini")])
def test_mini_presets_run_on_both_data_sets(data, name, tmp_path):
    preset = small(name)
    folder = str(data)
    result = measure(backbone_state(), folder, preset, dist=ALONE, workers=1, quiet=True, picture=tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
    if name.startswith("voc"):
        assert result["box"]["classes_with_objects"] == 2 and "coco_style_box" in result


@pytest.mark.slow
def test_the_command_writes_its_result(data, tmp_path):
    out = tmp_path / "result.json"
    flags = ["--checkpoint", "random:resnet18", "--data", str(data), "--out", str(out), "--iterations", "1", "--precise-bn", "0"]
    words = [sys.executable, "-m", "eval.detection", "--preset", "coco_fpn_mini", *flags, "--workers", "1"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["protocol"] == "detection/coco_fpn_mini" and "iterations 1 instead of 60" in result["run_as"]
    assert (result["mean"], result["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["result.json", "result.model.pt"]
    assert result["run_as"] in done.stdout and "published: nothing" in done.stdout
