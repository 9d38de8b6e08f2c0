import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from eval.segmentation import __main__ as command
from eval.segmentation import training
from eval.segmentation.datasets import open_annotated
from eval.segmentation.images import Batches, Crops, bilinear, nearest, random_window
from eval.segmentation.inference import slide
from eval.segmentation.model import build
from eval.segmentation.picture import colours
from eval.segmentation.protocols import SEGMENTATION_PROTOCOLS, changed
from eval.segmentation.training import Segmentation
from eval.segmentation.trunks import ViTMaps
from fastssl.config import ConfigError
from fastssl.distributed import Dist
from fastssl.models.backbones import build_backbone
from fastssl.models.vit import ViT
from fastssl.views import Photometric
from loaders.errors import DataError
from tests.segments import COLOURS, write_imagenets, write_voc

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("voc"))


@pytest.fixture(scope="module")
def imagenets(tmp_path_factory):
    return write_imagenets(tmp_path_factory.mktemp("imagenets"))


def vit() -> ViT:
    torch.manual_seed(0)
    return ViT(24, 6, 2, 8, image_size=32)


def small(name: str, **options):
    """The protocol on 32 pixels, 2 images a step."""
    length = {"epochs": 2} if SEGMENTATION_PROTOCOLS[name].steps is None else {"steps": 4}
    return changed(SEGMENTATION_PROTOCOLS[name], **({"batch": 2, "crop": 32} | length | options))


# ------------------------------------------------------------------------------------------------ published values


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("voc/fcn-a", {"steps": 20000, "lr": 0.01, "weight_decay": 5e-4, "crop": 512, "box": (2048, 512), "colours": "photometric"}),
        ("voc/fcn-b", {"steps": 30000, "lr": 0.003, "weight_decay": 1e-4, "crop": 513, "box": (2049, 513), "milestones": (21000, 27000)}),
        ("ade20k/upernet-vits", {"steps": 160000, "lr": 3e-5, "layer_decay": 0.9, "drop_path": 0.1, "stride": 341, "dtype": "fp16"}),
        ("ade20k/upernet-vitb", {"lr": 8e-5, "layer_decay": 0.65, "weight_decay": 0.05, "warmup": 1500, "positions_decay": True}),
        ("ade20k/linear-vitb", {"lr": 8e-4, "drop_path": 0.0, "head": "linear", "batch": 16, "largest_share": 0.75}),
        ("imagenets/sere", {"epochs": 100, "batch": 256, "lr": 5e-4, "layer_decay": 0.5, "warmup": 5, "scale": (0.14, 1.0), "crop": 224}),
    ],
)
def test_published_values(name, values, capsys):
    command.main(["--protocol", name, "--dry-run"])
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    protocol = SEGMENTATION_PROTOCOLS[name]
    for key, value in values.items():
        assert getattr(protocol, key) == value
        assert printed[key] == str(value)
    assert protocol.run_as(protocol.train_images, protocol.val_images) == name


def test_learning_rates():
    fcn, ade, sere = (SEGMENTATION_PROTOCOLS[n] for n in ("voc/fcn-a", "ade20k/upernet-vits", "imagenets/sere"))
    assert fcn.rate(0, 10582) == 0.01
    assert fcn.rate(10_000, 10582) == pytest.approx(0.0099 * 0.5**0.9 + 1e-4)
    assert ade.rate(0, 20210) == pytest.approx(3e-11)
    assert ade.rate(1500, 20210) == pytest.approx(3e-5 * (1 - 1500 / 160_000))
    assert [SEGMENTATION_PROTOCOLS["voc/fcn-b"].rate(i, 1) for i in (20_999, 21_000, 27_000)] == pytest.approx([3e-3, 3e-4, 3e-5])
    assert sere.rate(5 * 35, 9190) == pytest.approx(5e-4)  # 35 batches of 256 an epoch
    assert changed(sere, batch=512).rate(5 * 17, 9190) == pytest.approx(1e-3)


def test_changes_are_named_and_scale():
    protocol = changed(SEGMENTATION_PROTOCOLS["voc/fcn-b"], steps=300, crop=171, batch=4)
    assert (protocol.milestones, protocol.box, protocol.test_box) == ((210, 270), (683, 171), (683, 171))
    name = protocol.run_as(10582, 33)
    assert name == "voc/fcn-b, steps 300 instead of 30000, batch 4 instead of 16, crop 171 instead of 513, validation images 33 of 1449"
    assert changed(SEGMENTATION_PROTOCOLS["ade20k/upernet-vits"], crop=256).stride == 170


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--protocol", "imagenets/sere", "--steps", "3"], "set --epochs"),
        (["--crop", "8"], "--crop"),
        (["--batch", "1"], "--batch"),
        (["--moco-first-dilation", "2"], "voc/fcn-b"),
        (["--protocol", "imagenets/sere", "--ce-norm", "all"], "--ce-norm"),
        (["--protocol", "ade20k/linear-vitb", "--test-box", "9", "9"], "--test-box"),
        ([], "--checkpoint"),
        (["--checkpoint", "random:resnet18", "--data", "/nowhere"], "--data"),
    ],
)
def test_impossible_flags(flags, message):
    with pytest.raises(SystemExit, match=message):
        command.main(flags)


# ------------------------------------------------------------------------------------------------ images


def test_resizing():
    image = np.random.default_rng(0).integers(0, 256, (23, 31, 3), dtype=np.uint8)
    theirs = F.interpolate(torch.from_numpy(image).permute(2, 0, 1)[None].float(), (40, 17), mode="bilinear")[0].permute(1, 2, 0)
    ours = bilinear(image, (40, 17))
    assert np.abs(ours - theirs.numpy()).max() <= 0.51
    window = (slice(5, 21), slice(3, 12))
    assert np.array_equal(bilinear(image, (40, 17), window), ours[window])
    assert np.array_equal(nearest(image[..., 0], (46, 62)), image[..., 0].repeat(2, 0).repeat(2, 1))


def test_windows_with_two_classes_are_preferred():
    label = np.zeros((60, 200), np.uint8)
    label[:, 100:] = 1
    label[:30] = 255
    shares = []
    for seed in range(30):
        inside = label[random_window(label, 40, 0.75, 255, np.random.default_rng(seed))]
        counts = np.bincount(inside[inside != 255])
        shares.append(counts.max() / counts.sum())
    assert np.mean(np.array(shares) < 0.75) > 0.7  # a single draw: one in eight


@pytest.mark.parametrize("name", ["voc/fcn-b", "imagenets/sere"])
def test_crops_keep_image_and_label_together(name, voc, imagenets):
    data = open_annotated(str(voc), "voc") if name == "voc/fcn-b" else open_annotated(str(imagenets), "imagenets")
    crops = Crops(data, replace(small(name, crop=48), colours="none"), Photometric(), seed=0)
    mean, std = (np.array(t, np.float32) for t in (Photometric().mean, Photometric().std))
    seen = set()
    for number in range(len(data.train)):
        x, y = crops(0, number)
        again, later = crops(0, number), crops(1, number)
        assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and not torch.equal(x, later[0])
        levels = (x.permute(1, 2, 0).numpy() * std + mean) * 255
        label = y.numpy()
        nearest_class = np.square(levels[:, :, None] - COLOURS.astype(np.float32)).sum(-1).argmin(-1)
        labelled = label != data.ignore
        assert (nearest_class == label)[labelled].mean() > 0.9  # borders are mixed
        seen |= set(np.unique(label[labelled]).tolist())
    assert seen == {0, 1, 2, 3}


def test_small_images_are_padded(voc):
    data = open_annotated(str(voc), "voc")
    protocol = replace(small("voc/fcn-a", crop=64), scale=(0.5, 0.5))
    x, y = Crops(data, protocol, Photometric(), seed=0)(0, 0)
    assert (y[32:] == 255).all() and (x[:, 32:] == 0).all() and (x[:, :32] != 0).any()


def test_batches_do_not_depend_on_ranks_or_resuming():
    protocol = small("voc/fcn-a", batch=4, steps=6)

    def batches(rank: int, world: int, **options) -> Batches:
        crops = lambda epoch, number: (torch.tensor(epoch), torch.tensor(number))  # noqa: E731
        return Batches(crops, 6, replace(protocol, **options), dist=Dist(rank, world, 0, 1, ALONE.device), seed=3, threads=1)

    alone = [batches(0, 1).numbers(step) for step in range(6)]
    shared = [[sorted(batches(r, 2).numbers(step)) for r in (0, 1)] for step in range(6)]
    assert [sorted(a + b) for a, b in shared] == [sorted(numbers) for numbers in alone]
    images = sum(alone, [])
    assert [n for _, n in images[:6]] != [n for _, n in images[6:12]]
    for epoch in range(3):  # of an endless shuffle
        assert sorted(images[6 * epoch : 6 * (epoch + 1)]) == [(epoch, number) for number in range(6)]
    by_epoch = sum((batches(0, 1, steps=None, epochs=2).numbers(step) for step in range(2)), [])
    assert [e for e, _ in by_epoch] == [0] * 4 + [1] * 4  # the rest of two images is left out


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda r: (r / "SegmentationClass/train3.png").unlink(), "1 files for training are missing"),
        (lambda r: (r / "JPEGImages/val0.jpg").write_bytes(b"no"), "val0.jpg cannot be used"),
        (lambda r: (r / "ImageSets/Segmentation/val.txt").write_text(""), "no images for validation"),
        (lambda r: (r / "ImageSets/Segmentation/train.txt").unlink(), "There is no"),
        (lambda r: Image.new("L", (9, 9)).save(r / "SegmentationClass/train0.png"), "do not belong together"),
        (lambda r: Image.new("L", (60, 44), 21).save(r / "SegmentationClass/train0.png"), "the label 21"),
        (lambda r: Image.new("RGB", (60, 44)).save(r / "SegmentationClass/train0.png"), "numbers of a palette"),
    ],
)
def test_bad_annotations(break_it, message, tmp_path):
    root = write_voc(tmp_path / "voc", train=4, val=1)
    break_it(root)
    with pytest.raises(DataError, match=message):
        open_annotated(str(root), "voc")


def test_other_formats(imagenets, tmp_path):
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / "ade" / kind / split).mkdir(parents=True)
        Image.new("RGB", (4, 3)).save(tmp_path / f"ade/images/{split}/a.jpg")
        Image.fromarray(np.array([[0, 1, 150, 2]] * 3, np.uint8)).save(tmp_path / f"ade/annotations/{split}/a.png")
    ade = open_annotated(str(tmp_path / "ade"), "ade20k")
    assert ade.read(ade.train[0])[1][0].tolist() == [255, 0, 149, 1]
    data = open_annotated(str(imagenets), "imagenets")
    assert (data.classes, len(data.train), len(data.val)) == (4, 6, 3)
    assert data.read(data.val[0])[1][0, 0] == 1000


def test_annotations_of_sbd_are_added(tmp_path):
    root = write_voc(tmp_path / "voc", train=2, val=1)
    (root / "SegmentationClassAug").mkdir()
    for name in ("train0", "train1"):
        shutil.copy(root / f"SegmentationClass/{name}.png", root / "SegmentationClassAug")
    (root / "ImageSets/Segmentation/train.txt").write_text("train0\n")
    (root / "ImageSets/Segmentation/aug.txt").write_text("train0\ntrain1\n")
    assert [p.label.parent.name for p in open_annotated(str(root), "voc").train] == ["SegmentationClass", "SegmentationClassAug"]


# ------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize(("part", "what"), [("train", "training"), ("val", "validation")])
def test_labels_of_which_none_counts_are_refused(tmp_path, part, what):
    root = write_voc(tmp_path / "voc")
    labels = sorted((root / "SegmentationClass").glob(f"{part}*.png"))
    for path in reversed(labels):
        open_annotated(str(root), "voc")
        with Image.open(path) as label:
            label.putdata([255] * (label.width * label.height))
            label.save(path)
    with pytest.raises(DataError, match=f"No pixel of the labels for {what} in .* counts: all are 255"):
        open_annotated(str(root), "voc")


def test_sliding_a_pointwise_network_is_the_whole_image():
    torch.manual_seed(0)
    x, pointwise = torch.randn(1, 3, 520, 680), torch.nn.Conv2d(3, 2, 1)
    with torch.no_grad():
        torch.testing.assert_close(slide(pointwise, x, 512, 341), pointwise(x))


def test_maps_of_a_vit():
    network = vit()
    maps = ViTMaps(network, image_size=32)(torch.randn(2, 3, 32, 32))
    assert [tuple(m.shape) for m in maps] == [(2, 24, 16, 16), (2, 24, 8, 8), (2, 24, 4, 4), (2, 24, 2, 2)]
    plain = ViTMaps(network, image_size=32, pyramid=False).eval()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(plain(x)[-1].flatten(2).transpose(1, 2), network.eval()(x).tokens)
    with pytest.raises(ConfigError, match="at least 6"):
        ViTMaps(ViT(24, 2, 2, 8, image_size=32), image_size=32)


def test_what_learns_and_decays(voc):
    data = open_annotated(str(voc), "voc")
    run = Segmentation(vit(), replace(small("ade20k/upernet-vits"), data="voc"), data, ALONE, torch.float32, workers=1)
    groups = {name: group for group in run.optimizer.param_groups for name in group["names"]}
    assert (groups["pos_embed"]["weight_decay"], groups["blocks.0.attn.qkv.bias"]["weight_decay"]) == (0.05, 0)
    scales = [groups[n]["lr_scale"] for n in ("cls_token", "blocks.5.mlp.fc1.weight", "norm.weight", "trunk.pyramid.0.0.weight")]
    assert scales == pytest.approx([0.9**7, 0.9, 1, 1])

    linear = build(vit(), small("ade20k/linear-vitb"), 5)
    assert [n for n, _ in linear.trained()] == ["head.conv_seg.weight", "head.conv_seg.bias"]
    assert linear.head.conv_seg.weight.shape == (5, 96, 1, 1)
    assert not linear.train().trunk.backbone.training
    for protocol, backbone in (("voc/fcn-a", vit()), ("imagenets/sere", build_backbone("resnet18"))):
        with pytest.raises(ConfigError, match="--protocol"):
            build(backbone, small(protocol), 5)


@pytest.mark.parametrize("name", ["voc/fcn-a", "voc/fcn-b", "ade20k/upernet-vits", "ade20k/linear-vitb", "imagenets/sere"])
def test_first_loss_is_that_of_guessing(name, voc, imagenets):
    """ln(classes), times the share of labelled pixels where all are divided by; the auxiliary head alike."""
    protocol = small(name)
    data = open_annotated(str(imagenets), "imagenets") if protocol.data == "imagenets" else open_annotated(str(voc), "voc")
    backbone = build_backbone("resnet18") if protocol.head.startswith("fcn") else vit()
    run = Segmentation(backbone, protocol, data, ALONE, torch.float32, workers=1)
    x, y = next(run.batches.from_step(0))
    run.model.train()
    head, auxiliary = run.step(x, y, 0).tolist()
    share = 1 if protocol.valid_only else float((y != data.ignore).float().mean())
    assert head == pytest.approx(math.log(data.classes) * share, rel=0.06)
    assert auxiliary == pytest.approx(head, rel=0.1) if run.model.auxiliary is not None else auxiliary == 0


def test_colours_of_voc():
    assert colours()[[0, 1, 2, 15, 20, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [192, 128, 128],
        [0, 64, 128],
        [224, 224, 192],
    ]


# ------------------------------------------------------------------------------------------------ the command


class Stop(Exception):
    pass


def test_an_interrupted_run_ends_as_an_unbroken_one(imagenets, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVED", 2)
    monkeypatch.setattr(training, "SHOWN", 1)
    data = open_annotated(str(imagenets), "imagenets")

    def run(out, **options) -> dict:
        return command.measure(vit(), data, small("imagenets/sere"), dist=ALONE, out=out, workers=1, quiet=True, **options)

    unbroken = run(None)
    step = Segmentation.step

    def stopping(self, x, y, number):
        if number == 3:
            raise Stop
        return step(self, x, y, number)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Segmentation, "step", stopping)
        run(tmp_path / "r.json")
    with pytest.raises(ConfigError, match="seed was 0 and is 1"):
        run(tmp_path / "r.json", seed=1)
    continued = run(tmp_path / "r.json")
    assert [r["step"] for r in continued["curve"]] == [1, 2, 3, 4, 5, 6]
    assert continued == unbroken
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.model.pt", "r.state.pt"]


def test_command(voc, tmp_path, capsys):
    out, picture = tmp_path / "r.json", tmp_path / "r.png"
    flags = [
        "--checkpoint",
        "random:resnet18",
        "--data",
        str(voc),
        "--protocol",
        "voc/fcn-b",
        "--steps",
        "2",
        "--batch",
        "4",
        "--crop",
        "32",
    ]
    command.main([*flags, "--lr", "0.02", "--workers", "1", "--out", str(out), "--picture", str(picture)])
    result = json.loads(out.read_text())
    assert result["run_as"].startswith("voc/fcn-b, steps 2 instead of 30000, batch 4 instead of 16, lr 0.02 instead of 0.003, crop 32")
    assert 0 < result["mIoU"] < 100 and result["iou"]["cow"] is None
    assert "mIoU" in capsys.readouterr().out and not (tmp_path / "r.state.pt").exists()
    assert Image.open(picture).size[1] > 3 * 160
