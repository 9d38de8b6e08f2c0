"""Files with the layouts of other projects' checkpoints load into the backbone they hold, and say what else they held."""

import argparse

import pytest
import torch

from fastssl.checkpoint import CheckpointError
from fastssl.models.backbones import build_backbone
from fastssl.models.keymaps import renamed, torchvision_vit
from fastssl.models.official import left_out
from fastssl.models.weights import load_backbone, output_checksum, weights_digest

ARGS = argparse.Namespace(arch="vit_tiny", lr=0.1)


def weights(arch: str, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return build_backbone(arch, **({"image_size": 32} if arch.startswith("vit") else {})).state_dict()


RESNET, OTHER_RESNET = weights("resnet18", 1), weights("resnet18", 2)
VIT, OTHER_VIT = weights("vit_tiny_patch16", 1), weights("vit_tiny_patch16", 2)
MOCOV3 = weights("vit_tiny_patch8_mocov3", 1)


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: t for name, t in state.items()}


def extra(*names: str) -> dict:
    return {name: torch.ones(2) for name in names}


def distilled(student: dict, teacher: dict, **more) -> dict:
    return {"student": student, "teacher": teacher, "optimizer": {"state": {}}, "epoch": 3, "args": ARGS, "fp16_scaler": None} | more


HEAD = extra("head.mlp.0.weight", "head.last_layer.weight_g")
SERE = extra("backbone.masked_embed", "backbone.pixel_sere.projection.0.weight", "backbone.channel_sere_local.predictor.1.bias")
EMAN = under("module.online_net.backbone.", RESNET) | under("module.target_net.backbone.", OTHER_RESNET)
MOCO = under("module.encoder_q.", RESNET | extra("fc.0.weight")) | under("module.encoder_k.", OTHER_RESNET | extra("fc.0.weight"))
FILES = {
    "dino": (distilled(under("module.backbone.", OTHER_VIT), under("backbone.", VIT) | HEAD, dino_loss=extra("center")), "target", VIT),
    "ibot": (distilled(under("module.backbone.", OTHER_VIT), under("module.backbone.", VIT) | under("module.", HEAD)), "target", VIT),
    "sere": (distilled(under("module.backbone.", OTHER_VIT), under("module.", under("backbone.", VIT) | SERE)), "target", VIT),
    "scfs": (
        distilled(
            under("module.backbone.model.", OTHER_RESNET),
            under("module.backbone.model.", RESNET) | extra("module.head.mlp.0.weight", "module.layer3_head.mlp.0.weight"),
        ),
        "target",
        RESNET,
    ),
    "lewel": (
        {"state_dict": EMAN | extra("module.online_net.neck.proj.0.weight", "module.predictor.0.weight"), "epoch": 200},
        "online",
        RESNET,
    ),
    "mocov2": ({"state_dict": MOCO | extra("module.queue", "module.queue_ptr"), "arch": "resnet18", "optimizer": {}}, "online", RESNET),
    "mocov3": (
        {
            "state_dict": under("module.base_encoder.", MOCOV3 | extra("head.0.weight"))
            | under("module.momentum_encoder.", MOCOV3)
            | extra("module.predictor.0.weight")
        },
        "online",
        MOCOV3,
    ),
    "w2ssl": (
        {"state_dict": under("module.base_encoder.", RESNET | extra("fc_crop.0.weight", "fc_loc.weight"))},
        "online",
        RESNET,
    ),
    "sfrik": (
        {"epoch": 7, "model": under("module.backbone.", RESNET) | extra("module.projector.0.weight"), "optimizer": {}},
        "online",
        RESNET,
    ),
    "mae": ({"model": VIT | extra("mask_token", "decoder_pos_embed", "decoder_blocks.0.norm1.weight"), "args": ARGS}, "online", VIT),
    "ibot backbone": ({"state_dict": VIT}, "online", VIT),
    "deit export of mocov3": ({"model": MOCOV3}, "online", MOCOV3),
    "torchvision vit": (renamed(VIT, torchvision_vit) | extra("heads.head.weight", "heads.head.bias"), "online", VIT),
    "trunk": ({"model": under("trunk.", RESNET)}, "online", RESNET),
}


@pytest.mark.parametrize("project", FILES)
def test_layout(tmp_path, project):
    content, network, expected = FILES[project]
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    backbone, about = load_backbone(str(path))
    assert about["network"] == network
    state = backbone.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], t) for name, t in expected.items())
    entry = content["teacher"] if "teacher" in content else content.get("state_dict", content.get("model", content))
    assert len(about["dropped"]) == len(entry) - len(expected) and about["dropped"].keys() <= entry.keys()


def test_weights_that_torchvision_released_have_older_names(tmp_path):
    state = {n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t for n, t in renamed(VIT, torchvision_vit).items()}
    torch.save({"module." + n: t for n, t in state.items()}, tmp_path / "w.pth")
    backbone, about = load_backbone(str(tmp_path / "w.pth"))
    assert about["dropped"] == {} and all(torch.equal(VIT[n], t) for n, t in backbone.state_dict().items())
    del state["encoder.ln.bias"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"1 missing \(norm.bias\)"):
        load_backbone(str(tmp_path / "w.pth"))


def test_heads_of_mocov3_are_known_by_its_positions(tmp_path):
    for name in ("mocov3", "deit export of mocov3"):
        torch.save(FILES[name][0], tmp_path / "w.pth")
        backbone, about = load_backbone(str(tmp_path / "w.pth"))
        assert (about["arch"], backbone.num_heads) == ("vit_tiny_patch8_mocov3", 12)


@pytest.mark.parametrize(("project", "network", "expected"), [("dino", "online", OTHER_VIT), ("mocov2", "target", OTHER_RESNET)])
def test_the_other_network(tmp_path, project, network, expected):
    torch.save(FILES[project][0], tmp_path / "w.pth")
    backbone, about = load_backbone(str(tmp_path / "w.pth"), network=network)
    assert about["network"] == network and all(torch.equal(t, expected[n]) for n, t in backbone.state_dict().items())


def test_what_was_dropped_is_said_by_kind(tmp_path):
    torch.save(FILES["mocov2"][0], tmp_path / "w.pth")
    said = left_out(load_backbone(str(tmp_path / "w.pth"))[1]["dropped"])
    assert "1 of a head (module.encoder_q.fc.0.weight)" in said
    assert "2 beside encoder_q (module.queue, module.queue_ptr)" in said
    assert f"{len(RESNET) + 1} of another network (module.encoder_k.bn1.bias, " in said


def test_what_remains_must_fit_exactly(tmp_path):
    path = tmp_path / "w.pth"
    few = {n: t for n, t in RESNET.items() if n != "layer2.0.conv1.weight"}
    torch.save({"model": under("module.backbone.", few)}, path)
    with pytest.raises(CheckpointError, match=r"Closest is resnet18: 1 missing \(layer2.0.conv1.weight\)"):
        load_backbone(str(path))
    torch.save({"model": under("module.backbone.", RESNET | extra("surplus"))}, path)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(surplus\)"):
        load_backbone(str(path))
    torch.save({"model": under("module.backbone.", RESNET)}, path)
    with pytest.raises(CheckpointError, match="holds a resnet18, not the resnet50"):
        load_backbone(str(path), arch="resnet50")
    with pytest.raises(CheckpointError, match="one network only"):
        load_backbone(str(path), network="target")


class Foreign:
    pass


def test_arguments_may_be_saved_but_nothing_that_runs(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"model": RESNET, "args": Foreign()}, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_backbone(str(path))


def test_the_checksum_is_of_the_weights_alone():
    backbone, _ = load_backbone("random:resnet18:1")
    before = {n: t.clone() for n, t in backbone.state_dict().items()}
    first = output_checksum(backbone)
    assert first == output_checksum(load_backbone("random:resnet18:1")[0]) != output_checksum(load_backbone("random:resnet18:2")[0])
    assert all(torch.equal(t, before[n]) for n, t in backbone.state_dict().items()) and not backbone.training
    assert backbone.train() is backbone and output_checksum(backbone) == first and backbone.training
    digest = weights_digest(backbone)
    assert digest == weights_digest(load_backbone("random:resnet18:1")[0]) != weights_digest(load_backbone("random:resnet18:2")[0])
