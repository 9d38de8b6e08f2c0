"""Which folder a run gets, and which checkpoint it continues from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from fastssl import checkpoint, runs
from fastssl.config import ConfigError, RunConfig
from fastssl.distributed import Dist
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
