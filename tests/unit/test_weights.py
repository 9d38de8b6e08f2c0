import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from fastssl.checkpoint import FORMAT, CheckpointError
from fastssl.models.backbones import build_backbone
from fastssl.models.weights import load_backbone


def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    backbone = build_backbone("resnet18")
    with torch.no_grad():
        backbone.bn1.running_mean.fill_(seed)
    return backbone.state_dict()


def same(backbone, state) -> bool:
    return all(torch.equal(t, state[name]) for name, t in backbone.state_dict().items())


def run_checkpoint(**changes) -> dict:
    online, target = weights(1), weights(2)
    model = {f"online.backbone.{n}": t for n, t in online.items()} | {f"target.backbone.{n}": t for n, t in target.items()}
    return {
        "format": FORMAT,
        "method": "byol",
        "preset": "byol_mini",
        "config": {"model": {"arch": "resnet18"}},
        "model": model | {"online.projector.0.weight": torch.ones(2, 2)},
        "backbone_prefix": "online.backbone.",
        "target_backbone_prefix": "target.backbone.",
        "step": 70,
    } | changes


def test_run_checkpoint(tmp_path):
    path = tmp_path / "checkpoint_last.pt"
    torch.save(run_checkpoint(), path)
    backbone, about = load_backbone(str(path))
    assert same(backbone, weights(1)) and not backbone.training
    assert (about["source"], about["arch"], about["method"], about["step"], about["network"]) == ("run", "resnet18", "byol", 70, "online")
    backbone, about = load_backbone(str(path), network="target", arch="resnet18")
    assert same(backbone, weights(2)) and about["network"] == "target"


def test_safetensors(tmp_path):
    path = tmp_path / "backbone.safetensors"
    save_file(weights(3), path, metadata={"arch": "resnet18", "step": "12"})
    backbone, about = load_backbone(str(path))
    assert same(backbone, weights(3))
    assert (about["arch"], about["step"], about["dropped"]) == ("resnet18", 12, {})
    said = {"network": "target", "method": "dino", "mean": "0.5 0.4 0.3", "std": "0.2 0.2 0.1"}
    save_file(weights(3), path, metadata={"arch": "resnet18", **said})
    _, about = load_backbone(str(path), network="target")
    assert (about["network"], about["method"], about["normalisation"]["mean"]) == ("target", "dino", (0.5, 0.4, 0.3))
    with pytest.raises(CheckpointError, match="holds the target network only"):
        load_backbone(str(path), network="online")


@pytest.mark.parametrize("file", ["backbone.safetensors", "checkpoint_last.pt"])
def test_the_file_names_what_shapes_do_not_tell(tmp_path, file):
    arch, path = "vit_tiny_patch8_mocov3", tmp_path / file
    state = build_backbone(arch, image_size=64).state_dict()
    if file.endswith(".pt"):
        model = {f"online.backbone.{n}": t for n, t in state.items()}
        torch.save(run_checkpoint(model=model, config={"model": {"arch": arch}}), path)
    else:
        save_file(state, path, metadata={"arch": arch})
    backbone, about = load_backbone(str(path))
    assert (about["arch"], backbone.blocks[0].attn.num_heads) == (arch, 12)
    with pytest.raises(CheckpointError, match=f"holds a {arch}, not the vit_tiny_patch8 asked for"):
        load_backbone(str(path), arch="vit_tiny_patch8")


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_torchvision_state_dict_drops_and_reports_fc(tmp_path, arch):
    path = tmp_path / "model.pth"
    model = torchvision.models.get_model(arch)
    # files older than the counters have none
    torch.save({n: t for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}, path)
    backbone, about = load_backbone(str(path))
    assert same(backbone, model.state_dict())
    assert (about["arch"], about["dropped"]) == (arch, {"fc.bias": "of a head", "fc.weight": "of a head"})


def test_timm_state_dict_drops_and_reports_head(tmp_path):
    path = tmp_path / "model.pth"
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    torch.save(model.state_dict(), path)
    backbone, about = load_backbone(str(path))
    assert same(backbone, model.state_dict())
    assert (about["arch"], about["dropped"]) == ("vit_tiny_patch16", {"head.bias": "of a head", "head.weight": "of a head"})
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(backbone(x).pooled, model.forward_features(x)[:, 0])


@pytest.mark.parametrize(("patch", "image_size"), [(8, 64), (16, 384)])
def test_a_transformers_table_and_patches_are_read_from_the_shapes(tmp_path, patch, image_size):
    state = build_backbone(f"vit_tiny_patch{patch}", image_size=image_size).state_dict()
    path = tmp_path / "checkpoint_last.pt"
    torch.save(run_checkpoint(model={f"online.backbone.{n}": t for n, t in state.items()}), path)
    backbone, about = load_backbone(str(path))
    assert same(backbone, state) and backbone.grid == image_size // patch
    assert (about["arch"], about["dropped"]) == (f"vit_tiny_patch{patch}", {})
    assert backbone(torch.zeros(1, 3, 32, 32)).pooled.shape == (1, 192)


def test_transformers_that_fit_none_are_refused(tmp_path):
    path, state = tmp_path / "w.pt", build_backbone("vit_tiny_patch8", image_size=32).state_dict()
    for name, shape, message in (
        ("pos_embed", (1, 16, 192), "1 of another shape .pos_embed"),
        ("pos_embed", (1, 0, 192), "1 of another shape .pos_embed"),
        ("pos_embed", (1, 2, 192), "1 of another shape .pos_embed"),
        ("pos_embed", (17, 192), "1 of another shape .pos_embed"),
        ("patch_embed.proj.weight", (192, 192), "1 of another shape .patch_embed"),
        ("cls_token", (1, 2, 192), "1 of another shape .cls_token"),
    ):
        torch.save(state | {name: torch.zeros(shape)}, path)
        with pytest.raises(CheckpointError, match=f"fits no backbone exactly. Closest is vit_tiny_patch.*: {message}"):
            load_backbone(str(path))


def test_random_backbones_are_reproducible_and_draw_from_nobody():
    state = torch.get_rng_state()
    a, b, c, default = (load_backbone(f"random:resnet18{s}")[0] for s in (":5", ":5", ":6", ""))
    assert torch.equal(state, torch.get_rng_state())
    assert same(a, b.state_dict()) and not torch.equal(a.conv1.weight, c.conv1.weight)
    assert same(default, load_backbone("random:resnet18:0")[0].state_dict())
    assert not a.training
    vit, about = load_backbone("random:vit_tiny_patch16:5")
    assert (about["arch"], vit.grid) == ("vit_tiny_patch16", 14)
    assert same(vit, load_backbone("random:vit_tiny_patch16:5")[0].state_dict())


class Foreign:
    pass


def test_damaged_files_of_torchs_old_format(tmp_path):
    """They end in errors of any type, struct.error, IndexError and AssertionError among them."""
    whole, path = tmp_path / "whole.pt", tmp_path / "w.pt"
    torch.save({"conv1.weight": torch.zeros(3), "epoch": [1, "two"]}, whole, _use_new_zipfile_serialization=False)
    content = whole.read_bytes()
    for place in range(0, len(content) - 1, 3):
        for damaged in (content[:place], content[:place] + bytes([content[place] ^ 0x5A]) + content[place + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                load_backbone(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a checkpoint", "cannot be read"),
        (b"", "cannot be read"),
        (Foreign(), "cannot be read"),
        ([1, 2], "holds a list"),
        ({"state_dict": {}, "epoch": 3}, "holds a dictionary of state_dict, epoch"),
        ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "fits no backbone exactly. Closest is .* missing"),
        (weights(0) | {"surplus": torch.zeros(1)}, r"Closest is resnet18: 1 unexpected \(surplus\)"),
        (weights(0) | {"conv1.weight": torch.zeros(64, 3, 3, 3)}, r"1 of another shape \(conv1.weight\)"),
        (weights(0) | {"conv1.weight": torch.full((64, 3, 7, 7), float("nan"))}, "not finite"),
        (run_checkpoint(format="fastssl-0"), "format fastssl-0"),
        ({"format": "fastssl-linear-2", "run_as": "linear/dino", "about": []}, r"evaluation made \(linear/dino\).*--head"),
        ({"protocol": "voc/fcn-a", "run_as": "voc/fcn-a", "model": weights(0)}, "Give the one that was evaluated[.]"),
        ({0: torch.zeros(1)}, "holds a dictionary of 0, not weights by name"),
        ({"identity": {}, "step": 3, "model": weights(0)}, "the state of an unfinished evaluation"),
    ],
    ids="garbage empty pickle list nested incomplete surplus reshaped nan other-version head model numbered state".split(),
)
def test_unusable_files_are_refused_in_one_paragraph(tmp_path, content, message):
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as error:
        load_backbone(str(path))
    assert "\n" not in str(error.value)


def test_wrong_requests_are_refused(tmp_path):
    path = tmp_path / "w.pt"
    torch.save(weights(0), path)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_backbone(str(tmp_path / "absent.pt"))
    with pytest.raises(CheckpointError, match="holds a resnet18, not the resnet50"):
        load_backbone(str(path), arch="resnet50")
    with pytest.raises(CheckpointError, match="one network only"):
        load_backbone(str(path), network="target")
    torch.save(run_checkpoint(target_backbone_prefix=None), path)
    with pytest.raises(CheckpointError, match="byol, which has no target"):
        load_backbone(str(path), network="target")
    for name in ("random:resnet34", "random:resnet18:x", "random:resnet18:1:2"):
        with pytest.raises(CheckpointError, match="no random backbone"):
            load_backbone(name)


def test_truncated_file(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(weights(0), path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match="cut short"):
        load_backbone(str(path))
