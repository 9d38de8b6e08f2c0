"""SCFS's stage heads and feature search (Song et al., ICCV 2023, arXiv 2212.06486; methods/scfs.md 2, 3 and 11).

A local crop's pooled feature queries the feature map M of a global crop; the cosine A at every pixel re-weights the map, and
a head projects A M.  Shapes: B images, K local crops, C channels; rows are crop-major.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl.precision import unit_rows


def feature_search(queries: Tensor, maps: Tensor) -> Tensor:
    """Cosine of every query and every pixel of its image.  queries: [K B, C] pooled locals, maps: [B, C, H, W] -> [K, B, H, W].

    No softmax and no temperature.  Both norms are floored at 1e-12: an empty pixel or query has attention 0.
    """
    unit = unit_rows(queries).unflatten(0, (-1, maps.shape[0]))
    # One product per image on the map as it lies in memory; dividing afterwards spares a normalised copy of it.
    products = unit.transpose(0, 1).to(maps.dtype) @ maps.flatten(2)
    norms = torch.linalg.vector_norm(maps, dim=1, dtype=unit.dtype).clamp_min(1e-12)
    # Crops outermost in memory too: what it multiplies would otherwise come out image-major and be copied once more.
    return products.transpose(0, 1).contiguous().unflatten(-1, maps.shape[2:]) / norms


def attended(attention: Tensor, maps: Tensor) -> Tensor:
    """A M.  attention: [K, B, H, W], maps: [B, C, H, W] -> [K B, C, H, W], in the dtype of the maps."""
    return (attention.to(maps.dtype).unsqueeze(2) * maps).flatten(0, 1)


class StageHead(nn.Module):
    """Residual bottleneck, spatial mean, two linears.  x: [n, C, H, W] -> unit rows [n, dim], fp32 or wider.

    The unit vectors' coordinates are the classes of the stage losses.  All layers keep PyTorch's default initialisation.
    """

    def __init__(self, channels: int, *, bottleneck: int = 256, hidden: int = 2048, dim: int = 256):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, bottleneck, 1, bias=False), nn.BatchNorm2d(bottleneck)
        self.conv2, self.bn2 = nn.Conv2d(bottleneck, bottleneck, 3, padding=1, bias=False), nn.BatchNorm2d(bottleneck)
        self.conv3, self.bn3 = nn.Conv2d(bottleneck, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.fc1, self.bn4 = nn.Linear(channels, hidden), nn.BatchNorm1d(hidden)
        self.fc2, self.bn5 = nn.Linear(hidden, dim), nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(self.residual(self.conv1(x)) + x)

    def with_searched(self, x: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """forward(x) and then forward(A M), where M is the first B of the maps x: ([n, dim], [K B, dim]).

        x: [n, C, H, W] with n >= B; attention: [K, B, H, W].  conv1(A M) = A conv1(M), as conv1 is 1x1 without bias: the K
        re-weighted copies of M exist only behind it, with `bottleneck` channels.
        """
        reduced = self.conv1(x)
        rows = self.embed(self.residual(reduced) + x)
        images = attention.shape[1]
        residual = self.residual(attended(attention, reduced[:images])).unflatten(0, attention.shape[:2])
        return rows, self.embed(torch.addcmul(residual, attention.to(x.dtype).unsqueeze(2), x[:images]).flatten(0, 1))

    def residual(self, reduced: Tensor) -> Tensor:
        """[n, bottleneck, H, W] behind conv1 -> [n, C, H, W]."""
        h = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(reduced)))))
        return self.bn3(self.conv3(h))

    def embed(self, y: Tensor) -> Tensor:
        """[n, C, H, W] before the last ReLU -> unit rows [n, dim]."""
        z = self.bn5(self.fc2(torch.relu(self.bn4(self.fc1(torch.relu(y).mean((2, 3)))))))
        return unit_rows(z)
