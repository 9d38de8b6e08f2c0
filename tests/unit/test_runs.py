"""Which folder a run gets, and which checkpoint it continues from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torchvision

from fastssl import checkpoint, runs
from fastssl.config import ConfigError, EfficiencyConfig, RunConfig
from fastssl.distributed import Dist
from fastssl.engine import State, prepare
from fastssl.methods import build_method
from fastssl.presets import PRESETS

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))


def config(root: Path, *, name: str = "", resume: str = "") -> RunConfig:
    cfg = PRESETS["byol_mini"]()
    log = dataclasses.replace(cfg.log, dir=str(root), name=name)
    return dataclasses.replace(cfg, log=log, train=dataclasses.replace(cfg.train, resume=resume))


def run(root: Path, *, name: str = "", saved: bool = True) -> Path:
    """Start a run without --train.resume, and let it save a checkpoint or not."""
    cfg = config(root, name=name)
    folder, resume = runs.open_run(cfg, ALONE)
    assert resume is None
    runs.describe_run(folder, cfg, ALONE)
    if saved:
        (folder / checkpoint.LAST).touch()
    return folder


def auto(root: Path, **kwargs) -> tuple[Path, Path | None]:
    return runs.open_run(config(root, resume="auto", **kwargs), ALONE)


def test_auto_continues_the_only_run_of_its_name(tmp_path: Path):
    assert auto(tmp_path) == (tmp_path / "byol_mini", None)
    assert run(tmp_path) == tmp_path / "byol_mini"
    assert auto(tmp_path) == (tmp_path / "byol_mini", tmp_path / "byol_mini" / checkpoint.LAST)


@pytest.mark.parametrize("saved", [(True, True), (True, False), (False, True)])
def test_auto_refuses_to_guess_between_numbered_runs(saved: tuple[bool, bool], tmp_path: Path):
    """Also where only one of them has a checkpoint: it may be that of the other run."""
    folders = [run(tmp_path, saved=s) for s in saved]
    assert folders[1] == tmp_path / "byol_mini-2"
    with pytest.raises(ConfigError, match="several runs: .*byol_mini-2") as error:
        auto(tmp_path)
    for folder, s in zip(folders, saved, strict=True):
        assert (str(folder / checkpoint.LAST) in str(error.value)) == s
    assert auto(tmp_path, name="byol_mini-2")[0] == folders[1]


def test_runs_that_were_named_so_are_others(tmp_path: Path):
    run(tmp_path)
    run(tmp_path, name="byol_mini-2")
    (tmp_path / "byol_mini-3").mkdir()
    (tmp_path / "byol_mini-3/config.json").write_text(json.dumps({"something": "else"}))
    assert auto(tmp_path)[0] == tmp_path / "byol_mini"


def test_nothing_to_continue_starts_in_the_folder_of_the_name(tmp_path: Path):
    for _ in range(2):
        run(tmp_path, saved=False)
    assert auto(tmp_path) == (tmp_path / "byol_mini", None)


def test_the_way_to_go_on_names_the_file(tmp_path: Path):
    folder = tmp_path / "byol_mini-2"
    folder.mkdir()
    assert "no checkpoint yet" in checkpoint.how_to_continue(folder)
    (folder / checkpoint.LAST).touch()
    assert checkpoint.how_to_continue(folder).endswith(f"--train.resume {folder}/checkpoint_last.pt")


def state_of(preset: str = "byol_mini", **model) -> State:
    cfg = PRESETS[preset]()
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **model), efficiency=EfficiencyConfig(dtype="fp32", compile="off"))
    return prepare(build_method(cfg), cfg, ALONE, 3)


def test_a_foreign_backbone_starts_both_networks(tmp_path: Path):
    """torchvision's own state dict, and another method's checkpoint; heads are as they were."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    trained = state_of("simclr_mini")
    for path, expected in ((tmp_path / "resnet18.pth", theirs), (checkpoint.save(trained, tmp_path), trained.method.backbone)):
        state = state_of()
        head = state.method.predictor.state_dict()["mlp.0.weight"].clone()
        assert "the backbone of" in runs.initialise(state, path)
        for network in (state.method.online.backbone, state.method.target.backbone):
            assert all(torch.equal(t, expected.state_dict()[name]) for name, t in network.state_dict().items())
        assert torch.equal(state.method.predictor.state_dict()["mlp.0.weight"], head)


def test_weights_of_another_architecture_are_refused(tmp_path: Path):
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "resnet50.pth")
    with pytest.raises(checkpoint.CheckpointError, match="resnet18"):
        runs.initialise(state_of(), tmp_path / "resnet50.pth")


def test_a_run_continued_with_other_values_says_which(tmp_path: Path, caplog):
    folder = run(tmp_path)
    cfg = config(tmp_path, resume="auto")
    runs.describe_run(folder, cfg, ALONE, step=7)
    assert not caplog.records and not (folder / "config.until_step7.json").exists()
    other = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, base_lr=0.25))
    runs.describe_run(folder, other, ALONE, step=7)
    assert f"--optim.base-lr {cfg.optim.base_lr} -> 0.25" in caplog.text
    kept, now = (
        json.loads((folder / name).read_text())["config"]["optim"]["base_lr"] for name in ("config.until_step7.json", "config.json")
    )
    assert (kept, now) == (cfg.optim.base_lr, 0.25)
