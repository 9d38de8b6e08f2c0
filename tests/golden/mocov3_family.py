"""Kinds of the MoCo v3 files: vision transformer, schedules, whole steps; the loss is in mocov3_loss.py."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import nn

from fastssl.config import AdamW, BarlowLars, EfficiencyConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from fastssl.distributed import Dist
from fastssl.engine import prepare, train_step
from fastssl.methods.mocov3 import MoCoV3
from fastssl.models.backbones import MOCOV3_VITS, build_backbone
from fastssl.models.vit_mocov3 import MoCoV3ViT, sincos_positions, xavier_
from fastssl.optim.build import build_schedules
from fastssl.optim.schedules import Schedules, epoch_cosine
from fastssl.recipes import byol_asymmetric
from tests.golden.kind import Arrays, Checked, Kind, compare
from tests.golden.mocov3_loss import mocov3_loss, prefixes
from tests.golden.toy import ToyBackbone, two_views

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))


def run_config(method: MoCoV3.Config, optim: OptimConfig, **train) -> RunConfig:
    return RunConfig(
        preset="golden",
        method=method,
        model=ModelConfig(),
        views=byol_asymmetric(),
        optim=optim,
        train=TrainConfig(**train),
        efficiency=EfficiencyConfig(dtype="fp64", compile="off"),
    )


# ------------------------------------------------------------------------------------------------ vision transformer


def mocov3_posembed(arrays: Arrays) -> Arrays:
    out: Arrays = {}
    for name in arrays:
        if match := re.fullmatch(r"pos_embed_dim(\d+)_grid(\d+)x\2", name):
            out[name] = sincos_positions(*map(int, match.groups())).float().numpy()
    return out


def vit_of(arrays: Arrays, prefix: str, *, heads: int, patch_size: int, conv_stem: bool) -> MoCoV3ViT:
    """The untrained network with the shapes of the file's weights, in their precision."""
    cls_token, table = torch.from_numpy(arrays[f"{prefix}cls_token"]), arrays[f"{prefix}pos_embed"]
    depth = sum(bool(re.fullmatch(rf"{re.escape(prefix)}blocks\.\d+\.norm1\.weight", k)) for k in arrays)
    side = math.isqrt(table.shape[1] - 1) * patch_size
    return MoCoV3ViT(cls_token.shape[-1], depth, heads, patch_size, conv_stem=conv_stem, image_size=side).to(cls_token.dtype)


def mocov3_vit_forward(arrays: Arrays) -> Arrays:
    out: Arrays = {"n_cases": np.array(len(prefixes(arrays, "x")))}
    for name in prefixes(arrays, "x"):
        weights = {k.removeprefix(f"{name}.param."): torch.from_numpy(a) for k, a in arrays.items() if k.startswith(f"{name}.param.")}
        heads, conv_stem = int(arrays[f"{name}.num_heads"]), bool(arrays[f"{name}.conv_stem"])
        patch = int(arrays[f"{name}.patch_size"])
        vit = vit_of(arrays, f"{name}.param.", heads=heads, patch_size=patch, conv_stem=conv_stem)
        head = nn.Linear(vit.num_features, len(weights["head.bias"]), dtype=weights["head.bias"].dtype)
        head.load_state_dict({k: weights.pop(f"head.{k}") for k in ("weight", "bias")})
        vit.load_state_dict(weights)
        x = torch.from_numpy(arrays[f"{name}.x"]).to(vit.cls_token.dtype).requires_grad_()
        feature = vit(x).pooled
        logits = head(feature)
        logits.backward(torch.from_numpy(arrays[f"{name}.grad_logits"]))
        produced = {"cls_feature": feature, "logits": logits, "grad_x": x.grad, "grad_cls_token": vit.cls_token.grad}
        out |= {f"{name}.{k}": t.detach().numpy() for k, t in produced.items()}
        out |= {f"{name}.depth": np.array(len(vit.blocks))}
    return out


Statistics = dict[str, tuple[float, float, float]]


@lru_cache
def initialised(arch: str) -> tuple[Arrays, Statistics, dict[str, int]]:
    """Of the network with a classifier of 1000 outputs, its patch projection frozen: what the file has; of each parameter before
    the second block the largest absolute value, standard deviation and mean, and the number of elements."""
    with torch.device("meta"):
        whole = build_backbone(arch)
    dim, _, heads, patch, conv_stem = MOCOV3_VITS[arch]
    torch.manual_seed(0)
    vit = MoCoV3ViT(dim, 1, heads, patch, conv_stem=conv_stem)
    vit.freeze_patch_projection()
    vit.head = nn.Linear(dim, 1000)
    xavier_(vit.head)
    params = dict(vit.named_parameters())
    described = {
        "names": np.array(list(params)),
        "shapes": np.array([str(tuple(p.shape)) for p in params.values()]),
        "requires_grad": np.array([p.requires_grad for p in params.values()], dtype=np.int64),
        "depth": np.array(len(whole.blocks)),
        "num_params_with_1000_head": np.array(sum(p.numel() for p in (*whole.parameters(), *vit.head.parameters()))),
    }
    values = {n: p.detach().double() for n, p in params.items()}
    statistics = {n: (float(p.abs().max()), float(p.std(correction=0)), float(p.mean())) for n, p in values.items()}
    return described, statistics, {n: p.numel() for n, p in params.items()}


def check_vit_init(arrays: Arrays) -> None:
    """Names, shapes, what is frozen, numbers of parameters; and the initialisation's statistics, within their sampling errors."""
    for name in prefixes(arrays, "names"):
        arch = next(a for a in (f"{name}_mocov3", f"{name}_patch16_mocov3") if a in MOCOV3_VITS)
        described, statistics, sizes = initialised(arch)
        for key, value in described.items():
            compare(f"{name}.{key}", value, arrays[f"{name}.{key}"])
        for (parameter, found), expected in zip(statistics.items(), arrays[f"{name}.absmax_std_mean"].tolist(), strict=True):
            check_statistics(f"{name}.{parameter}", found, expected, sizes[parameter])


def check_statistics(name: str, found: Sequence[float], expected: Sequence[float], n: int) -> None:
    absmax, std, mean = expected
    if name.endswith("pos_embed") or std == 0:  # nothing random about it
        assert np.allclose(found, expected, rtol=1e-5, atol=1e-7), f"{name}: {found}, expected {expected}"
        return
    # Two samples of n each: five standard deviations of the difference.
    assert abs(found[1] / std - 1) < 5 / math.sqrt(n), f"{name}: standard deviation {found[1]}, expected {std}"
    assert abs(found[2] - mean) < 5 * std * math.sqrt(2 / n), f"{name}: mean {found[2]}, expected {mean}"
    uniform = absmax / std < 2  # sqrt(3) for a uniform law; its largest value is within about 1 / n of the bound
    assert abs(found[0] / absmax - 1) < (20 / n if uniform else 0.5), f"{name}: largest {found[0]}, expected {absmax}"


# ------------------------------------------------------------------------------------------------ schedules


def mocov3_sched(arrays: Arrays) -> Arrays:
    out: Arrays = {}
    for name in prefixes(arrays, "base_lr"):
        base_lr, batch = float(arrays[f"{name}.base_lr"]), int(arrays[f"{name}.batch_size"])
        if f"{name}.epoch" in arrays:  # linear evaluation: 90 epochs (methods/mocov3.md section 8)
            rates = [epoch_cosine(int(e), base_lr=base_lr * batch / 256, epochs=90) for e in arrays[f"{name}.epoch"]]
            out[f"{name}.lr"] = np.array(rates)
            continue
        cfg = run_config(
            MoCoV3.Config(),
            BarlowLars(base_lr=base_lr, base_batch_size=256, schedule="mocov3", warmup_epochs=int(arrays[f"{name}.warmup_epochs"])),
            epochs=int(arrays[f"{name}.epochs"]),
            global_batch_size=batch,
            ema_momentum=float(arrays[f"{name}.moco_m"]),
        )
        per_epoch = int(arrays[f"{name}.iters_per_epoch"])
        scheds = [build_schedules(cfg, per_epoch).at(int(e) * per_epoch + int(i)) for e, i in arrays[f"{name}.epoch_iter"]]
        out |= {f"{name}.lr": np.array([s.lr for s in scheds]), f"{name}.ema_momentum": np.array([s.ema_momentum for s in scheds])}
    return out


# ------------------------------------------------------------------------------------------------ steps

NAMES = (
    (r"^base_encoder\.(fc|head)\.", "online.projector."),
    (r"^base_encoder\.", "online.backbone."),
    (r"^momentum_encoder\.(fc|head)\.", "target.projector."),
    (r"^momentum_encoder\.", "target.backbone."),
)


def ours(name: str) -> str:
    """Official name of a parameter or buffer -> ours."""
    for pattern, own in NAMES:
        name = re.sub(pattern, own, name)
    return name


def method_of(arrays: Arrays) -> MoCoV3:
    """The method with the shapes of the file's weights."""
    prefix = "before.base_encoder."
    vit = f"{prefix}cls_token" in arrays
    projector = f"{prefix}{'head' if vit else 'fc'}."
    linears = [k for k in arrays if k.startswith(projector) and k.endswith(".weight") and arrays[k].ndim == 2]
    cfg = MoCoV3.Config(
        hidden=arrays["before.predictor.0.weight"].shape[0],
        dim=arrays["before.predictor.0.weight"].shape[1],
        projector_layers=len(linears),
        predictor_bn="before.predictor.4.running_mean" in arrays,
        temperature=float(arrays["temperature"]),
        freeze_patch_projection=bool(arrays.get("stop_grad_conv1", 0)),
    )

    def backbone() -> nn.Module:
        if not vit:
            return ToyBackbone(*(arrays[f"{prefix}conv{i}.weight"].shape[0] for i in (1, 2)))
        conv_stem = f"{prefix}patch_embed.proj.0.weight" in arrays
        return vit_of(arrays, prefix, heads=int(arrays["num_heads"]), patch_size=int(arrays["patch_size"]), conv_stem=conv_stem)

    method = MoCoV3(cfg, backbone, "local").double()
    method.load_state_dict({ours(k.removeprefix("before.")): torch.from_numpy(a) for k, a in arrays.items() if k.startswith("before.")})
    return method


def named(values: dict[str, torch.Tensor], arrays: Arrays, prefix: str) -> Arrays:
    """Our tensors under the file's names that begin with `prefix`."""
    return {k: values[ours(k.removeprefix(prefix))].detach().numpy().copy() for k in arrays if k.startswith(prefix)}


def mocov3_step(arrays: Arrays) -> Arrays:
    """The engine's own steps on the file's images, with the file's learning rates and momenta."""
    method = method_of(arrays)
    lrs, momenta, decay = arrays["lr"].tolist(), arrays["ema_momentum"].tolist(), float(arrays["weight_decay"])
    options = {"base_lr": 1.0, "weight_decay": decay, "warmup_epochs": 0}
    optim = BarlowLars(**options) if str(arrays["optimizer"]) == "lars" else AdamW(**options, not_decayed="none")
    state = prepare(method, run_config(MoCoV3.Config(), optim, global_batch_size=len(arrays["step0.x1"])), ALONE, 1)
    state.schedules = Schedules(epoch=lambda s: 0, lr=lambda s: lrs[s], weight_decay=lambda s: decay, ema_momentum=lambda s: momenta[s])
    out: Arrays = {"frozen_params": frozen(arrays, method.online.named_parameters())}
    queries: list[np.ndarray] = []
    keys: list[np.ndarray] = []
    method.predictor.register_forward_hook(lambda *call: queries.append(call[2].detach().numpy().copy()))
    method.target.projector.register_forward_hook(lambda *call: keys.append(call[2].numpy().copy()))
    grads = lambda: {n: p.grad for n, p in method.named_parameters() if p.grad is not None}  # noqa: E731
    state.optimizer.register_step_pre_hook(lambda *_: out.update(named(grads(), arrays, f"step{state.step}.grad.")))
    for s in range(len(lrs)):
        views = two_views(*(arrays[f"step{s}.x{v}"].astype(np.float64) for v in (1, 2)))
        out[f"step{s}.loss"] = train_step(state, [views]).loss.numpy()
        for v in (0, 1):
            out |= {f"step{s}.q{v + 1}": queries[2 * s + v], f"step{s}.k{v + 1}": keys[2 * s + v]}
        out |= named(method.state_dict(), arrays, f"step{s}.after.")
    return out


def frozen(arrays: Arrays, parameters: Iterable[tuple[str, nn.Parameter]]) -> np.ndarray:
    """Official names of the online network's parameters without gradient."""
    official = {ours(k): k for k in (k.removeprefix("before.") for k in arrays if k.startswith("before."))}
    return np.array([official[f"online.{n}"] for n, p in parameters if not p.requires_grad] or ["(none)"])


KINDS = {
    "mocov3/loss": Kind(mocov3_loss, ("n_cases", "*.world_size", "*.temperature", "*.[qk][12]")),
    "mocov3/posembed": Kind(mocov3_posembed, ()),
    "mocov3/sched": Kind(
        mocov3_sched, tuple(f"*.{k}" for k in ("base_lr", "batch_size", "epochs", "warmup_epochs", "moco_m", "iters_per_epoch", "epoch*"))
    ),
    "mocov3/step": Kind(
        mocov3_step,
        (
            *("temperature", "lr", "ema_momentum", "weight_decay", "optimizer", "num_heads", "depth", "patch_size", "img_size"),
            *("backbone", "stop_grad_conv1", "before.*", "step*.x[12]"),
        ),
    ),
    "mocov3/vit_forward": Kind(
        mocov3_vit_forward, ("n_cases", "*.param.*", "*.x", "*.grad_logits", "*.patch_size", "*.num_heads", "*.depth", "*.conv_stem")
    ),
    "mocov3/vit_init": Checked(check_vit_init, ()),
}
