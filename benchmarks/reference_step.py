"""LEWEL_B, DINO and SFRIK written the plain way, for `benchmarks.compare_step` and nothing else.

Eager, NCHW, one tensor at a time: what the papers' steps look like when nobody has looked at their speed.  Every view its own
forward pass (DINO: every resolution), 1 x 1 convolutions over positions, a cross-entropy for each pair of crops, the dense Gram
matrix with autograd, loops over parameters in LARS, clipping and the moving average, and the loss on the host in every step.
The values are those of the package: with its weights a step has its loss.

Modules are declared in the package's order, so that weights are copied by position; Linear [out, in] and Conv1d [out, in, 1] alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

from fastssl.batch import Views
from fastssl.config import RunConfig
from fastssl.optim.schedules import Sched


def plain_resnet18() -> nn.Module:
    """images -> the last feature map [B, 512, h, w]."""
    return nn.Sequential(*list(resnet18().children())[:-2])


class Reference:
    """A network, its optional moving average and its optimizer."""

    def __init__(self, cfg: RunConfig, net: nn.ModuleList | nn.Module, averaged: nn.Module | None, target: nn.Module | None):
        if cfg.model.arch != "resnet18" or cfg.model.norm not in ("local", "sync"):
            raise ValueError(f"the reference has ResNet-18 with BatchNorm over its own batch, not {cfg.model.arch} with {cfg.model.norm}")
        self.cfg, self.net, self.averaged, self.target = cfg, net, averaged, target
        for p in target.parameters() if target else ():
            p.requires_grad = False

    def load(self, method: nn.Module) -> None:
        """Copy the weights of the package's method, online network first, and everything to its device and type."""
        modules = nn.ModuleList([self.net] if self.target is None else [self.net, self.target])
        ours, theirs = list(method.parameters()), list(modules.parameters())
        modules.to(ours[0].device, ours[0].dtype)
        with torch.no_grad():
            for a, b in zip(ours, theirs, strict=True):
                b.copy_(a.reshape(b.shape))
        modules.train()
        self.device = ours[0].device
        self.buffers = {p: torch.zeros_like(p) for p in self.net.parameters()}
        self.prepare()

    def prepare(self) -> None:
        """What needs the weights in their place: the optimizer."""

    def loss(self, views: list[Tensor], sched: Sched) -> Tensor:
        raise NotImplementedError

    def update(self, sched: Sched) -> None:
        """Clip and step."""
        raise NotImplementedError

    def step(self, views: list[Tensor], sched: Sched, dtype: torch.dtype) -> float:
        """views: [B, 3, s, s] of each, NCHW -> the loss."""
        with torch.autocast(self.device.type, dtype=dtype if dtype.itemsize == 2 else None, enabled=dtype.itemsize == 2):
            loss = self.loss(views, sched)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value}")
        for p in self.net.parameters():
            p.grad = None
        loss.backward()
        self.update(sched)
        if self.target is not None:
            with torch.no_grad():
                for q, k in zip(self.averaged.parameters(), self.target.parameters(), strict=True):
                    k.data.mul_(sched.ema_momentum).add_((1 - sched.ema_momentum) * q.detach().data)
        return value


def plain_views(views: Views) -> list[Tensor]:
    """The same pixels view by view, NCHW."""
    return [x.contiguous(memory_format=torch.contiguous_format) for x in views.per_view()]


# ------------------------------------------------------------------------------------------------ LEWEL


def conv_mlp(channels: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(channels, hidden, 1, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Conv1d(hidden, out, 1, bias=False)
    )


class LewelEncoder(nn.Module):
    def __init__(self, hidden: int, dim: int, heads: int, scale: float):
        super().__init__()
        self.backbone = plain_resnet18()
        self.projector = conv_mlp(512, hidden, dim)
        self.aligned_projector = conv_mlp(512, hidden, dim)
        self.heads, self.scale = heads, scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(x)
        b, c = features.shape[:2]
        pooled, pixels = F.adaptive_avg_pool2d(features, 1).view(b, c, 1), features.view(b, c, -1)
        projected = self.projector(torch.cat([pooled, pixels], dim=2))
        maps = F.softmax(F.normalize(projected[:, :, 1:].float(), dim=1) / self.scale, dim=2).to(pixels.dtype)
        grouped_pixels = pixels.reshape(b * self.heads, c // self.heads, -1)
        grouped_maps = maps.reshape(b * self.heads, maps.shape[1] // self.heads, -1)
        aligned = torch.bmm(grouped_pixels, grouped_maps.transpose(1, 2)).view(b, c, -1)
        return projected[:, :, :1], self.aligned_projector(aligned)


def cosine(p: Tensor, t: Tensor) -> Tensor:
    """[B, K, N]: mean squared distance of unit vectors."""
    return (2 - 2 * (F.normalize(p.float(), dim=1) * F.normalize(t.float(), dim=1)).sum(1)).mean()


class LewelReference(Reference):
    def __init__(self, cfg: RunConfig):
        m = cfg.method
        widths = m.hidden, m.dim, m.heads, m.scale
        online = LewelEncoder(*widths)
        predictors = [conv_mlp(m.dim, m.hidden, m.dim) for _ in range(2)]
        super().__init__(cfg, nn.ModuleList([online, *predictors]), online, LewelEncoder(*widths))

    def loss(self, views: list[Tensor], sched: Sched) -> Tensor:
        online, predictor, aligned_predictor = self.net
        x1, x2 = views
        z1, a1 = online(x1)
        z2, a2 = online(x2)
        with torch.no_grad():
            t1, ta1 = self.target(x1)
            t2, ta2 = self.target(x2)
        w = self.cfg.method.loss_weight
        whole = cosine(predictor(z1), t2) + cosine(predictor(z2), t1)
        aligned = cosine(aligned_predictor(a1), ta2) + cosine(aligned_predictor(a2), ta1)
        return w * whole + (1 - w) * aligned

    @torch.no_grad()
    def update(self, sched: Sched) -> None:
        """LARS with the learning rate inside the buffer."""
        o = self.cfg.optim
        for p in self.net.parameters():
            d = p.grad
            if p.ndim > 1 or self.adapts(p):
                w_norm, g_norm = torch.norm(p), torch.norm(d)
                ratio = o.eta * w_norm / (g_norm + sched.weight_decay * w_norm) if w_norm > 0 or g_norm > 0 else 0.0
                d = (d + sched.weight_decay * p) * ratio
            self.buffers[p].mul_(o.sgd_momentum).add_(d, alpha=sched.lr)
            p.add_(self.buffers[p], alpha=-1.0)

    def prepare(self) -> None:
        # The package excludes by name: BatchNorm of the backbone and all biases, but not the weights of the heads' BatchNorm.
        heads = (m for m in self.net.modules() if isinstance(m, nn.BatchNorm1d))
        self.head_norms = {m.weight for m in heads}

    def adapts(self, p: Tensor) -> bool:
        return p in self.head_norms


# ------------------------------------------------------------------------------------------------ DINO


class WeightNormLinear(nn.Module):
    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.v = nn.Parameter(torch.empty(out_features, in_features))
        self.g = nn.Parameter(torch.empty(out_features, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.g * (self.v / self.v.norm(dim=1, keepdim=True)))


class DinoNet(nn.Module):
    """A pass of the backbone for every resolution, one of the head for all crops."""

    def __init__(self, hidden: int, bottleneck: int, out: int):
        super().__init__()
        self.backbone = plain_resnet18()
        self.mlp = nn.Sequential(nn.Linear(512, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck))
        self.last = WeightNormLinear(bottleneck, out)

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        pooled, start = [], 0
        for end in range(1, len(crops) + 1):
            if end == len(crops) or crops[end].shape[-1] != crops[start].shape[-1]:
                pooled.append(F.adaptive_avg_pool2d(self.backbone(torch.cat(crops[start:end])), 1).flatten(1))
                start = end
        return self.last(F.normalize(self.mlp(torch.cat(pooled)), dim=-1))


class DinoReference(Reference):
    def __init__(self, cfg: RunConfig):
        m = cfg.method
        if (m.head_layers, m.bn_in_head, m.norm_last_layer) != (3, False, True):
            raise ValueError("the reference has DINO's head of three layers without BatchNorm and with unit prototypes")
        student, teacher = (DinoNet(m.hidden, m.bottleneck, m.out_dim) for _ in range(2))
        student.last.g.requires_grad = False
        super().__init__(cfg, student, student, teacher)

    def prepare(self) -> None:
        o, trained = self.cfg.optim, [p for p in self.net.parameters() if p.requires_grad]
        vectors = [p for p in trained if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": [p for p in trained if p.ndim > 1]}, {"params": vectors, "weight_decay": 0.0}], betas=o.betas, eps=o.eps
        )
        self.center = torch.zeros(1, self.cfg.method.out_dim, device=self.device, dtype=trained[0].dtype)

    def loss(self, views: list[Tensor], sched: Sched) -> Tensor:
        m = self.cfg.method
        with torch.no_grad():
            teacher = self.target(views[:2])
        student = self.net(views)
        # No warm-up of the teacher's temperature: the mini preset has none.
        q = F.softmax((teacher - self.center).float() / m.teacher_temp, dim=-1).chunk(2)
        s = (student.float() / m.student_temp).chunk(len(views))
        total, terms = 0, 0
        for i in range(2):
            for v in range(len(views)):
                if v != i:
                    total = total + torch.sum(-q[i] * F.log_softmax(s[v], dim=-1), dim=-1).mean()
                    terms += 1
        mean = teacher.sum(dim=0, keepdim=True) / len(teacher)
        self.center = self.center * m.center_momentum + mean * (1 - m.center_momentum)
        return total / terms

    @torch.no_grad()
    def update(self, sched: Sched) -> None:
        limit = self.cfg.optim.clip_grad
        for p in self.net.parameters():
            if limit and p.grad is not None:
                coefficient = limit / (p.grad.norm(2).item() + 1e-6)
                if coefficient < 1:
                    p.grad.mul_(coefficient)
        if sched.epoch < self.cfg.method.freeze_last_layer:
            self.net.last.v.grad = None
        decayed, vectors = self.optimizer.param_groups
        decayed["lr"] = vectors["lr"] = sched.lr
        decayed["weight_decay"] = sched.weight_decay
        self.optimizer.step()


# ------------------------------------------------------------------------------------------------ SFRIK


class SfrikNet(nn.Module):
    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.backbone = plain_resnet18()
        layers: list[nn.Module] = []
        before = 512
        for width in widths[:-1]:
            layers += [nn.Linear(before, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
            before = width
        self.projector = nn.Sequential(*layers, nn.Linear(before, widths[-1], bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(F.adaptive_avg_pool2d(self.backbone(x), 1).flatten(1))


class SfrikReference(Reference):
    def __init__(self, cfg: RunConfig):
        super().__init__(cfg, SfrikNet([int(w) for w in cfg.method.mlp.split("-")]), None, None)

    def mmd(self, z: Tensor) -> Tensor:
        """Mean of the kernel over all pairs."""
        t, q = z @ z.T, z.shape[1]
        c, d = 1 / (q - 1), 3 / (q - 1)
        polynomials = t, (1 + c) * t**2 - c, (1 + d) * t**3 - d * t
        return sum(b * p for b, p in zip(self.cfg.method.weights, polynomials, strict=True)).mean()

    def loss(self, views: list[Tensor], sched: Sched) -> Tensor:
        z1, z2 = (F.normalize(self.net(x).float(), dim=1) for x in views)
        m = self.cfg.method
        return m.sim_coeff * F.mse_loss(z1, z2) + m.mmd_coeff * (self.mmd(z1) + self.mmd(z2)) / 2

    @torch.no_grad()
    def update(self, sched: Sched) -> None:
        """LARS with the learning rate outside the buffer."""
        o = self.cfg.optim
        for p in self.net.parameters():
            d = p.grad
            if p.ndim > 1:
                d = d + sched.weight_decay * p
                w_norm, d_norm = torch.norm(p), torch.norm(d)
                if w_norm > 0 and d_norm > 0:
                    d = d * (o.eta * w_norm / d_norm)
            self.buffers[p].mul_(o.sgd_momentum).add_(d)
            p.add_(self.buffers[p], alpha=-sched.lr)


REFERENCES: dict[str, Callable[[RunConfig], Reference]] = {"lewel": LewelReference, "dino": DinoReference, "sfrik": SfrikReference}
