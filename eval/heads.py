"""K linear classifiers on the same features, each trained by its own setting, all in one pass.

Every rank computes the features of its part of the images; they are gathered, and each rank trains its share of the classifiers
on the whole batch.  So no gradient crosses the ranks, a step is the same for any number of them, and many classifiers cost each
rank a few.  B images, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from eval.linear_protocols import Setting
from fastssl.distributed import Dist
from loaders.order import shard

MOMENTUM, ETA = 0.9, 0.001
"""Of SGD and LARS; LARS's trust coefficient."""


class Heads:
    """K classifiers.  All start from the same weights, so that one of them learns the same whatever is trained beside it."""

    def __init__(
        self,
        settings: Sequence[Setting],
        num_features: int,
        num_classes: int,
        *,
        dist: Dist,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        k, device = len(settings), dist.device
        drawn = torch.randn(num_classes, num_features, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        self.dist = dist
        self.weight = drawn.mul_(0.01).to(device).expand(k, -1, -1).clone()
        """[K, C, D]."""
        self.bias = torch.zeros(k, num_classes, device=device, dtype=dtype)
        self.momentum = {name: torch.zeros_like(getattr(self, name)) for name in ("weight", "bias")}
        self.lr, self.decay = (torch.tensor([getattr(s, n) for s in settings], device=device, dtype=dtype) for n in ("lr", "weight_decay"))
        self.lars = torch.tensor([s.optimizer == "lars" for s in settings], device=device)
        self.any_lars = any(s.optimizer == "lars" for s in settings)
        self.mine = self._share(dist.rank)

    def _share(self, rank: int) -> slice:
        part = shard(len(self.weight), rank, self.dist.world)
        return slice(part.start, part.stop)

    def __call__(self, x: Tensor) -> Tensor:
        """features [B, D] -> logits [K, B, C]."""
        return logits(x, self.weight, self.bias)

    def learn(self, x: Tensor, y: Tensor, factor: float) -> Tensor:
        """One step of this rank's classifiers on the whole batch: features [B, D], labels [B] -> their losses before it [m].

        factor: the learning rate as a fraction of the first epoch's.
        """
        m = self.mine.stop - self.mine.start
        if m == 0:
            return x.new_zeros(0)
        weight, bias = (t[self.mine].detach().requires_grad_() for t in (self.weight, self.bias))
        with torch.enable_grad():
            scores = logits(x, weight, bias)
            losses = F.cross_entropy(scores.flatten(0, 1), y.repeat(m), reduction="none").unflatten(0, (m, -1)).mean(1)
            # a classifier's gradient comes from its own loss only, also where another's is not finite
            gradients = torch.autograd.grad(losses.sum(), (weight, bias))
        self.update(*gradients, factor)
        return losses.detach()

    @torch.no_grad()
    def update(
        self, weight_gradient: Tensor, bias_gradient: Tensor, factor: float = 1.0, *, momentum: float = MOMENTUM, eta: float = ETA
    ) -> None:
        """SGD: buf <- mu buf + g + wd w;  w <- w - lr buf.  LARS: the direction of weights times eta |w| / |g + wd w| (1 where either
        norm is 0), biases without decay and ratio (methods/ibot.md section 8).  Gradients of this rank's classifiers [m, ...]."""
        lr, decay, lars = (t[self.mine] for t in (self.lr, self.decay, self.lars))
        rate = -factor * lr
        for name, g in (("weight", weight_gradient), ("bias", bias_gradient)):
            p, buffer = getattr(self, name)[self.mine], self.momentum[name][self.mine]
            each = (-1,) + (1,) * (p.dim() - 1)
            wd = decay if name == "weight" else torch.where(lars, 0, decay)
            direction = torch.addcmul(g, p, wd.view(each))
            if self.any_lars and name == "weight":
                p_norm, d_norm = (t.flatten(1).norm(dim=1) for t in (p, direction))
                ratio = torch.where(lars & (p_norm > 0) & (d_norm > 0), eta * p_norm / d_norm, 1.0)
                direction.mul_(ratio.view(each))
            buffer.mul_(momentum).add_(direction)
            p.addcmul_(buffer, rate.view(each))

    def share(self) -> None:
        """Bring all classifiers, with their momenta, to every rank."""
        for rank in range(self.dist.world if self.dist.world > 1 else 0):
            part = self._share(rank)
            for t in self.state_dict().values():
                if part.stop > part.start:
                    torch.distributed.broadcast(t[part], src=rank)

    def state_dict(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "bias": self.bias} | {f"momentum_{name}": t for name, t in self.momentum.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, t in self.state_dict().items():
            t.copy_(state[name])


def logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """features [B, D], weight [K, C, D], bias [K, C] -> [K, B, C]."""
    return torch.baddbmm(bias.unsqueeze(1), x.to(weight.dtype).expand(len(weight), -1, -1), weight.transpose(1, 2))
