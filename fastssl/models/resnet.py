"""ResNet-18 and -50, "v1.5" (the stride on the 3x3 convolution), without average pool and classifier.

torchvision's blocks and names, so a state dict of ours loads into torchvision's model, all but its `fc`.  Initialisation
(methods' specs): every convolution Kaiming normal (fan out, relu), BatchNorm weight 1 and bias 0.  `zero_init_residual` (MoCo
v3, SFRIK) starts the weight of the last BatchNorm of each residual branch from 0 instead.
"""

from __future__ import annotations

from torch import Tensor
from torchvision.models import resnet as torchvision_resnet

from fastssl.models.features import Backbone, Features
from fastssl.models.small_maps import with_small_maps


class ResNet(Backbone, torchvision_resnet.ResNet):
    """images [B, 3, h, w] -> Features(pooled [B, D], map [B, D, h/32, w/32], stages layer2 [B, D/4, h/8, w/8],
    layer3 [B, D/2, h/16, w/16] and layer4, which is the map)."""

    def __init__(self, block: type, layers: tuple[int, ...], *, zero_init_residual: bool = False):
        super().__init__(block, list(layers), zero_init_residual=zero_init_residual)
        self.num_features = self.fc.in_features
        d = self.num_features
        self.stage_channels = {"layer2": d // 4, "layer3": d // 2, "layer4": d}
        del self.fc, self.avgpool
        with_small_maps(self)

    def forward(self, x: Tensor) -> Features:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        layer2 = self.run(self.layer2, self.run(self.layer1, x))
        layer3 = self.run(self.layer3, layer2)
        layer4 = self.run(self.layer4, layer3)
        stages = {"layer2": layer2, "layer3": layer3, "layer4": layer4}
        return Features(pooled=layer4.mean((2, 3)), map=layer4, stages=stages)
