import math

import pytest
import torch
import torchvision

from fastssl.config import ConfigError
from fastssl.models.backbones import build_backbone
from fastssl.models.features import Features


@pytest.mark.parametrize(("arch", "width", "parameters"), [("resnet18", 512, 11_176_512), ("resnet50", 2048, 23_508_032)])
def test_is_torchvisions_model_without_fc(arch, width, parameters):
    torch.manual_seed(0)
    backbone = build_backbone(arch)
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    assert backbone.num_features == width

    reference = torchvision.models.get_model(arch)
    result = reference.load_state_dict(backbone.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) == {"fc.weight", "fc.bias"}

    reference.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        out, expected = backbone.eval()(x), reference.eval()(x)
    assert out.pooled.shape == (2, width) and out.map.shape == (2, width, 2, 2)
    assert out.tokens is None
    torch.testing.assert_close(out.pooled, expected)
    torch.testing.assert_close(out.pooled, out.map.mean((2, 3)))


@pytest.mark.parametrize(("arch", "width"), [("resnet18", 128), ("resnet50", 512)])
def test_stages_are_the_layers_outputs(arch, width):
    torch.manual_seed(0)
    backbone, seen = build_backbone(arch).eval(), {}
    for name in ("layer2", "layer3", "layer4"):
        getattr(backbone, name).register_forward_hook(lambda module, inputs, output, name=name: seen.setdefault(name, output))
    with torch.no_grad():
        out = backbone(torch.randn(2, 3, 64, 96))
    assert {name: t.shape for name, t in out.stages.items()} == {
        "layer2": (2, width, 8, 12),
        "layer3": (2, 2 * width, 4, 6),
        "layer4": (2, 4 * width, 2, 3),
    }
    assert all(torch.equal(out.stages[name], seen[name]) for name in seen) and out.map is out.stages["layer4"]


def test_stride_sits_on_the_3x3():
    block = build_backbone("resnet50").layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))


def test_initialisation():
    torch.manual_seed(0)
    for name, module in build_backbone("resnet50").named_modules():
        if isinstance(module, torch.nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            assert float(module.weight.detach().std()) == pytest.approx(math.sqrt(2 / fan_out), rel=0.03), name
            assert abs(float(module.weight.detach().mean())) < 0.03 * math.sqrt(2 / fan_out), name
        if isinstance(module, torch.nn.BatchNorm2d):
            assert bool((module.weight == 1).all()) and bool((module.bias == 0).all()), name


def test_channels_last_forward_and_backward():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    gradients = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(1)
        backbone = build_backbone("resnet18").double().to(memory_format=memory_format)
        out = backbone(x.to(memory_format=memory_format))
        assert out.map.is_contiguous(memory_format=memory_format)
        (out.pooled.square().sum() + out.map.sum()).backward()
        gradients.append([p.grad.contiguous() for p in backbone.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_compiles_without_graph_break():
    torch.manual_seed(0)
    backbone = build_backbone("resnet18").eval()
    x = torch.randn(1, 3, 32, 32)
    out = torch.compile(backbone, fullgraph=True, backend="eager")(x)
    assert isinstance(out, Features)
    torch.testing.assert_close(out.pooled, backbone(x).pooled)


def test_unknown_architecture_is_named():
    with pytest.raises(ConfigError, match="resnet34.*resnet18, resnet50"):
        build_backbone("resnet34")
