import json
import shutil
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch

from eval import epochs, linear, probe, saved_heads
from eval.accuracy import accuracy, truth_rank
from eval.command import ORIGIN, Subject
from eval.features import SharedFeatures
from eval.heads import Heads
from eval.labels import checked_classes
from eval.linear_protocols import LINEAR_PROTOCOLS, Setting, changed
from eval.probe import micro_batches
from eval.results import publish
from fastssl.checkpoint import CheckpointError
from fastssl.config import ConfigError
from fastssl.distributed import Dist
from fastssl.models.backbones import build_backbone
from fastssl.models.weights import load_backbone
from fastssl.views import Photometric
from loaders.errors import DataError

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))


# ------------------------------------------------------------------------------------------------ counting


def test_accuracy_by_hand():
    first = torch.tensor([[3.0, 1, 2], [0, 1, 2], [0, 5, 1], [1, 1, 1]])
    collapsed, diverged = torch.zeros_like(first), torch.full_like(first, float("nan"))
    labels = torch.tensor([0, 1, 1, 0])
    logits = torch.stack((first, collapsed, diverged))
    found = accuracy([(logits[:, :3], labels[:3]), (logits[:, 3:], labels[3:])], 3, ALONE)
    assert found.top1 == [75.0, 50.0, 0.0] and found.top5[:2] == [100.0, 100.0]
    assert found.hits.tolist() == [[2, 1, 0], [2, 0, 0], [0, 0, 0]] and found.images.tolist() == [2, 2, 0]
    assert found.per_class(0, ["a", "b", "c"]) == {"a": 100.0, "b": 50.0, "c": None}
    expected = torch.nn.functional.cross_entropy(first, labels).item()
    assert found.loss[:2] == pytest.approx([expected, np.log(3)], rel=1e-6)
    assert truth_rank(first[None], labels).tolist() == [[0, 1, 0, 0]]


def test_one_classifier_needs_no_axis_of_its_own():
    logits, labels = torch.randn(9, 4), torch.randint(4, (9,))
    a, b = accuracy([(logits, labels)], 4, ALONE), accuracy([(logits[None], labels)], 4, ALONE)
    assert a.top1 == b.top1 and torch.equal(a.hits, b.hits)


def test_nothing_to_count_is_an_error():
    with pytest.raises(ValueError, match="no images"):
        accuracy([], 4, ALONE)


# ------------------------------------------------------------------------------------------------ classifiers


def test_sgd_is_torchs():
    torch.manual_seed(0)
    settings = [Setting(0.3, 0.3, 1e-2), Setting(1e30, 1e30), Setting(0.02, 0.02)]  # the second diverges at once
    heads = Heads(settings, 7, 4, dist=ALONE)
    layers = [torch.nn.Linear(7, 4) for _ in settings]
    optimizers = []
    for layer, s in zip(layers, settings, strict=True):
        layer.load_state_dict({"weight": heads.weight[0].clone(), "bias": heads.bias[0].clone()})
        optimizers.append(torch.optim.SGD(layer.parameters(), lr=s.lr, momentum=0.9, weight_decay=s.weight_decay))
    for factor in (1.0, 1.0, 0.1):
        x, y = torch.randn(10, 7), torch.randint(4, (10,))
        losses = heads.learn(x, y, factor)
        for k in (0, 2):
            optimizers[k].param_groups[0]["lr"] = settings[k].lr * factor
            optimizers[k].zero_grad()
            loss = torch.nn.functional.cross_entropy(layers[k](x), y)
            loss.backward()
            optimizers[k].step()
            torch.testing.assert_close(losses[k], loss.detach())
    for k in (0, 2):
        torch.testing.assert_close(heads.weight[k], layers[k].weight.detach())
        torch.testing.assert_close(heads.bias[k], layers[k].bias.detach())


def test_what_is_trained_beside_a_classifier_does_not_change_it():
    setting = Setting(0.3, 0.3)
    alone, beside = (Heads(s, 6, 3, dist=ALONE, seed=4) for s in ([setting], [setting, Setting(9.0, 9.0), Setting(0.1, 0.1)]))
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        x, y = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)
        for heads in (alone, beside):
            heads.learn(x, y, 1.0)
    torch.testing.assert_close(alone.weight[0], beside.weight[0])
    assert 0.005 < Heads([setting], 50, 40, dist=ALONE).weight.std() < 0.015


def trained(rank: int, world: int, count: int) -> Heads:
    """A rank's share of `count` classifiers, each of another setting, after three steps on the same batches."""
    settings = [Setting(0.1 * (k + 1), 0.1 * (k + 1), 1e-4 * k, "lars" if k % 2 else "sgd") for k in range(count)]
    heads = Heads(settings, 5, 4, dist=Dist(rank, world, rank, world, torch.device("cpu")), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x, y = torch.randn(6, 5, generator=generator, dtype=torch.float64), torch.randint(4, (6,), generator=generator)
        heads.learn(x, y, 1.0)
    return heads


@pytest.mark.parametrize("count", [1, 2, 5])
def test_ranks_train_their_share_of_the_classifiers(count):
    alone, ranks = trained(0, 1, count).state_dict(), [trained(r, 3, count) for r in range(3)]
    for name, expected in alone.items():
        torch.testing.assert_close(torch.cat([heads.state_dict()[name][heads.mine] for heads in ranks]), expected, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------------ protocols


@pytest.mark.parametrize(
    ("name", "vit", "epochs", "batch", "lr", "decay", "reported"),
    [
        ("lewel", False, 50, 256, 0.4, 0, "best"),
        ("dino", True, 100, 1024, 0.004, 0, "best"),
        ("dino", False, 100, 1024, 0.3, 0, "best"),
        ("scfs", False, 100, 2048, 0.08, 0, "best"),
        ("sfrik", False, 100, 256, 0.4, 1e-6, "best"),
        ("vicreg", False, 100, 256, 0.02, 1e-6, "best"),
        ("moco", False, 100, 256, 30.0, 0, "last"),
        ("mocov3", False, 90, 1024, 0.4, 0, "last"),
        ("mocov3", True, 90, 1024, 12.0, 0, "last"),
        ("w2ssl", False, 100, 256, 0.1, 0, "last"),
    ],
)
def test_published_settings(name, vit, epochs, batch, lr, decay, reported):
    p = LINEAR_PROTOCOLS[f"linear/{name}"]
    (setting,) = p.settings(vit=vit)
    assert (p.epochs, p.batch, setting.weight_decay, p.reported, setting.optimizer) == (epochs, batch, decay, reported, "sgd")
    assert setting.lr == pytest.approx(lr) and p.factor(0) == 1.0 and p.run_as() == p.name
    assert (p.resize, p.crop, p.interpolation) == (256, 224, "bicubic" if name in ("dino", "scfs", "ibot") else "bilinear")


def test_schedules_and_evaluations():
    lewel, moco, dino = (LINEAR_PROTOCOLS[f"linear/{n}"] for n in ("lewel", "moco", "dino"))
    assert [lewel.factor(e) for e in (29, 30, 39, 40, 49)] == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])
    assert [moco.factor(e) for e in (59, 60, 80)] == pytest.approx([1, 0.1, 0.01])
    assert dino.factor(50) == pytest.approx(0.5)
    assert [e + 1 for e in range(50) if lewel.evaluated(e)][-2:] == [46, 50]
    assert changed(lewel, epochs=5).milestones == (3, 4)
    assert changed(dino, epochs=5, batch=64).run_as() == "linear/dino, 5 of 100 epochs, batch 64 instead of 1024"
    assert changed(dino, epochs=None, base_lr=0.5).settings(vit=True)[0].lr == 2.0


def test_features_follow_the_architecture():
    dino, moco = LINEAR_PROTOCOLS["linear/dino"], LINEAR_PROTOCOLS["linear/moco"]
    kinds = [dino.features(vit=vit, width=width) for vit, width in ((True, 384), (True, 768), (False, 2048))]
    assert kinds == ["last4", "cls+patches", "pooled"] and moco.features(vit=True, width=384) == "pooled"


def test_sweeps():
    ibot, lewel = LINEAR_PROTOCOLS["linear/ibot"], LINEAR_PROTOCOLS["linear/lewel"]
    lrs = sorted(s.base_lr for s in ibot.settings(vit=True))
    assert len(lrs) == 45 and (lrs[0], lrs[9], lrs[-1]) == (1e-4, 1e-3, 9.0)
    assert ibot.settings(vit=True)[0].lr == pytest.approx(4 * ibot.settings(vit=True)[0].base_lr)
    assert len(ibot.settings(vit=True, sweep="all")) == 180
    assert [s.lr for s in lewel.settings(vit=False, sweep="lr")] == pytest.approx([0.4, 0.04, 0.08, 0.2, 0.8, 2, 4])
    assert len(lewel.settings(vit=False, sweep="all")) == 28
    (only,) = changed(ibot, epochs=None, base_lr=0.1).settings(vit=True)
    assert only.base_lr == 0.1


def test_the_command_line_knows_every_protocol():
    assert set(get_args(get_type_hints(linear.Args)["protocol"])) == set(LINEAR_PROTOCOLS)


@pytest.mark.parametrize(("batch", "world", "largest", "expected"), [(256, 1, 256, 1), (2048, 2, 256, 4), (12, 2, 4, 2), (7, 1, 2, 7)])
def test_micro_batches(batch, world, largest, expected):
    assert micro_batches(batch, Dist(0, world, 0, world, torch.device("cpu")), largest) == expected


# ------------------------------------------------------------------------------------------------ labels


def labelled(labels, classes=("a", "b")):
    return SimpleNamespace(labels=None if labels is None else np.array(labels), classes=classes)


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (labelled(None), labelled([0]), "training images of here have no labels"),
        (labelled([0, 1]), labelled(None), "validation images of here have no labels"),
        (labelled([0, 2]), labelled([0]), "run from 0 to 2, and the classes are 0 to 1"),
        (labelled([0, -1]), labelled([0]), "run from -1 to 0"),
        (labelled([0, 0]), labelled([0]), "1 of the 2 classes of here have no training image, b first"),
        (labelled([0, 1]), labelled([0], ("a", "c")), "number 1 is b and c"),
        (labelled([0, 1]), labelled([0], ("a", "b", "c")), "one has more"),
        (labelled([0, 1], None), labelled([2], None), "validation labels of here run from 2 to 2"),
    ],
)
def test_labels_that_cannot_be_learned(train, val, message):
    with pytest.raises(DataError, match=message):
        checked_classes(train, val, "here")
    assert checked_classes(labelled([0, 1]), labelled([1]), "here") == 2


# ------------------------------------------------------------------------------------------------ from images to JSON

SMALL = ("--resize", "40", "--crop", "32", "--batch", "10", "--forward", "5", "--workers", "1")
FLAGS = ("--checkpoint", "random:resnet18:1", *SMALL, "--epochs", "3")


def call(capsys, *flags) -> tuple[str, str]:
    error = ""
    try:
        linear.main([str(f) for f in flags])
    except SystemExit as stop:
        error = str(stop.code)
    return capsys.readouterr().out, error


def test_command_line(class_folders, tmp_path, capsys):
    out = tmp_path / "r.json"
    flags = (*FLAGS, "--data", class_folders, "--out", out)
    shown, error = call(capsys, *flags, "--protocol", "linear/w2ssl", "--base-lr", "5", "--sweep", "lr")
    assert error == ""
    assert "linear/w2ssl, 3 of 100 epochs, batch 10 instead of 256, resize 40 instead of 256, crop 32 instead of 224, base_lr 5" in shown
    result = json.loads(out.read_text())
    assert result["top1"] == result["last_top1"] and result["reported"] == "last" and result["epoch"] == 3
    assert result["best_of_sweep"]["top1"] >= result["top1"] and len(result["settings"]) == 7
    assert (result["num_train"], result["num_val"], result["kind"]) == (48, 12, "pooled")
    assert set(result["per_class"]) == {"class0", "class1", "class2"} and [c["epoch"] for c in result["curve"]] == [1, 2, 3]
    assert result["best_of_sweep"]["top1"] > 60, "three colours are told apart"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.head.pt", "r.json"]

    again = ("--checkpoint", "random:resnet18:1", "--data", class_folders, "--workers", 1, "--eval-only", "--head", tmp_path / "r.head.pt")
    shown, error = call(capsys, *again)
    assert error == ""
    repeated = json.loads((tmp_path / f"r.{class_folders.name}.val-only.json").read_text())
    for name in ("top1", "top5", "per_class"):
        assert repeated[name] == result[name]
    assert repeated["best_of_sweep"]["top1"] == result["best_of_sweep"]["top1"]
    shown, error = call(capsys, *again, "--queries", "first:2")
    assert error == "" and json.loads((tmp_path / f"r.{class_folders.name}.first-2-only.json").read_text())["num_val"] == 6
    half = ("0.5", "0.5", "0.5")
    _, error = call(capsys, *again, "--mean", *half, "--std", *half)
    assert "another mean and std. Give --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225" in error
    _, error = call(capsys, "--checkpoint", "random:resnet18:2", *again[2:])
    assert "trained on another backbone" in error
    _, error = call(capsys, *again[:-1], "nowhere.head.pt")
    assert "cannot be read as saved classifiers" in error


def test_no_result_replaces_that_of_another_evaluation(class_folders, tmp_path, capsys):
    """Seeds have files of their own; another setting is refused before any work; the same evaluation may be done again."""
    weights = tmp_path / "w.pth"
    torch.save(load_backbone("random:resnet18:1")[0].state_dict(), weights)
    flags = ("--checkpoint", weights, "--data", class_folders, *SMALL, "--protocol", "linear/w2ssl", "--epochs")
    for trial in ((), ("--seed", 1)):
        assert call(capsys, *flags, 1, *trial)[1] == ""
    named = f"w.linear-w2ssl.online.{class_folders.name}"
    there = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert sorted(there) == sorted(["w.pth", *(f"{named}{seed}{kind}" for seed in ("", ".seed1") for kind in (".head.pt", ".json"))])
    _, error = call(capsys, *flags, 2)
    assert "1 of 100 epochs" in error and "2 of 100 epochs" in error and "--out" in error and len(error.splitlines()) == 1
    _, error = call(capsys, *flags, 1, "--out", tmp_path / f"{named}.seed1.json")
    assert "seed was 1 and is 0" in error
    _, error = call(capsys, "--checkpoint", weights, "--data", class_folders, "--eval-only", "--head", tmp_path / f"{named}.head.pt",
                    "--out", tmp_path / f"{named}.json")  # fmt: skip
    assert "head of" in error
    assert there == {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert call(capsys, *flags, 1)[1] == ""
    for out in ("lin.e1", "lin.e2"):
        assert call(capsys, *flags, 1, "--out", tmp_path / out)[1] == ""
    assert {p.name for p in tmp_path.iterdir()} - there.keys() == {"lin.e1", "lin.e1.head.pt", "lin.e2", "lin.e2.head.pt"}


def test_all_classifiers_of_ibot_on_a_transformer(class_folders, capsys):
    flags = (
        "--checkpoint",
        "random:vit_tiny_patch16",
        "--data",
        class_folders,
        *SMALL,
        "--epochs",
        1,
        "--protocol",
        "linear/ibot",
        "--subset",
        "first:8",
    )
    shown, error = call(capsys, *flags)
    assert error == "" and "best of all settings is reported" in shown and "subset first:8, last4 |" in shown


class Stopped(Exception):
    pass


def measured(class_folders, out, shared=None, **changes):
    backbone, _ = load_backbone("random:resnet18:1")
    protocol = replace(changed(LINEAR_PROTOCOLS["linear/sfrik"], epochs=3, batch=10, resize=40, crop=32), **changes)
    options = {"forward": 10, "backend": "auto", "workers": 1, "quiet": True, "shared": shared}
    result = linear.measure(backbone, str(class_folders), protocol, dist=ALONE, out=out, **options)
    return result, torch.load(out.with_suffix(".head.pt"), weights_only=True)


def test_an_interrupted_evaluation_goes_on(class_folders, tmp_path, monkeypatch):
    whole, head = measured(class_folders, tmp_path / "whole.json")
    out, save = tmp_path / "parts.json", epochs.atomic_save

    def save_and_stop(value, path):
        save(value, path)
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(epochs, "atomic_save", save_and_stop)
        measured(class_folders, out)
    with pytest.raises(ConfigError, match="other settings: .*base_lr"):
        measured(class_folders, out, base_lr=0.1)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="parts.head.pt cannot be written"):
        patch.setattr(saved_heads, "atomic_save", lambda value, path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        measured(class_folders, out)  # trains the rest
    monkeypatch.setattr(epochs, "atomic_save", lambda *args: pytest.fail("trained again"))
    continued, other = measured(class_folders, out)
    assert continued == whole and torch.equal(head["weight"], other["weight"])
    assert out.with_suffix(".state.pt").exists()  # the JSON is not there yet
    publish(continued, [], out, ALONE, trained=True)
    assert out.exists() and not out.with_suffix(".state.pt").exists()
    out.with_suffix(".state.pt").write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match="Delete it"):
        measured(class_folders, out)


def test_features_may_be_shared_by_protocols(class_folders, tmp_path, monkeypatch):
    passes, shared = [], SharedFeatures(2**20)

    def counted(*args, what, **kwargs):
        passes.append(what)
        return extracted(*args, what=what, **kwargs)

    extracted = probe.extracted
    monkeypatch.setattr(probe, "extracted", counted)
    first, _ = measured(class_folders, tmp_path / "a.json", shared=shared)
    assert len(passes) == 4, "three epochs, and the images to classify once"
    again, _ = measured(class_folders, tmp_path / "b.json", shared=shared)
    assert len(passes) == 4 and again == first
    other, _ = measured(class_folders, tmp_path / "c.json", shared=shared, interpolation="bicubic")
    assert passes[4:] == ["validation"]
    shared.passes.clear()
    shared.limit = 0
    alone, _ = measured(class_folders, tmp_path / "d.json", shared=shared, interpolation="bicubic")
    assert alone == other and not shared.passes and len(passes) == 11


def test_frozen_means_frozen(class_folders, tmp_path, monkeypatch):
    def training(backbone, *args, **kwargs):
        backbone.bn1.running_mean += 1
        return extracted(backbone, *args, **kwargs)

    extracted = probe.extracted
    monkeypatch.setattr(probe, "extracted", training)
    with pytest.raises(RuntimeError, match="backbone has changed"):
        measured(class_folders, tmp_path / "r.json")


def test_swins_have_no_published_rate_where_it_depends_on_the_network():
    from fastssl.models.swin import Swin  # timm takes seconds to load

    with pytest.raises(ConfigError, match="none is published for a Swin: choose it with --base-lr, or take linear/ibot"):
        linear.measure(Swin(8, (1, 1), (1, 2), 2, image_size=32), "unread", LINEAR_PROTOCOLS["linear/mocov3"], dist=ALONE)


def test_features_that_are_not_finite(class_folders, monkeypatch, capsys):
    backbone = build_backbone("resnet18")
    backbone.bn1.weight.data.fill_(3e38)
    subject = Subject(backbone.eval(), Photometric(), dict.fromkeys(("checkpoint", "data", *ORIGIN)), "")
    monkeypatch.setattr(linear, "open_subject", lambda *args: subject)
    _, error = call(capsys, *FLAGS, "--data", class_folders)
    assert "not finite" in error


def test_classes_that_differ_are_refused(class_folders, tmp_path, capsys):
    shutil.copytree(class_folders, tmp_path / "data")
    (tmp_path / "data" / "val" / "class1").rename(tmp_path / "data" / "val" / "unheard of")
    _, error = call(capsys, *FLAGS, "--data", tmp_path / "data")
    assert "class" in error and "unheard of" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--eval-only",), "give both or neither"),
        (("--queries", "first:2"), "give them a part with --subset"),
        (("--kind", "last4"), "are of ViTs"),
        (("--arch", "resnet50"), "no random backbone"),
        (("--subset", "random:12", "--queries", "after:4"), "would find themselves"),
        (("--crop", "90"), "does not fit"),
        (("--forward", "0"), "cannot be shared"),
        (("--base-lr", "-1"), "must be positive"),
        (("--eval-only", "--head", "nowhere.head.pt"), "leave --resize, --crop, --epochs, --batch out"),
        (("--out", "no-such-folder/x.json"), "cannot be written"),
        (("--out", "/tmp"), "/tmp is a folder"),
    ],
)
def test_errors_are_one_paragraph(class_folders, capsys, flags, message):
    _, error = call(capsys, *FLAGS, "--data", class_folders, *flags)
    assert message in error and len(error.strip().splitlines()) == 1
