"""Exports of backbones: each format loaded by the library it is for, strictly, and compared on a fixed batch."""

from __future__ import annotations

import json
import os
import pickle
import resource
from functools import lru_cache
from pathlib import Path
from typing import get_args

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from convert.checkpoint import Args, FormatName, export, main
from convert.exports import FORMATS, Exported, timm_config
from fastssl.checkpoint import FORMAT, CheckpointError
from fastssl.models import keymaps
from fastssl.models.backbones import ARCHITECTURES, build_backbone
from fastssl.models.features import Backbone
from fastssl.models.weights import load_backbone

pytestmark = pytest.mark.slow

SIZE = 32
"""Pixels a side of the images, and of the ViTs' tables."""


@lru_cache
def backbone_of(arch: str, seed: int = 0) -> Backbone:
    """Random weights everywhere, so that no norm is the identity and no bias zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = build_backbone(arch, image_size=224 if arch == "vit_tiny_patch16" else SIZE)
        with torch.no_grad():
            for name, t in backbone.state_dict().items():
                if name.endswith("running_var"):
                    t.uniform_(0.5, 1.5)
                elif t.dim() == 1:
                    t.add_(0.1 * torch.randn_like(t))
    return backbone.eval()


def images(size: int = SIZE, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, str]:
    """A checkpoint of each kind of backbone, by architecture; the method is evaluated by its target."""
    paths = {}
    for arch in ("resnet18", "vit_tiny_patch16", "vit_tiny_patch8_mocov3"):
        nets = {"online": backbone_of(arch, seed=1), "target": backbone_of(arch)}
        path = tmp_path_factory.mktemp(arch) / "checkpoint_last.pt"
        model = {f"{net}.backbone.{name}": t for net, b in nets.items() for name, t in b.state_dict().items()}
        config = {"model": {"arch": arch}, "views": [{"photometric": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}}]}
        about = {"format": FORMAT, "method": "dino", "preset": "dino_mini", "step": 7, "config": config}
        prefixes = {"backbone_prefix": "online.backbone.", "target_backbone_prefix": "target.backbone.", "evaluated": "target"}
        torch.save(about | prefixes | {"model": model}, path)
        paths[arch] = str(path)
    return paths


def exported(runs: dict[str, str], arch: str, format: str, out: Path, **options) -> Path:
    export(Args(runs[arch], format, out, **options))
    return out


def same(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape and (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_every_format_can_be_asked_for():
    assert get_args(FormatName) == tuple(FORMATS)


@torch.no_grad()
def test_resnet_loads_in_torchvision_and_timm(runs, tmp_path):
    expected = backbone_of("resnet18")(images()).pooled
    model = torchvision.models.resnet18().eval()
    model.fc = nn.Identity()
    model.load_state_dict(torch.load(exported(runs, "resnet18", "torchvision", tmp_path / "r.pth")))
    same(model(images()), expected)
    path = exported(runs, "resnet18", "timm", tmp_path / "r.pt")
    same(timm.create_model("resnet18", num_classes=0, checkpoint_path=str(path)).eval()(images()), expected)


@torch.no_grad()
def test_vit_loads_in_timm_and_torchvision(runs, tmp_path):
    expected = backbone_of("vit_tiny_patch16")(images(224))
    path = exported(runs, "vit_tiny_patch16", "timm", tmp_path / "v.pth")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, checkpoint_path=str(path)).eval()
    same(model(images(224)), expected.pooled)
    same(model.forward_features(images(224))[:, 1:], expected.tokens)
    model = torchvision.models.VisionTransformer(224, 16, 12, 3, 192, 768).eval()
    model.heads = nn.Identity()
    model.load_state_dict(torch.load(exported(runs, "vit_tiny_patch16", "torchvision", tmp_path / "t.pth")))
    same(model(images(224)), expected.pooled)


def test_others_may_read_an_export(runs, tmp_path):
    before = os.umask(0o022)
    try:
        files = [
            exported(runs, "resnet18", "safetensors", tmp_path / "b.safetensors"),
            *exported(runs, "resnet18", "huggingface", tmp_path / "f").iterdir(),
        ]
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in files} == {"0o644"}


@torch.no_grad()
@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny_patch8_mocov3"])
def test_timm_opens_the_folder(runs, tmp_path, arch):
    """Twelve heads, patches of 8 and a table of 32 pixels are read from its config.json."""
    folder = exported(runs, arch, "huggingface", tmp_path / "model")
    same(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images()), backbone_of(arch)(images()).pooled)
    assert json.loads((folder / "config.json").read_text())["fastssl"] == {
        "arch": arch,
        "method": "dino",
        "preset": "dino_mini",
        "step": "7",
        "network": "target",
    }
    assert timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{folder}"))["std"] == [0.2, 0.3, 0.4]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_hub_has_every_architecture(arch):
    """Of those that timm has; the names and shapes of its network are ours."""
    with torch.device("meta"):
        e = Exported(build_backbone(arch), arch, {})
        if e.family not in FORMATS["huggingface"].families:
            assert arch.startswith("vit_conv_")
            return
        config = timm_config(e)
        theirs = timm.create_model(config["architecture"], num_classes=0, **config["model_args"]).state_dict()
    assert {name: t.shape for name, t in theirs.items()} == {name: t.shape for name, t in e.state.items()}


@torch.no_grad()
def test_the_heads_of_mocov3_are_said(runs, tmp_path):
    said = export(Args(runs["vit_tiny_patch8_mocov3"], "timm", tmp_path / "v.pth"))
    assert f"timm.create_model(..., num_heads=12, num_classes=0, checkpoint_path='{tmp_path / 'v.pth'}')" in said
    options = {"img_size": SIZE, "patch_size": 8, "num_heads": 12, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **options, checkpoint_path=str(tmp_path / "v.pth")).eval()
    same(model(images()), backbone_of("vit_tiny_patch8_mocov3")(images()).pooled)
    assert "# no head, num_heads=12" in export(Args(runs["vit_tiny_patch8_mocov3"], "torchvision", tmp_path / "t.pth"))
    assert "num_heads" not in export(Args(runs["vit_tiny_patch16"], "timm", tmp_path / "u.pth"))


@torch.no_grad()
def test_layer_scale_is_timms_only(tmp_path):
    torch.manual_seed(0)
    vit = build_backbone("vit_tiny_patch8", image_size=SIZE, layer_scale=0.5).eval()
    torch.save(vit.state_dict(), tmp_path / "w.pt")
    export(Args(str(tmp_path / "w.pt"), "huggingface", tmp_path / "model"))
    same(timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()(images()), vit(images()).pooled)
    with pytest.raises(CheckpointError, match="torchvision has no network that vit_tiny_patch8 with LayerScale would fit"):
        export(Args(str(tmp_path / "w.pt"), "torchvision", tmp_path / "t.pth"))


def test_safetensors_load_here_again(runs, tmp_path):
    path = exported(runs, "vit_tiny_patch8_mocov3", "safetensors", tmp_path / "v.safetensors", network="online")
    backbone, about = load_backbone(str(path))
    assert (about["arch"], about["step"], about["preset"]) == ("vit_tiny_patch8_mocov3", 7, "dino_mini")
    assert about["normalisation"] == {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    expected = backbone_of("vit_tiny_patch8_mocov3", seed=1).state_dict()
    assert backbone.state_dict().keys() == expected.keys() == load_file(path).keys()
    assert all(torch.equal(t, expected[name]) for name, t in backbone.state_dict().items())


def test_folders_for_the_hub_load_here_again(runs, tmp_path):
    folder = exported(runs, "resnet18", "huggingface", tmp_path / "model")
    backbone, about = load_backbone(str(folder / "model.safetensors"))
    assert (about["arch"], about["step"], about["preset"], about["network"]) == ("resnet18", 7, "dino_mini", "target")
    assert about["normalisation"] == {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    (folder / "config.json").write_text('{"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}')  # as timm's
    _, about = load_backbone(str(folder / "model.safetensors"))
    assert (about["normalisation"]["std"], about["network"], about["step"]) == ((0.5, 0.5, 0.5), "online", None)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json, which belongs to .*Copy the folder again"):
        load_backbone(str(folder / "model.safetensors"))


def test_detectron2(runs, tmp_path):
    expected = backbone_of("resnet18").state_dict()
    saved = pickle.loads(exported(runs, "resnet18", "detectron2", tmp_path / "d.pkl").read_bytes())
    assert saved.keys() == {"model", "__author__", "matching_heuristics"} and saved["matching_heuristics"] is True
    fpn = torch.load(exported(runs, "resnet18", "detectron2-fpn", tmp_path / "d.pth"))
    for state, there in ((saved["model"], keymaps.detectron2), (fpn, keymaps.detectron2_fpn)):
        named = keymaps.renamed(expected, there)
        assert state.keys() == named.keys() and all(torch.equal(torch.as_tensor(t), named[name]) for name, t in state.items())


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("conv1.weight", "stem.conv1.weight"),
        ("bn1.bias", "stem.conv1.norm.bias"),
        ("layer4.0.downsample.1.running_mean", "res5.0.shortcut.norm.running_mean"),
        ("layer1.1.conv3.weight", "res2.1.conv3.weight"),
    ],
)
def test_detectron2_names(name, there):
    assert keymaps.detectron2(name) == there
    assert keymaps.detectron2_fpn(name) == f"backbone.bottom_up.{there}"
    assert keymaps.detectron2_c4(name) == ("roi_heads." if "res5" in there else "backbone.") + there


def test_openmmlab(runs, tmp_path):
    state = torch.load(exported(runs, "resnet18", "mmseg", tmp_path / "r.pth"))["state_dict"]
    assert state.keys() == backbone_of("resnet18").state_dict().keys()
    expected = backbone_of("vit_tiny_patch16").state_dict()
    state = torch.load(exported(runs, "vit_tiny_patch16", "mmdet", tmp_path / "v.pth"))["state_dict"]
    assert state.keys() == expected.keys()
    state = torch.load(exported(runs, "vit_tiny_patch16", "mmseg", tmp_path / "v.pt"))["state_dict"]
    assert len(state) == len(expected) and torch.equal(state["layers.3.ffn.layers.1.bias"], expected["blocks.3.mlp.fc2.bias"])


@torch.no_grad()
@pytest.mark.parametrize("arch", [pytest.param("resnet18", marks=pytest.mark.slow), "vit_tiny_patch8_mocov3"])
def test_onnx_takes_any_batch(runs, tmp_path, arch):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = exported(runs, arch, "onnx", tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = images(SIZE if arch.startswith("vit") else 224, batch)
        expected = backbone_of(arch)(x)
        pooled, spatial = (torch.from_numpy(a) for a in session.run(None, {"images": x.numpy()}))
        same(pooled, expected.pooled)
        same(spatial, expected.map if expected.tokens is None else expected.tokens)


def test_onnx_without_its_packages(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("convert.exports.find_spec", lambda package: None)
    with pytest.raises(CheckpointError, match="needs onnx and onnxscript: pip install"):
        exported(runs, "resnet18", "onnx", tmp_path / "m.onnx")


# ------------------------------------------------------------------------------------------------ files


def test_nothing_is_replaced_unasked(runs, tmp_path):
    path = exported(runs, "resnet18", "timm", tmp_path / "new" / "r.pth")
    with pytest.raises(CheckpointError, match="exists already. Add --overwrite"):
        exported(runs, "resnet18", "torchvision", path)
    online = torch.load(exported(runs, "resnet18", "torchvision", path, overwrite=True, network="online"))
    assert torch.equal(online["conv1.weight"], backbone_of("resnet18", seed=1).conv1.weight)
    folder = exported(runs, "resnet18", "huggingface", tmp_path / "model")
    (folder / "README.md").write_text("card")
    exported(runs, "resnet18", "huggingface", folder, overwrite=True)
    assert {p.name for p in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    with pytest.raises(CheckpointError, match="is a file"):
        exported(runs, "resnet18", "huggingface", path, overwrite=True)


@pytest.mark.parametrize(
    ("form", "name"), [("timm", "r.pth"), ("safetensors", "r.safetensors"), ("detectron2", "r.pkl"), ("huggingface", "r")]
)
def test_a_full_disk_leaves_what_was_there(runs, tmp_path, form, name):
    """Of a disk that takes no file of more than 1 MB."""
    path = exported(runs, "resnet18", form, tmp_path / name)
    before = [(p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=f"Could not write {path}: .*File too large.* Free some space, or choose another place"):
            exported(runs, "resnet18", form, path, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [(p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")] == before


def test_what_does_not_go_together_is_refused(runs, tmp_path, capsys):
    with pytest.raises(CheckpointError, match="detectron2 has no network that vit_tiny_patch16 would fit.*torchvision, timm"):
        exported(runs, "vit_tiny_patch16", "detectron2", tmp_path / "v.pkl")
    with pytest.raises(CheckpointError, match="written to .pkl files"):
        exported(runs, "resnet18", "detectron2", tmp_path / "r.pth")
    with pytest.raises(CheckpointError, match="timm has no network that vit_conv_small_mocov3 would fit"):
        export(Args("random:vit_conv_small_mocov3", "timm", tmp_path / "c.pth"))
    with pytest.raises(SystemExit, match="There is no checkpoint"):
        main(["nowhere.pt", "--format", "timm", "--out", str(tmp_path / "x.pth")])
    assert not list(tmp_path.iterdir())
    main([runs["resnet18"], "--format", "timm", "--out", str(tmp_path / "x.pth")])
    assert "resnet18, method dino, preset dino_mini, step 7, network target" in capsys.readouterr().out
