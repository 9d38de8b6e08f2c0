"""SERE's relation heads (TPAMI 2023, arXiv 2206.05184; methods/sere.md 2).

Tokens t [B, N, C] before the backbone's final norm become a projection z = ReLU(BN(t)) and a prediction p = ReLU(BN(W z)), once for the
relations between channels and once for those between pixels (tokens).  The teacher's relations are those of z, the student's of p.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Projected(NamedTuple):
    """What the relations are taken of, z or p: [B, N, C] each, not negative."""

    channel: Tensor
    pixel: Tensor


class Affine(nn.Module):
    """x weight + bias, per channel: what BatchNorm does once x is normalised."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias.to(x.dtype), x, self.weight.to(x.dtype))


class RelationHead(nn.Module):
    """The parameters of one head; its statistics are taken together with the other one's."""

    def __init__(self, channels: int):
        super().__init__()
        self.projection = Affine(channels)
        self.predictor = nn.Linear(channels, channels, bias=False)
        self.predictor_norm = Affine(channels)


class RelationHeads(nn.Module):
    """Both heads of one kind of crop.  tokens [B, N, C] -> z (`project`) or p (`forward`).

    Both projections normalise the same tokens, so one BatchNorm without parameters serves them, and one of twice the width serves both
    predictors: two exchanges of statistics between ranks a pass where single layers would need four, one in the teacher.  Running
    statistics follow, and nothing uses them.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.statistics = nn.BatchNorm1d(channels, affine=False)
        self.predictor_statistics = nn.BatchNorm1d(2 * channels, affine=False)
        self.channel, self.pixel = RelationHead(channels), RelationHead(channels)

    def project(self, tokens: Tensor) -> Projected:
        normed = self.statistics(tokens.flatten(0, 1)).view(tokens.shape)
        return Projected(*(torch.relu(head.projection(normed)) for head in (self.channel, self.pixel)))

    def forward(self, tokens: Tensor) -> Projected:
        z = self.project(tokens)
        both = torch.cat((self.channel.predictor(z.channel), self.pixel.predictor(z.pixel)), dim=-1)
        normed = self.predictor_statistics(both.flatten(0, 1)).view(both.shape).chunk(2, dim=-1)
        heads = (self.channel, self.pixel)
        return Projected(*(torch.relu(head.predictor_norm(x)) for head, x in zip(heads, normed, strict=True)))
