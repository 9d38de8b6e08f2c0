"""Convolutions over small maps as products: torch's values and gradients, and nothing else of a network changed."""

import pytest
import torch
from torch import nn

from fastssl.models.backbones import build_backbone
from fastssl.models.small_maps import MOST, SmallMapConv2d, with_small_maps


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 2), (2, 1), (3, 4), (4, 4), (5, 2)])
def test_values_and_gradients_are_those_of_the_convolution(size: tuple[int, int], stride: int, monkeypatch):
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 5, 3, stride, 1).double()
    (small,) = with_small_maps(nn.Sequential(nn.Conv2d(3, 5, 3, stride, 1).double()))
    small.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, *size, dtype=torch.float64).to(memory_format=torch.channels_last)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    expected = plain(inputs[0])
    if max(expected.shape[2:]) <= MOST:  # that it is a product, and not the convolution again
        monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: pytest.fail("a convolution"))
    found = small(inputs[1])
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected)
    for y in (expected, found):
        (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    torch.testing.assert_close({k: p.grad for k, p in small.named_parameters()}, {k: p.grad for k, p in plain.named_parameters()})


def test_a_dilated_convolution_stays_one():
    (conv,) = with_small_maps(nn.Sequential(nn.Conv2d(3, 5, 3, 1, 1)))
    conv.dilation = conv.padding = (2, 2)
    x = torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last)
    torch.testing.assert_close(conv(x), torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=2, dilation=2))


def test_a_resnet_keeps_its_names_weights_and_random_numbers():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    ours, after = build_backbone("resnet18"), torch.rand(1)
    torch.manual_seed(0)
    theirs, then = resnet18(), torch.rand(1)
    del theirs.fc
    assert list(ours.state_dict()) == list(theirs.state_dict()) and torch.equal(after, then)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    kinds = [type(m) for m in ours.modules() if isinstance(m, nn.Conv2d)]
    assert kinds.count(SmallMapConv2d) == 16 and kinds.count(nn.Conv2d) == 4, "the first convolution and those of 1 x 1 stay"
