import copy
import math
from functools import partial
from typing import get_type_hints

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fastssl.config import ConfigError, ModelConfig
from fastssl.ema import without_drop_path
from fastssl.models.backbones import ARCHITECTURES, VITS, build_backbone
from fastssl.models.features import Features
from fastssl.models.patch_projection import PatchProjection
from fastssl.models.vit import ViT, interpolation_matrix, probe_features

SMALL = dict(dim=24, depth=3, heads=3, patch_size=8, image_size=32)


def small(**changes) -> ViT:
    torch.manual_seed(0)
    return ViT(**(SMALL | changes)).double()


def images(n: int, h: int, w: int) -> torch.Tensor:
    return torch.randn(n, 3, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------ what it is


def assert_same_outputs(vit: ViT, reference: VisionTransformer, x: torch.Tensor) -> None:
    assert list(vit.state_dict()) == list(reference.state_dict())
    reference.load_state_dict(vit.state_dict(), strict=True)
    vit.eval(), reference.eval()
    with torch.no_grad():
        found, tokens, pooled = vit(x), reference.forward_features(x), reference(x)
    assert found.map is None and found.stages is None
    torch.testing.assert_close(found.pooled, pooled, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.tokens, tokens[:, 1:], rtol=1e-10, atol=1e-10)


def test_is_timms_model():
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    reference = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=0, norm_layer=norm)
    vit = small()
    with torch.no_grad():  # weights that leave nothing at 0 or 1, and images so small that LayerNorm's eps counts
        for p in vit.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
        vit.cls_token.mul_(1e-3), vit.pos_embed.mul_(1e-3), vit.patch_embed.proj.bias.zero_()
    assert_same_outputs(vit, reference.double(), images(3, 32, 32) * 1e-3)


def test_real_tiny_is_timms():
    torch.manual_seed(0)
    vit = build_backbone("vit_tiny_patch16").double()
    reference = timm.create_model("vit_tiny_patch16_224", num_classes=0).double()
    assert_same_outputs(vit, reference, images(1, 224, 224))


@pytest.mark.parametrize("arch", VITS)
def test_names_shapes_and_heads_are_timms(arch):
    patch = VITS[arch][-1]
    name = arch.rsplit("_", 1)[0] + "_patch16_224"  # timm has no tiny network with small patches
    with torch.device("meta"):
        vit, reference = build_backbone(arch), timm.create_model(name, num_classes=0, patch_size=patch)
    shapes = {n: t.shape for n, t in vit.state_dict().items()}
    assert shapes == {n: t.shape for n, t in reference.state_dict().items()}
    assert [b.attn.num_heads for b in vit.blocks] == [b.attn.num_heads for b in reference.blocks]
    assert (vit.num_features, vit.grid) == (reference.num_features, 224 // patch)


@pytest.mark.parametrize(
    ("arch", "parameters"), [("vit_small_patch16", 21_665_664), ("vit_base_patch16", 85_798_656), ("vit_large_patch16", 303_301_632)]
)
def test_published_numbers_of_parameters(arch, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in build_backbone(arch).parameters()) == parameters


def test_initialisation():
    torch.manual_seed(0)
    vit = build_backbone("vit_tiny_patch16")
    tables = {"pos_embed": vit.pos_embed}
    linears = {n: m.weight for n, m in vit.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(linears) == 4 * 12
    for name, weight in (tables | linears).items():
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.03), name
        # cut at +-2, not at two standard deviations
        assert 0.06 < float(weight.detach().abs().max()) < 0.15, name
    assert float(vit.cls_token.detach().std()) == pytest.approx(0.02, rel=0.3)
    for name, module in vit.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            assert bool((module.bias == 0).all()), name
        if isinstance(module, torch.nn.LayerNorm):
            assert bool((module.weight == 1).all()) and module.eps == 1e-6, name
    bound = 1 / math.sqrt(3 * 16 * 16)  # PyTorch's default: uniform
    for p in vit.patch_embed.proj.parameters():
        assert 0.9 * bound < float(p.detach().abs().max()) <= bound
        assert float(p.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_channels_last_and_a_rest_at_the_border_change_nothing():
    vit, x = small(), images(2, 32, 32)
    expected = vit(x)
    padded = F.pad(x, (0, 5, 0, 5), value=9.0)  # 37 pixels are 4 patches and a rest
    torch.testing.assert_close(vit.patch_embed(padded), vit.patch_embed(x))
    channels_last = vit.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    for a, b in ((expected.pooled, channels_last.pooled), (expected.tokens, channels_last.tokens)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert vit(padded).tokens.shape == (2, 16, 24)


def test_wrong_configurations():
    with pytest.raises(ConfigError, match="image-size 8 is smaller than a patch .16 pixels"):
        build_backbone("vit_tiny_patch16", image_size=8)
    with pytest.raises(ConfigError, match="drop-path 1.0"):
        build_backbone("vit_tiny_patch16", drop_path=1.0)
    with pytest.raises(ConfigError, match="drop-path 0.1 is for ViTs, and resnet18"):
        build_backbone("resnet18", drop_path=0.1)
    assert get_type_hints(ModelConfig)["arch"].__args__ == ARCHITECTURES


# ------------------------------------------------------------------------------------------------ positions


def resized(table: torch.Tensor, grid: int, rows: int, columns: int) -> torch.Tensor:
    """methods/dino.md 1.2: the table itself through torch's bicubic resize by scale factors."""
    maps = table[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, scale_factor=((rows + 0.1) / grid, (columns + 0.1) / grid), mode="bicubic")
    assert maps.shape[-2:] == (rows, columns)
    return torch.cat((table[:, :1], maps.flatten(2).transpose(1, 2)), dim=1)


@pytest.mark.parametrize("hw", [(16, 16), (24, 64), (96, 96), (64, 16)])
def test_positions_and_their_gradient(hw):
    vit = small()
    rows, columns = hw[0] // 8, hw[1] // 8
    found, expected = vit.positions(*hw), resized(vit.pos_embed, 4, rows, columns)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    cotangent = torch.randn_like(found)
    torch.testing.assert_close(*(torch.autograd.grad(p, vit.pos_embed, cotangent)[0] for p in (found, expected)), rtol=1e-12, atol=1e-13)


def test_the_table_is_taken_as_it_is_only_for_square_images_of_its_size():
    vit = small()
    assert vit.positions(32, 32) is vit.pos_embed and vit.positions(35, 35) is vit.pos_embed
    assert vit.positions(16, 64).shape == vit.pos_embed.shape  # as many patches, in another form
    for hw in ((16, 64), (32, 35)):
        assert not torch.allclose(vit.positions(*hw), vit.pos_embed)


def test_positions_are_interpolated_once_and_in_full_precision():
    vit = small(patch_size=4).float()
    with torch.inference_mode():
        vit.positions(20, 20)
    vit.positions(20, 20).sum().backward()  # the matrix is no inference tensor
    device = torch.device("cpu")
    assert interpolation_matrix(8, 5, 5, device, torch.float32) is interpolation_matrix(8, 5, 5, device, torch.float32)
    assert interpolation_matrix(8, 5, 5, device, torch.float64).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(vit.positions(20, 20), resized(vit.pos_embed, 8, 5, 5), rtol=1e-5, atol=1e-7)
        assert vit.embed(images(2, 20, 20).float()).dtype == torch.float32
    assert set(vit.state_dict()) == set(dict(vit.named_parameters()))


def test_two_resolutions_are_two_graphs():
    vit, graphs = small(depth=2, drop_path=0.2).float().train(), []

    def keep(graph, inputs):  # runs it eagerly
        graphs.append(graph)
        return graph

    def run(net, size: int) -> torch.Tensor:
        torch.manual_seed(2)
        vit.zero_grad()
        out = net(images(4, size, size).float())
        (out.pooled.sum() + out.tokens.square().sum()).backward()
        return torch.cat([out.pooled.detach().flatten()] + [p.grad.flatten() for p in vit.parameters()])

    torch._dynamo.reset()
    compiled = torch.compile(vit, backend=keep, fullgraph=True, dynamic=False)
    for size in (32, 16):
        run(compiled, size)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (16, 32, 16):
            torch.testing.assert_close(run(compiled, size), run(vit, size))
    assert len(graphs) == 2
    assert not any("interpolate" in graph.code for graph in graphs)  # only a product with the matrix


# ------------------------------------------------------------------------------------------------ drop path


def test_drop_path_drops_branches_of_samples():
    vit = small(drop_path=0.5).train()
    x = torch.randn(1, 3, 24, dtype=torch.float64).expand(4000, -1, -1)
    assert torch.equal(vit.blocks[0](x), vit.blocks[0].eval()(x))
    for block, p in ((vit.blocks[1], 0.25), (vit.blocks[2], 0.5)):
        with torch.no_grad():
            out, one = block(x), x[:1]
            left = torch.ones(len(out), dtype=torch.bool)
            for attention in (0, 1):
                y = one + attention * block.attn(block.norm1(one)) / (1 - p)
                for mlp in (0, 1):
                    z = y + mlp * block.mlp(block.norm2(y)) / (1 - p)
                    here = ((out - z).abs() < 1e-12).flatten(1).all(1)
                    expected = math.prod(1 - p if kept else p for kept in (attention, mlp))
                    deviation = math.sqrt(expected * (1 - expected) / len(out))
                    assert abs(float(here.double().mean()) - expected) < 5 * deviation
                    left &= ~here
            assert not left.any()


def test_a_teacher_never_drops():
    vit = small(drop_path=0.5).train()
    x = images(8, 32, 32)
    teacher = without_drop_path(copy.deepcopy(vit))
    assert teacher.training
    with torch.no_grad():
        quiet = copy.deepcopy(vit).eval()(x).pooled
        torch.testing.assert_close(teacher(x).pooled, quiet)
        assert not torch.allclose(vit(x).pooled, quiet)  # the student was left alone


# ------------------------------------------------------------------------------------------------ blocks of the probe


def test_last_blocks_are_those_of_shallower_networks():
    vit, x = small().eval(), images(2, 16, 16)
    with torch.no_grad():
        outputs = vit.last_blocks(x, 3)
        for depth, found in enumerate(outputs, start=1):
            shallow = copy.deepcopy(vit)
            shallow.blocks = shallow.blocks[:depth]
            expected = shallow(x)
            torch.testing.assert_close(found.pooled, expected.pooled)
            torch.testing.assert_close(found.tokens, expected.tokens)
        last = vit.last_blocks(x, 2)
    assert [torch.equal(a.pooled, b.pooled) for a, b in zip(last, outputs[1:], strict=True)] == [True, True]
    for n in (0, 4):
        with pytest.raises(ValueError, match="1 to 3 blocks"):
            vit.last_blocks(x, n)


def test_probe_features():
    first, last = (Features(pooled=torch.tensor([[1.0, 2.0]]) + i, tokens=torch.tensor([[[5.0, 7.0], [9.0, 1.0]]])) for i in (0, 10))
    assert probe_features([first, last]).tolist() == [[1, 2, 11, 12]]
    assert probe_features([last], average=True).tolist() == [[11, 7, 12, 4]]
    with pytest.raises(ValueError, match="one block, got 2"):
        probe_features([first, last], average=True)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_patch_projection_is_a_convolution(layout: torch.memory_format):
    """Values, gradients and layout; a rest of the image is not seen."""
    torch.manual_seed(0)
    ours = PatchProjection(6, 4).double().to(memory_format=layout)
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, 4, 4).double().to(memory_format=layout)
    torch.testing.assert_close(ours.state_dict(), conv.state_dict(), rtol=0, atol=0)
    inputs = [torch.randn(2, 3, 9, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    inputs = [x.to(memory_format=layout).requires_grad_() for x in inputs]
    found, expected = ours(inputs[0]), conv(inputs[1])
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected)
    for y in (found, expected):
        (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close([p.grad for p in ours.parameters()], [p.grad for p in conv.parameters()])
