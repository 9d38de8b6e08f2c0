"""Features kept on disk: the same as in memory, continued after a kill, refused where they are of something else."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from eval import extract as extract_module
from eval.extract import Recipe, banks
from eval.features import Bank
from eval.results import together
from eval.store import Store, pairs
from fastssl.config import ConfigError
from fastssl.distributed import Dist
from fastssl.models.backbones import build_backbone
from loaders.errors import DataError

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))
RECIPE = Recipe(resize=36, crop=32, interpolation="bicubic")


class Loader:
    """A pass over samples 0, 2, 4, ... with labels 0, 1, 2, 0, ...; ranks share it as `EvalLoader` does."""

    def __init__(self, ids: np.ndarray):
        self.ids, self.num_samples, self.labels = ids, len(ids), ids // 2 % 3

    def part(self, rows: np.ndarray) -> "Loader":
        return Loader(self.ids[rows])


def features_of(ids: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.sin(np.outer(ids, np.arange(1, 5)))).float()


def run(loader: Loader, batch: int = 4, stop_after: int | None = None):
    for start in range(0, len(loader.ids), batch):
        if stop_after is not None and start >= stop_after:
            raise KeyboardInterrupt
        ids = loader.ids[start : start + batch]
        yield Bank(features_of(ids), None, torch.from_numpy(ids))


def test_runs_of_rows():
    assert pairs(np.array([3, 4, 5, 9, 11, 12])) == [[3, 6], [9, 10], [11, 13]]


@pytest.mark.parametrize("kill", [8, 0])
def test_a_killed_extraction_goes_on(tmp_path, monkeypatch, kill):
    monkeypatch.setattr("eval.store.SAVE_SECONDS", -1.0)
    loader, store = Loader(2 * np.arange(23)), Store(tmp_path / "f", "train", {"digest": "a"})
    with pytest.raises(KeyboardInterrupt):
        store.fill(loader, lambda part: run(part, stop_after=kill), 4, ALONE)
    seen = []

    def rest(part: Loader):
        seen.extend(part.ids.tolist())
        return run(part)

    store.fill(loader, rest, 4, ALONE)
    assert seen == loader.ids[kill:].tolist()
    bank = store.bank()
    assert torch.equal(bank.features, features_of(loader.ids)) and bank.index.tolist() == loader.ids.tolist()
    assert bank.labels.tolist() == loader.labels.tolist()
    assert json.loads((tmp_path / "f/train.json").read_text())["done"] == [[0, 23]]
    assert sorted(p.name for p in (tmp_path / "f").iterdir()) == [f"train.{s}" for s in ("features.npy", "index.npy", "json", "labels.npy")]

    store.fill(loader, lambda part: pytest.fail("nothing is left to do"), 4, ALONE)


def test_rows_of_ranks_that_are_gone_count(tmp_path):
    """Two ranks were killed; one goes on.  Rows that no rank's file names are done again."""
    loader, store = Loader(np.arange(0, 40, 2)), Store(tmp_path, "val", {})
    store._prepare(store._manifest(loader, 4), loader, 4)
    out = np.load(store.path("features.npy"), mmap_mode="r+")
    for rank, (first, end) in enumerate(((0, 3), (10, 14))):
        out[first:end] = features_of(loader.ids[first:end])
        store.path(f"rank{rank}.json").write_text(json.dumps({"done": [[first, end]]}))
    out.flush()
    seen = []
    store.fill(loader, lambda part: seen.extend(part.ids.tolist()) or run(part), 4, ALONE)
    assert seen == [i for i in loader.ids.tolist() if not (i < 6 or 20 <= i < 28)]
    assert torch.equal(store.bank().features, features_of(loader.ids))
    parts = [store.bank(replace(ALONE, rank=r, world=3)) for r in range(3)]
    assert torch.equal(torch.cat([p.features for p in parts]), features_of(loader.ids)) and [len(p) for p in parts] == [6, 7, 7]


def test_other_features_are_refused(tmp_path):
    loader = Loader(np.arange(6))
    Store(tmp_path, "val", {"digest": "a", "checkpoint": "x.pt"}).fill(loader, run, 4, ALONE)
    Store(tmp_path, "val", {"digest": "a", "checkpoint": "moved.pt"}).fill(loader, run, 4, ALONE)
    with pytest.raises(DataError, match="something else .digest: a there, b here"):
        Store(tmp_path, "val", {"digest": "b", "checkpoint": "x.pt"}).fill(loader, run, 4, ALONE)
    (tmp_path / "val.json").write_text("{")
    with pytest.raises(DataError, match="is no manifest of features"):
        Store(tmp_path, "val", {"digest": "a", "checkpoint": "x.pt"}).fill(loader, run, 4, ALONE)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        Store(tmp_path / "file" / "f", "val", {}).fill(loader, run, 4, ALONE)


def test_a_full_disk_is_said_before_the_work(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("eval.store.os.posix_fallocate", full)
    with pytest.raises(ConfigError, match="No space left on device.*Free some space"):
        Store(tmp_path, "val", {}).fill(Loader(np.arange(6)), lambda part: pytest.fail("started"), 4, ALONE)
    assert not list(tmp_path.iterdir())


def test_an_error_of_one_rank_stops_all(tmp_path):
    class Other:
        """Rank 1 of two, when rank 0 has met an error."""

        def gather_objects(self, value):
            return [ConfigError("rank 0 has no space"), value]

    with pytest.raises(ConfigError, match="rank 0 has no space"), together(Other(), tmp_path / "r.json"):
        pass
    (tmp_path / "r.json.partial").touch()
    with pytest.raises(ConfigError, match="r.json cannot be written .*No space left"), together(ALONE, tmp_path / "r.json"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_kept_features_are_those_in_memory(beton_data, tmp_path):
    torch.manual_seed(0)
    backbone = build_backbone("resnet18").eval()
    parts = {"train": ("train", "first:2"), "val": ("val", "")}
    options = {"dist": ALONE, "forward": 5, "workers": 1}
    memory = banks(backbone, str(beton_data), parts, RECIPE, **options)
    kept = banks(backbone, str(beton_data), parts, RECIPE, folder=tmp_path, of={"digest": "a"}, **options)
    for name in parts:
        for field in ("features", "labels", "index"):
            assert torch.equal(getattr(memory[name].bank, field), getattr(kept[name].bank, field)), (name, field)
    assert (tmp_path / "train-first-2.features.npy").exists() and (tmp_path / "val.features.npy").exists()
    with pytest.raises(DataError, match="crop: 32 there, 24 here"):
        banks(backbone, str(beton_data), parts, replace(RECIPE, crop=24), folder=tmp_path, of={"digest": "a"}, **options)


def test_command_line(beton_data, tmp_path, capsys):
    flags = ("--checkpoint", "random:vit_tiny_patch16", "--data", beton_data, "--forward", 8, "--workers", 1, "--resize", 32, "--crop", 32)
    extract_module.main([*map(str, flags), "--out", str(tmp_path / "f"), "--kind", "last2", "--splits", "val"])
    shown = capsys.readouterr().out
    manifest = json.loads((tmp_path / "f/val.json").read_text())
    assert f"val.features.npy: {manifest['images']} x 384, val" in shown and "output checksum" in shown
    assert (manifest["arch"], manifest["kind"], manifest["crop"], manifest["dtype"]) == ("vit_tiny_patch16", "last2", 32, "fp32")
    assert len(manifest["digest"]) == 64 and manifest["interpolation"] == "bicubic"
    for kind, message in (("last13", "need 13 blocks"), ("mean", "no features 'mean'")):
        with pytest.raises(SystemExit, match=message):
            extract_module.main([*map(str, flags), "--out", str(tmp_path / "g"), "--kind", kind])
    resnet = ["random:resnet18" if flag == "random:vit_tiny_patch16" else str(flag) for flag in flags]
    with pytest.raises(SystemExit, match="are of ViTs"):
        extract_module.main([*resnet, "--out", str(tmp_path / "g"), "--kind", "cls"])
    with pytest.raises(SystemExit, match="not the resnet50 asked for|no random backbone"):
        extract_module.main([*resnet, "--out", str(tmp_path / "g"), "--arch", "resnet50"])
    assert not (tmp_path / "g").exists()
