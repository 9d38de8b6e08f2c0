import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from timm.scheduler import CosineLRScheduler

from eval import finetune, semi
from eval.classifier import Classifier, resize_positions
from eval.training_images import RandAugment, applied
from eval.tuning import Tuning, shared_step
from eval.tuning_command import measure
from eval.tuning_protocols import RAND_AUGMENT, TUNING_PROTOCOLS, changed
from fastssl.config import ConfigError
from fastssl.distributed import Dist
from fastssl.models.backbones import build_backbone
from fastssl.models.vit import ViT
from fastssl.optim.schedules import timm_cosine
from fastssl.rng import TUNING, random_u32
from loaders.errors import DataError

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))


def vit(**options) -> ViT:
    torch.manual_seed(0)
    return ViT(24, 2, 2, 8, image_size=32, **options)


def small(name: str, **options):
    """The protocol on 32 pixels, 8 images a step."""
    return changed(TUNING_PROTOCOLS[name], **({"epochs": 2, "batch": 8, "crop": 32, "resize": 36} | options))


# ------------------------------------------------------------------------------------------------ published values


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("semi/lewel-1pct", {"base_lr": 1e-4, "head_lr": 1.0, "epochs": 50, "weight_decay": 1e-4, "milestones": (30, 40)}),
        ("semi/lewel-10pct", {"base_lr": 0.01, "head_lr": 0.1, "epochs": 50, "evaluate_every": 5, "batch": 256}),
        ("semi/sfrik-1pct", {"base_lr": 0.004, "head_lr": 1.0, "epochs": 20, "weight_decay": 0.0, "subset": "1percent"}),
        ("semi/sfrik-10pct", {"base_lr": 0.02, "head_lr": 0.1, "epochs": 20, "head_std": 0.01, "subset": "10percent"}),
        ("finetune/mae", {"base_lr": 5e-4, "per_images": 256, "epochs": 100, "layer_decay": 0.65, "drop_path": 0.1, "min_lr": 1e-6}),
        ("finetune/ibot", {"base_lr": 4e-3, "per_images": None, "epochs": 200, "layer_decay": 0.75, "warmup_epochs": 20}),
        ("finetune/mocov3", {"base_lr": 5e-4, "per_images": 512, "epochs": 150, "repeats": 3, "min_lr": 1e-5, "warmup_epochs": 5}),
        ("transfer/mocov3", {"weight_decay": 0.1, "erase": 0, "drop_path": 0.1, "mixup": 0.8, "cutmix": 1, "min_scale": 0.05}),
        ("transfer/mocov3-cifar100", {"weight_decay": 0.1, "erase": 0, "drop_path": 0.1, "mixup": 0.5, "cutmix": 1}),
        ("transfer/mocov3-flowers", {"weight_decay": 0.3, "erase": 0.25, "drop_path": 0.1, "mixup": 0, "cutmix": 0}),
        ("transfer/mocov3-pets", {"weight_decay": 0.1, "erase": 0, "drop_path": 0, "mixup": 0.8, "cutmix": 0}),
    ],
)
def test_published_values(name, values):
    protocol = TUNING_PROTOCOLS[name]
    assert {key: getattr(protocol, key) for key in values} == values
    assert protocol.run_as(384) == name
    if name.startswith("transfer/"):
        shared = (protocol.base_lr, protocol.per_images, protocol.batch, protocol.epochs, protocol.warmup_epochs, protocol.repeats)
        assert shared == (3e-4, 512, 1024, 100, 3, 1)


def test_vit_b_and_vit_l_of_ibot():
    base = TUNING_PROTOCOLS["finetune/ibot"].of_width(768)
    assert (base.epochs, base.drop_path, base.layer_decay) == (100, 0.2, 0.65)
    assert base.run_as(768) == "finetune/ibot"
    assert changed(base, epochs=5).run_as(768) == "finetune/ibot, 5 of 100 epochs"
    large = TUNING_PROTOCOLS["finetune/ibot"].of_width(1024)
    assert (large.epochs, large.drop_path, large.layer_decay, large.warmup_epochs) == (50, 0.4, 0.75, 5)
    assert large.run_as(1024) == "finetune/ibot" and TUNING_PROTOCOLS["finetune/mae"].of_width(1024).run_as(1024) == "finetune/mae"


def test_learning_rates():
    mae, ibot = TUNING_PROTOCOLS["finetune/mae"], TUNING_PROTOCOLS["finetune/ibot"]
    assert mae.lr(0, 10) == 0
    assert mae.lr(50, 10) == pytest.approx(2e-3)
    assert mae.lr(25, 10) == pytest.approx(1e-3)
    assert ibot.lr(0, 10) == 0
    assert ibot.lr(199, 10) == pytest.approx(4e-3)  # numpy.linspace reaches the end
    lewel = TUNING_PROTOCOLS["semi/lewel-10pct"]
    assert [lewel.lr(e * 7, 7) for e in (0, 29, 30, 40)] == pytest.approx([0.01, 0.01, 0.001, 0.0001])
    assert changed(lewel, epochs=10).milestones == (6, 8)
    assert changed(mae, epochs=10).lr(5, 10) == pytest.approx(2e-3)  # half an epoch of warm-up


def test_cosine_is_timms():
    parameter = torch.nn.Parameter(torch.zeros(1))
    theirs = CosineLRScheduler(torch.optim.SGD([parameter], lr=0.3), t_initial=30, lr_min=1e-5, warmup_t=3, warmup_lr_init=1e-6)
    for epoch in range(30):
        ours = timm_cosine(epoch, base=0.3, epochs=30, warmup_epochs=3, final=1e-5, start=1e-6)
        assert ours == pytest.approx(theirs._get_lr(epoch)[0], rel=1e-12)


# ------------------------------------------------------------------------------------------------ images


def test_rand_augment_is_timms():
    augment = RandAugment(RAND_AUGMENT, crop=48, mean=(0.485, 0.456, 0.406), interpolation="bicubic", seed=3)
    how = {"translate_const": 21, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    theirs = rand_augment_transform(RAND_AUGMENT, how)
    levels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    altered = 0
    for sample in range(60):
        plan = augment.plan(1, sample, 0)
        key = int(random_u32(3, TUNING, 1, sample, 0))
        random.seed(key)
        np.random.seed(key)  # noqa: NPY002
        expected = np.asarray(theirs(Image.fromarray(levels)))
        assert np.array_equal(applied(levels, plan), expected)
        altered += not np.array_equal(expected, levels)
    assert altered > 30


def test_the_largest_strength_of_posterize_is_black():
    """timm asks for 0 bits there, which Pillow refuses."""
    augment = RandAugment("rand-m10-inc1", crop=8, mean=(0.5, 0.5, 0.5), interpolation="bicubic", seed=0)
    (posterize,) = (o for o in augment.transform.ops if o.name.startswith("Posterize"))
    posterize.prob = 1.0
    levels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert not applied(levels, posterize([])).any()


def test_losses_are_timms():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5), torch.randint(0, 5, (6,))
    torch.testing.assert_close(F.cross_entropy(logits, labels, label_smoothing=0.1), LabelSmoothingCrossEntropy(0.1)(logits, labels))
    _, soft = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=5)(torch.randn(6, 3, 8, 8), labels)
    torch.testing.assert_close(F.cross_entropy(logits, soft), SoftTargetCrossEntropy()(logits, soft))


def test_shares_of_a_step():
    eight, two = Dist(0, 8, 0, 8, ALONE.device), Dist(0, 2, 0, 2, ALONE.device)
    mae, deit = TUNING_PROTOCOLS["finetune/mae"], TUNING_PROTOCOLS["finetune/mocov3"]
    assert shared_step(mae, eight, 1024) == (128, 1)
    assert shared_step(mae, ALONE, 200) == (128, 8)
    assert shared_step(deit, eight, 1024) == (42, 1)  # 3 views of 336 images: 1008 of 1024
    assert shared_step(deit, ALONE, 1024) == (340, 1)
    for protocol, dist, forward in ((replace(mae, batch=9), two, 64), (replace(mae, batch=6), two, 64), (mae, ALONE, 1)):
        with pytest.raises(ConfigError, match="--batch or --forward"):
            shared_step(protocol, dist, forward)


# ------------------------------------------------------------------------------------------------ the classifier


def test_the_trained_model_is_timms_and_torchvisions():
    x = torch.randn(2, 3, 32, 32)
    for name, pool in (("finetune/mae", "avg"), ("finetune/ibot", "token")):
        model = Classifier(vit(), 5, replace(TUNING_PROTOCOLS[name], crop=32)).eval()
        torch.nn.init.normal_(model.head.weight)
        theirs = VisionTransformer(32, 8, embed_dim=24, depth=2, num_heads=2, num_classes=5, global_pool=pool, fc_norm=pool == "avg")
        theirs.load_state_dict(model.weights())
        torch.testing.assert_close(model(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)
    model = Classifier(build_backbone("resnet18"), 5, TUNING_PROTOCOLS["semi/lewel-1pct"]).eval()
    theirs = torchvision.models.resnet18(num_classes=5)
    theirs.load_state_dict(model.weights())
    torch.testing.assert_close(model(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


def test_layers_and_heads():
    model = Classifier(vit(), 5, replace(TUNING_PROTOCOLS["finetune/mae"], crop=32, drop_path=0.3))
    assert [getattr(b.drop_path2, "drop_prob", 0.0) for b in model.backbone.blocks] == [0.0, 0.3]
    assert model.head.weight.std() < 1e-4
    assert not model.head.bias.any()
    groups = model.optimizer(replace(TUNING_PROTOCOLS["finetune/mae"], layer_decay=0.5)).param_groups
    assert {g["lr_scale"] for g in groups} == {1.0, 0.5, 0.25, 0.125}
    backbone, head = Classifier(vit(), 5, small("semi/lewel-1pct")).optimizer(small("semi/lewel-1pct")).param_groups
    assert (backbone["lr_scale"], head["lr_scale"], len(head["params"])) == (1.0, 10000.0, 2)


def test_positions_are_resized():
    backbone = vit()
    table = backbone.pos_embed.detach().clone()
    resize_positions(backbone, 48)
    assert backbone.grid == 6
    assert torch.equal(backbone.pos_embed[:, 0], table[:, 0])
    assert backbone(torch.randn(1, 3, 48, 48)).tokens.shape == (1, 36, 24)
    expected = F.interpolate(table[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2), size=(6, 6), mode="bicubic")
    torch.testing.assert_close(backbone.pos_embed[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 36, 24))


# ------------------------------------------------------------------------------------------------ whole evaluations


def run_small(name: str, data, **options) -> dict:
    how = {"dist": ALONE, "quiet": True, "workers": 1}
    return measure(vit(), str(data), small(name, subset="random:8" if "semi" in name else None), **(how | options))


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", ["semi/sfrik-10pct", "finetune/mae", pytest.param("finetune/mocov3", marks=pytest.mark.slow)])
def test_an_interrupted_evaluation_continues_exactly(name, class_folders, tmp_path, monkeypatch):
    whole = run_small(name, class_folders)
    assert whole["run_as"].startswith(f"{name}, 2 of")
    assert whole["top1"] == max(r["top1"] for r in whole["curve"])
    train_epoch = Tuning.train_epoch

    def dies(self, batches, epoch):
        if epoch == 1:
            raise Killed
        return train_epoch(self, batches, epoch)

    monkeypatch.setattr(Tuning, "train_epoch", dies)
    with pytest.raises(Killed):
        run_small(name, class_folders, out=tmp_path / "r.json")
    monkeypatch.setattr(Tuning, "train_epoch", train_epoch)
    with pytest.raises(ConfigError, match="seed was 0 and is 1"):
        run_small(name, class_folders, out=tmp_path / "r.json", seed=1)
    assert run_small(name, class_folders, out=tmp_path / "r.json") == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.model.pt", "r.state.pt"]
    saved = torch.load(tmp_path / "r.model.pt", weights_only=True)
    assert saved["classes"] == ["class0", "class1", "class2"]


def test_passes_of_a_step_add_up(class_folders):
    """Without BatchNorm and mixing, a step in parts is the step."""
    one, four = (run_small("semi/lewel-10pct", class_folders, forward=n) for n in (8, 2))
    assert (one["passes"], four["passes"]) == (1, 4)
    assert [r["loss"] for r in one["curve"]] == pytest.approx([r["loss"] for r in four["curve"]], rel=1e-4)


def test_errors_say_what_to_change(class_folders, capsys):
    random_resnet = ["--checkpoint", "random:resnet18", "--data", str(class_folders), "--crop", "32", "--resize", "36"]
    for command, flags, message in (
        (finetune.main, ["--batch", "8"], "is of ViTs"),
        (semi.main, ["--epochs", "0", "--subset", "random:2"], "positive"),
        (semi.main, [], "1percent"),
        (semi.main, ["--subset", "random:2", "--crop", "40"], "does not fit"),
        (finetune.main, ["--head-lr", "0.1"], "leave --head-lr out"),
        (finetune.main, ["--queries", "random:2"], "--subset"),
        (semi.main, ["--subset", "random:9", "--queries", "after:4"], "would find themselves"),
    ):
        with pytest.raises(SystemExit) as error:
            command([*random_resnet, *flags])
        assert message in str(error.value), (flags, error.value)


def test_a_set_smaller_than_a_batch_is_refused(class_folders):
    with pytest.raises(DataError, match="fewer than one global batch"):
        measure(vit(), str(class_folders), small("finetune/mae", batch=64), dist=ALONE, quiet=True, workers=1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(class_folders, dtype):
    result = run_small("finetune/mae", class_folders, dtype=dtype)
    assert result["dtype"] == dtype
    assert result["curve"][-1]["loss"] < 2


def test_divergence_is_named(class_folders):
    protocol = small("semi/sfrik-10pct", subset="random:8", base_lr=1e30, head_lr=1e30)
    with pytest.raises(ConfigError, match="diverged"):
        measure(vit(), str(class_folders), protocol, dist=ALONE, quiet=True, workers=1)


def test_command_writes_the_result(class_folders, tmp_path, capsys):
    flags = ["--epochs", "1", "--batch", "8", "--crop", "32", "--resize", "36", "--subset", "random:4", "--workers", "1"]
    semi.main(["--checkpoint", "random:resnet18", "--data", str(class_folders), *flags, "--out", str(tmp_path / "r.json")])
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["protocol"] == "semi/lewel-1pct" and sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "r.model.pt"]
    assert (result["num_train"], result["num_val"], len(result["per_class"])) == (12, 12, 3)
    assert "semi/lewel-1pct, 1 of 50 epochs, batch 8 instead of 256, subset random:4 instead of 1percent" in capsys.readouterr().out
