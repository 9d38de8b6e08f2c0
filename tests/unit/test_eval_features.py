from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from eval.features import extract, load_backbone
from fastssl.batch import Group, Views
from fastssl.checkpoint import FORMAT, CheckpointError
from fastssl.models.backbones import build_backbone


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
    assert (about["arch"], about["step"], about["dropped"]) == ("resnet18", 12, [])


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_torchvision_state_dict_drops_and_reports_fc(tmp_path, arch):
    path = tmp_path / "model.pth"
    model = torchvision.models.get_model(arch)
    # files older than the counters have none
    torch.save({n: t for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}, path)
    backbone, about = load_backbone(str(path))
    assert same(backbone, model.state_dict())
    assert (about["arch"], about["dropped"]) == (arch, ["fc.bias", "fc.weight"])


def test_timm_state_dict_drops_and_reports_head(tmp_path):
    path = tmp_path / "model.pth"
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    torch.save(model.state_dict(), path)
    backbone, about = load_backbone(str(path))
    assert same(backbone, model.state_dict())
    assert (about["arch"], about["dropped"]) == ("vit_tiny_patch16", ["head.bias", "head.weight"])
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
    assert (about["arch"], about["dropped"]) == (f"vit_tiny_patch{patch}", [])
    assert backbone(torch.zeros(1, 3, 32, 32)).pooled.shape == (1, 192)


def test_transformers_that_fit_none_are_refused(tmp_path):
    path, state = tmp_path / "w.pt", build_backbone("vit_tiny_patch8", image_size=32).state_dict()
    for name, shape, message in (
        ("pos_embed", (1, 16, 192), "1 of another shape .pos_embed"),
        ("pos_embed", (1, 0, 192), "1 of another shape .pos_embed"),
        ("pos_embed", (1, 2, 192), "1 of another shape .pos_embed"),
        ("pos_embed", (17, 192), "1 of another shape .pos_embed"),
        ("patch_embed.proj.weight", (192, 192), "2 of another shape .p"),
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
    ],
    ids=["garbage", "empty", "pickle", "list", "nested", "incomplete", "surplus", "reshaped", "nan", "other-version"],
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


# ------------------------------------------------------------------------------------------------ extract


def batches(*sizes):
    """Batches whose buffers the loader reuses, as loaders may."""
    start, index, label = 0, torch.empty(8, dtype=torch.long), torch.empty(8, dtype=torch.long)
    for n in sizes:
        index[:n] = torch.arange(start, start + n)
        label[:n] = 10 * index[:n]
        yield SimpleNamespace(index=index[:n], label=label[:n])
        start += n


def images_of(batch) -> Views:
    """One view whose pixels are a function of the sample id."""
    pixels = torch.sin(batch.index[:, None].float() * torch.arange(1, 3 * 32 * 32 + 1)).view(-1, 3, 32, 32)
    none = torch.empty(0)
    return Views(groups=(Group(32, (0,), pixels),), boxes=none, flips=none, source_hw=none, index=batch.index)


def test_extract_keeps_order_and_ids():
    backbone, _ = load_backbone("random:resnet18")
    found = extract(backbone, batches(8, 8, 3), images_of, torch.float32)
    assert found.index.tolist() == list(range(19)) and found.labels.tolist() == [10 * i for i in range(19)]
    assert found.features.shape == (19, 512) and found.features.dtype == torch.float32
    with torch.no_grad():
        (images,) = images_of(SimpleNamespace(index=torch.arange(19))).per_view()
        torch.testing.assert_close(found.features, backbone(images).pooled)


def test_extract_of_a_transformer_is_its_class_token():
    backbone, _ = load_backbone("random:vit_tiny_patch16")
    found = extract(backbone, batches(8, 3), images_of, torch.float32)
    with torch.no_grad():
        (images,) = images_of(SimpleNamespace(index=torch.arange(11))).per_view()
        tokens = backbone.embed(images)
        for block in backbone.blocks:
            tokens = block(tokens)
        torch.testing.assert_close(found.features, backbone.norm(tokens)[:, 0])


def test_extract_casts_to_the_autocast_type():
    backbone, _ = load_backbone("random:resnet18")
    seen = []
    backbone.layer1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    assert extract(backbone, batches(4), images_of, torch.bfloat16).features.dtype == torch.float32
    extract(backbone, batches(4), images_of, torch.float32)
    assert seen == [torch.bfloat16, torch.float32]


def test_extract_of_an_empty_share():
    found = extract(load_backbone("random:resnet18")[0], batches(), images_of, torch.float32)
    assert found.features.shape == (0, 512) and len(found) == 0


def test_modes_come_back_after_an_error():
    backbone = build_backbone("resnet18").train()
    backbone.bn1.eval()

    def broken():
        yield from batches(2)
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        extract(backbone, broken(), images_of, torch.float32)
    assert backbone.training and backbone.layer1.training and not backbone.bn1.training
