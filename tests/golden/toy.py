"""The small networks of the golden files, and their names in ours."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.batch import Group, Views
from fastssl.models.features import Features
from tests.golden.kind import Arrays

# Official prefix -> ours, first match wins.
NAMES = (
    ("online_net.neck.proj_obj.", "online.aligned_projector."),
    ("online_net.neck.proj.", "online.projector."),
    ("online_net.neck.", "online.projector."),
    ("online_net.", "online."),
    ("target_net.neck.proj_obj.", "target.aligned_projector."),
    ("target_net.neck.proj.", "target.projector."),
    ("target_net.neck.", "target.projector."),
    ("target_net.", "target."),
    ("predictor_obj.", "aligned_predictor."),
    ("proj_obj.", "aligned_projector."),
    ("proj.", "projector."),
)


class ToyBackbone(nn.Module):
    """conv 3x3 /2 - BN - ReLU, twice."""

    def __init__(self, hidden: int, num_features: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, hidden, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, num_features, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_features)
        self.num_features = num_features

    def forward(self, x: Tensor) -> Features:
        x = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        return Features(pooled=x.mean((2, 3)), map=x)


def ours(name: str) -> str:
    for official, own in NAMES:
        if name.startswith(official):
            return own + name.removeprefix(official)
    return name


def load_state(module: nn.Module, arrays: Arrays, prefix: str) -> None:
    """Load every `prefix`name of the file; 1x1 convolutions become linears."""
    state = {ours(k.removeprefix(prefix)): torch.from_numpy(np.array(a)) for k, a in arrays.items() if k.startswith(prefix)}
    shapes = {k: v.shape for k, v in module.state_dict().items()}
    module.load_state_dict({k: v.reshape(shapes[k]) for k, v in state.items()})


def dump_state(module: nn.Module, arrays: Arrays, prefix: str) -> Arrays:
    """The module's tensors under the file's names and shapes."""
    state = module.state_dict()
    return {
        k: state[ours(k.removeprefix(prefix))].detach().cpu().numpy().reshape(a.shape).copy()
        for k, a in arrays.items()
        if k.startswith(prefix)
    }


def dump_grads(module: nn.Module, arrays: Arrays, prefix: str) -> Arrays:
    """Gradients of the module's parameters under the file's names and shapes."""
    params = dict(module.named_parameters())
    return {k: params[ours(k.removeprefix(prefix))].grad.numpy().reshape(a.shape).copy() for k, a in arrays.items() if k.startswith(prefix)}


def two_views(x1: np.ndarray, x2: np.ndarray) -> Views:
    """Images of two views [B, 3, s, s] -> Views of one group."""
    pixels = torch.from_numpy(np.concatenate((x1, x2))).contiguous(memory_format=torch.channels_last)
    n = len(x1)
    return Views(
        groups=(Group(size=x1.shape[-1], views=(0, 1), pixels=pixels),),
        boxes=torch.zeros(n, 2, 4),
        flips=torch.zeros(n, 2, dtype=torch.bool),
        source_hw=torch.zeros(n, 2, dtype=torch.int32),
        index=torch.arange(n),
    )
