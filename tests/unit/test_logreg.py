"""Logistic regression on kept features, from images to JSON."""

import contextlib
import json

import pytest
import torch

from eval import logreg
from eval.features import Bank
from eval.logreg import fit, new_head, order
from eval.protocols import LogisticRegression
from fastssl.config import ConfigError
from fastssl.distributed import Dist
from fastssl.models.backbones import build_backbone


def blobs(count: int, seed: int) -> Bank:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return Bank(3 * torch.eye(3)[labels] + torch.randn(count, 3, generator=generator), labels, torch.arange(count))


def test_it_learns_and_every_sample_counts_once():
    protocol = LogisticRegression(epochs=4, batch=32)
    train, val, seen = blobs(101, 0), blobs(60, 1), []
    epochs = fit(new_head(3, 3, protocol), train, val, protocol, seen.append)
    assert seen == epochs and len(epochs) == 4
    assert epochs[0].val.top1[0] > 60 and epochs[-1].val.top1[0] > 90 and epochs[-1].val.top5[0] == 100
    assert epochs[-1].loss < epochs[0].loss
    assert epochs[-1].val.images.tolist() == [20, 20, 20]
    for epoch in range(3):
        assert order(101, epoch).sort().values.tolist() == list(range(101))
    assert not torch.equal(order(101, 0), order(101, 1))


def test_order_is_that_of_the_distributed_sampler():
    sampler = torch.utils.data.DistributedSampler(range(50), num_replicas=1, rank=0, seed=0)
    for epoch in (0, 3):
        sampler.set_epoch(epoch)
        assert list(sampler) == order(50, epoch).tolist()


def test_protocol_settings():
    p = LogisticRegression()
    assert (p.epochs, p.batch, p.lr, p.weight_decay, p.sgd_momentum, p.init_std) == (100, 256, 0.4, 1e-6, 0.9, 0.01)
    assert (p.resize, p.crop, p.interpolation) == (256, 224, "bicubic")
    head = new_head(2000, 50, p)
    assert abs(float(head.weight.detach().std()) - 0.01) < 1e-4 and not head.bias.any()
    assert torch.equal(head.weight, new_head(2000, 50, p).weight)


@pytest.mark.parametrize("lr", [0.05, 1e30], ids=["trained", "diverged"])
def test_ranks_meet_after_each_epoch(beton_data, tmp_path, monkeypatch, lr: float):
    """One rank trains; a process group gives up where the others wait too long.  They are let go after an error, too."""
    told = []
    monkeypatch.setattr(Dist, "broadcast_object", lambda self, value: told.append(value) or value)
    flags = {"data": str(beton_data), "forward": 16, "workers": 1, "resize": 36, "crop": 32, "features": tmp_path / "features"}
    args = logreg.Args(checkpoint="random:resnet18", epochs=3, lr=lr, out=tmp_path / "result.json", **flags)
    with pytest.raises(ConfigError, match="diverged") if lr > 1 else contextlib.nullcontext():
        logreg.run(args, Dist(0, 1, 0, 1, torch.device("cpu")))
    assert [value for value in told if isinstance(value, bool)] == [False, False, False, True]


def test_command_line(beton_data, tmp_path, capsys):
    torch.manual_seed(0)
    weights = tmp_path / "weights.pth"
    torch.save(build_backbone("resnet18").state_dict(), weights)
    flags = ("--data", beton_data, "--forward", 16, "--workers", 1, "--resize", 36, "--crop", 32, "--epochs", 3, "--lr", 0.05)
    logreg.main(["--checkpoint", str(weights), *map(str, flags)])
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / f"weights.logreg-sfrik.online.{beton_data.name}.json").read_text())
    assert (result["protocol"], result["epochs"], result["num_train"], result["num_val"]) == ("logreg/sfrik", 3, 48, 12)
    assert set(result["per_class"]) == {"class0", "class1", "class2"} and result["top5_last"] == 100
    assert result["top1_last"] == pytest.approx(sum(result["per_class"].values()) / 3)
    name = "logreg/sfrik, 3 of 100 epochs, lr 0.05 instead of 0.4, resize 36 instead of 256, crop 32 instead of 224"
    assert result["run_as"] == name and f"{name}  top-1" in shown and f"| resnet18 online | {name} |" in shown
    assert result["data"] == str(beton_data)
    assert (tmp_path / f"weights.online.{beton_data.name}.features/train.json").exists()

    for changed, message in (
        (("--epochs", "0"), "must be positive"),
        (("--lr", "1e30"), "diverged with --lr"),
        (("--subset", "first:2", "--queries", "after:99"), "too small"),
        (("--queries", "after:2"), "give them a part with --subset"),
        (("--checkpoint", "random:resnet18"), "say where to keep them with --features"),
    ):
        with pytest.raises(SystemExit, match=message):
            logreg.main(["--checkpoint", str(weights), *map(str, flags), "--out", str(tmp_path / "other.json"), *changed])
