"""ResNet-18 and -50, "v1.5" (the stride on the 3x3 convolution), without average pool and classifier.

torchvision's blocks and names, so a state dict of ours loads into torchvision's model, all but its `fc`.  Initialisation
(methods' specs): every convolution Kaiming normal (fan out, relu), BatchNorm weight 1 and bias 0, also for the last one of
each residual branch.
"""

from __future__ import annotations

from torch import Tensor
from torchvision.models import resnet as torchvision_resnet

from fastssl.config import ConfigError
from fastssl.models.features import Backbone, Features

ARCHITECTURES = {
    "resnet18": (torchvision_resnet.BasicBlock, (2, 2, 2, 2)),
    "resnet50": (torchvision_resnet.Bottleneck, (3, 4, 6, 3)),
}


class ResNet(Backbone, torchvision_resnet.ResNet):
    """images [B, 3, h, w] -> Features(pooled [B, D], map [B, D, h/32, w/32])."""

    def __init__(self, block: type, layers: tuple[int, ...]):
        super().__init__(block, list(layers))
        self.num_features = self.fc.in_features
        del self.fc, self.avgpool

    def forward(self, x: Tensor) -> Features:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return Features(pooled=x.mean((2, 3)), map=x)


def build_backbone(arch: str) -> Backbone:
    """A freshly initialised backbone by its torchvision name (torch's global generator).  ConfigError for an unknown one."""
    if arch not in ARCHITECTURES:
        raise ConfigError(f"There is no backbone '{arch}'. Choose one of: {', '.join(ARCHITECTURES)}.")
    return ResNet(*ARCHITECTURES[arch])
