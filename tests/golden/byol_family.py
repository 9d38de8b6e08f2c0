"""Kinds of the BYOL and LEWEL files: heads, losses, optimizer, schedules, whole loops on one and several ranks."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fastssl.config import EfficiencyConfig, Lars, ModelConfig, RunConfig, TrainConfig
from fastssl.distributed import Dist
from fastssl.engine import prepare, train_step
from fastssl.losses.cosine import cosine_loss
from fastssl.methods.byol import BYOL
from fastssl.methods.lewel import LEWEL, AlignedNet, Embeddings, aligned_pooling, alignment_maps, pooled_and_pixels
from fastssl.models.backbones import build_backbone
from fastssl.models.heads import MLP
from fastssl.optim.build import build_optimizer, build_schedules
from fastssl.optim.lars import LARS
from fastssl.optim.schedules import cosine_momentum, epoch_cosine, step_decay
from fastssl.presets import PRESETS, byol, lewel
from fastssl.recipes import byol_asymmetric
from tests.golden.kind import Arrays, Kind
from tests.golden.toy import ToyBackbone, dump_grads, dump_state, load_state, ours, two_views
from tests.ranks import run_ranks


def tensor(a: np.ndarray, *, grad: bool = False) -> torch.Tensor:
    return torch.from_numpy(np.array(a)).requires_grad_(grad)


def first_width(arrays: Arrays, name: str) -> int:
    return arrays[name].shape[0]


def channels_last_rows(x: torch.Tensor) -> torch.Tensor:
    """The files' (B, K, P) <-> our [B, P, K]."""
    return x.transpose(1, 2)


# ------------------------------------------------------------------------------------------------ heads and losses


def byol_mlp(arrays: Arrays) -> Arrays:
    x = tensor(arrays["x"], grad=True)
    layers = int(arrays["num_layers"])
    mlp = MLP(x.shape[1], first_width(arrays, "state_before/mlp.0.weight"), arrays["y"].shape[1], layers=layers).to(x.dtype)
    load_state(mlp, arrays, "state_before/")
    mlp.train(bool(arrays["bn_training"]))
    y = mlp(x)
    (y * tensor(arrays["cotangent"])).sum().backward()
    return {
        "y": y.detach().numpy(),
        "grad_x": x.grad.numpy(),
        **dump_grads(mlp, arrays, "grad/"),
        **dump_state(mlp, arrays, "state_after/"),
    }


def byol_loss(arrays: Arrays) -> Arrays:
    p1, p2 = (tensor(arrays[f"prediction_view{v}"], grad=True) for v in (1, 2))
    t1, t2 = (tensor(arrays[f"target_view{v}"]) for v in (1, 2))
    l12, l21 = cosine_loss(p1, t2), cosine_loss(p2, t1)
    (l12 + l21).backward()
    return {
        "loss_o1_t2": l12.detach().numpy(),
        "loss_o2_t1": l21.detach().numpy(),
        "loss_total": (l12 + l21).detach().numpy(),
        "grad_prediction_view1": p1.grad.numpy(),
        "grad_prediction_view2": p2.grad.numpy(),
    }


def lewel_config(arrays: Arrays, prefix: str) -> LEWEL.Config:
    """Widths from the shapes of the file's heads, the rest from its scalars."""
    weights = [k for k in arrays if k.startswith(f"{prefix}proj.mlp.") and arrays[k].ndim == 3]
    return LEWEL.Config(
        hidden=first_width(arrays, f"{prefix}proj.mlp.0.weight"),
        dim=first_width(arrays, max(weights)),
        heads=int(arrays["num_heads"]),
        scale=float(arrays["temperature_scale"]),
        loss_weight=float(arrays.get("loss_weight", 0.5)),
        projector_layers=len(weights),
    )


def lewel_head(arrays: Arrays) -> Arrays:
    f = tensor(arrays["feature_map"], grad=True)
    cfg = lewel_config(arrays, "state_before/")
    net = AlignedNet(ToyBackbone(1, f.shape[1]), cfg).to(f.dtype)
    net.backbone = nn.Identity()
    load_state(net, arrays, "state_before/")
    net.train(bool(arrays["bn_training"]))
    z, aligned = net.embed(f)
    objective = (z * tensor(arrays["cotangent_global"])[..., 0]).sum()
    (objective + (channels_last_rows(aligned) * tensor(arrays["cotangent_aligned"])).sum()).backward()
    state_after = dump_state(net, arrays, "state_after/")
    # The same stages once more for the intermediate arrays, on untouched running statistics.
    load_state(net, arrays, "state_before/")
    with torch.no_grad():
        rows = pooled_and_pixels(f)
        projected = net.projector.rows(rows)
        maps = alignment_maps(projected[:, 1:], cfg.scale)
        pooled = aligned_pooling(rows[:, 1:], maps, cfg.heads)
    return {
        "projector_input": channels_last_rows(rows).numpy(),
        "projector_output": channels_last_rows(projected).numpy(),
        "alignment_maps_flat": channels_last_rows(maps).numpy(),
        "aligned_features": channels_last_rows(pooled).numpy(),
        "global_embedding": z.detach().unsqueeze(-1).numpy(),
        "aligned_embeddings": channels_last_rows(aligned).detach().numpy(),
        "grad_feature_map": f.grad.numpy(),
        **dump_grads(net, arrays, "grad/"),
        **state_after,
    }


def lewel_loss(arrays: Arrays) -> Arrays:
    leaves = {k: tensor(a, grad="online" in k) for k, a in arrays.items() if k.startswith(("online_", "target_"))}
    embeddings = {
        (net, v): Embeddings(leaves[f"{net}_global_view{v}"][..., 0], channels_last_rows(leaves[f"{net}_aligned_view{v}"]))
        for net in ("online", "target")
        for v in (1, 2)
    }
    dim, aligned = arrays["online_aligned_view1"].shape[1:]
    w = float(arrays["loss_weight"])
    cfg = LEWEL.Config(hidden=first_width(arrays, "state_before/predictor.mlp.0.weight"), dim=dim, heads=dim // aligned, loss_weight=w)
    method = LEWEL(cfg, lambda: ToyBackbone(1, dim), "local").to(leaves["online_global_view1"].dtype)
    heads = nn.ModuleDict({"predictor": method.predictor, "aligned_predictor": method.aligned_predictor})
    load_state(heads, arrays, "state_before/")
    g12, a12 = method.direction(embeddings["online", 1], embeddings["target", 2])
    g21, a21 = method.direction(embeddings["online", 2], embeddings["target", 1])
    l12, l21 = w * g12 + (1 - w) * a12, w * g21 + (1 - w) * a21
    (l12 + l21).backward()
    scalars = {
        "loss_instance_o1_t2": g12,
        "loss_aligned_o1_t2": a12,
        "loss_instance_o2_t1": g21,
        "loss_aligned_o2_t1": a21,
        "loss_o1_t2": l12,
        "loss_o2_t1": l21,
        "loss_total": l12 + l21,
    }
    return {
        **{k: v.detach().numpy() for k, v in scalars.items()},
        **{f"grad_{k}": v.grad.numpy() for k, v in leaves.items() if v.requires_grad},
        **dump_grads(heads, arrays, "grad/"),
        **dump_state(heads, arrays, "state_after/"),
    }


# ------------------------------------------------------------------------------------------------ optimizer and schedules


def lewel_lars(arrays: Arrays) -> Arrays:
    n = int(arrays["num_params"])
    params = [nn.Parameter(tensor(arrays[f"param{i}/init"])) for i in range(n)]
    groups = [{"params": [p], "excluded": bool(e)} for p, e in zip(params, arrays["excluded"], strict=True)]
    optimizer = LARS(
        groups, lr=0.0, weight_decay=float(arrays["weight_decay"]), sgd_momentum=float(arrays["momentum"]), eta=float(arrays["eta"])
    )
    out: Arrays = {}
    first = min(int(k.rsplit("step", 1)[1]) for k in arrays if k.startswith("param0/grad_step"))
    for t, lr in enumerate(arrays["lr_sequence"], start=first):
        for i, p in enumerate(params):
            p.grad = tensor(arrays[f"param{i}/grad_step{t}"])
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        optimizer.step()
        for i, p in enumerate(params):
            out[f"param{i}/value_step{t}"] = p.detach().numpy().copy()
            out[f"param{i}/buf_step{t}"] = optimizer.state[p]["momentum_buffer"].numpy().copy()
    return out


def run_config(*, optim: Lars, train: TrainConfig, method=None, norm: str = "local") -> RunConfig:
    return RunConfig(
        preset="golden",
        method=method or BYOL.Config(),
        model=ModelConfig(norm=norm),
        views=byol_asymmetric(),
        optim=optim,
        train=train,
        efficiency=EfficiencyConfig(dtype="fp64", compile="off"),
    )


def lewel_schedules(arrays: Arrays) -> Arrays:
    out: Arrays = {}
    for key in (k for k in arrays if k.endswith("/config")):
        name = key.removesuffix("/config")
        lr, m0, epochs, warmup, spe, cosine = arrays[key]
        steps = arrays[f"{name}/epoch_iter"] @ np.array([int(spe), 1])
        if cosine:
            cfg = run_config(
                optim=Lars(base_lr=lr, warmup_epochs=int(warmup)),
                train=TrainConfig(epochs=int(epochs), ema_momentum=m0),
            )
            schedules = build_schedules(cfg, int(spe))
            lrs, momenta = [schedules.at(t).lr for t in steps], [schedules.at(t).ema_momentum for t in steps]
        else:
            lrs = [step_decay(t // int(spe), base_lr=lr, milestones=(120, 160)) for t in steps]
            momenta = [cosine_momentum(t, base=m0, total_steps=int(epochs * spe)) for t in steps]
        out |= {f"{name}/lr": np.array(lrs), f"{name}/ema_momentum": np.array(momenta)}
    for name, key in evaluation_rates(arrays):
        rates = [(0.4,)] if name == "linear" else [(1e-4, 1.0)] if name == "semi_1percent" else [(0.01, 0.1)]
        epochs = np.arange(len(arrays[key]))
        if "cosine" in name:
            start = arrays[key][0]
            out[key] = np.array([[epoch_cosine(e, base_lr=b, epochs=len(epochs)) for b in start] for e in epochs])
        else:
            out[key] = np.array([[step_decay(e, base_lr=b, milestones=(30, 40)) for b in rates[0]] for e in epochs])
    if "published_log_100ep/epoch_iter_lr_momentum" in arrays:
        out["published_log_100ep/epoch_iter_lr_momentum"] = published_log(arrays)
    return out


def evaluation_rates(arrays: Arrays) -> list[tuple[str, str]]:
    return [(k.split("/")[0], k) for k in arrays if k.endswith("per_epoch")]


def published_log(arrays: Arrays) -> np.ndarray:
    """lr and momentum of the 100-epoch preset at the epochs and iterations the log names, rounded as the log prints them."""
    logged = arrays["published_log_100ep/epoch_iter_lr_momentum"]
    schedules = build_schedules(PRESETS["lewel_b_eman_r50_100ep"](), 1251)
    rows = []
    for epoch, iteration, lr, momentum in logged:
        assert epoch == int(epoch) and iteration == int(iteration), "epoch and iteration are whole numbers"
        sched = schedules.at(int(epoch) * 1251 + int(iteration))
        rows.append((epoch, iteration, printed(sched.lr, lr), printed(sched.ema_momentum, momentum)))
    return np.array(rows)


def printed(value: float, logged: float) -> float:
    """`value` with as many decimals as the log prints."""
    return round(value, len(repr(float(logged)).split(".")[1]))


# ------------------------------------------------------------------------------------------------ the real models


def parameter_groups(method: nn.Module, cfg: RunConfig, arrays: Arrays, prefix: str) -> Arrays:
    named = [(n, p) for n, p in method.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(method, cfg)
    excluded = {n for g in optimizer.param_groups if g["excluded"] for n in g["names"]}
    official = {ours(str(n)): str(n) for n in arrays[f"{prefix}param_names"]}
    text = [str(s) for s in arrays[f"{prefix}param_shapes"]]
    # Position-wise linears are 1x1 convolutions there: same numbers, one more axis of size 1.
    shapes = [s if eval_shape(s) == tuple(p.shape) else f"not {tuple(p.shape)}" for s, (_, p) in zip(text, named, strict=True)]
    return {
        f"{prefix}param_names": np.array([official.get(n, n) for n, _ in named]),
        f"{prefix}param_shapes": np.array(shapes),
        f"{prefix}excluded": np.array([n in excluded for n, _ in named], dtype=np.int64),
        f"{prefix}num_trainable": np.array(sum(p.numel() for _, p in named)),
        f"{prefix}num_target": np.array(sum(p.numel() for p in method.target.parameters())),
        f"{prefix}num_backbone": np.array(sum(p.numel() for p in method.backbone.parameters())),
    }


def eval_shape(text: str) -> tuple[int, ...]:
    """A shape in text, without the kernel axis of a 1x1 Conv1d."""
    shape = tuple(int(n) for n in text.strip("()[] ").replace("x", ",").split(",") if n.strip())
    return shape[:2] if len(shape) == 3 and shape[2] == 1 else shape


def lewel_param_groups(arrays: Arrays) -> Arrays:
    out: Arrays = {}
    for arch, preset in (("LEWELB_EMAN", lewel.lewel_b_eman_r50_200ep), ("LEWELB", lewel.lewel_b_sync_r50_400ep)):
        if f"{arch}/param_names" in arrays:
            cfg = preset()
            method = LEWEL(cfg.method, lambda: build_backbone("resnet50"), cfg.model.norm)
            out |= parameter_groups(method, cfg, arrays, f"{arch}/")
            averaged = {f"online.{k}" for k in method.ema[0].online.state_dict()}
    expected = [str(k) for k in arrays["online_state_dict_keys"]]
    names = {k: ours(k if k.startswith("online_net.") else f"online_net.{k}") for k in expected}
    found = [k if n in averaged else f"not averaged: {k}" for k, n in names.items()]
    out["online_state_dict_keys"] = np.array(found + sorted(averaged - set(names.values())))
    return out


def byol_param_groups(arrays: Arrays) -> Arrays:
    cfg = byol.byol_eman_r50_200ep()
    return parameter_groups(BYOL(cfg.method, lambda: build_backbone("resnet50"), cfg.model.norm), cfg, arrays, "")


# ------------------------------------------------------------------------------------------------ whole loops


def loop_config(arrays: Arrays, *, name: str, eman: bool, batch: int) -> RunConfig:
    if name == "lewel":
        method = lewel_config(arrays, "state_step0/online_net.neck.")
    else:
        weights = [k for k in arrays if k.startswith("state_step0/online_net.neck.mlp.") and arrays[k].ndim == 2]
        method = BYOL.Config(hidden=first_width(arrays, min(weights)), dim=first_width(arrays, max(weights)), projector_layers=len(weights))
    head_bn = [n for n in arrays.get("group_excluded_names", ()) if ".mlp.1.weight" in str(n)]
    exclude = (*lewel.EXCLUDE, "mlp.1") if head_bn or (name == "lewel" and eman and "group_excluded_names" not in arrays) else lewel.EXCLUDE
    return run_config(
        method=method,
        norm="eman" if eman else "local",
        optim=Lars(
            base_lr=float(arrays["base_lr"]),
            weight_decay=float(arrays["weight_decay"]),
            warmup_epochs=int(arrays["warmup_epochs"]),
            sgd_momentum=float(arrays["sgd_momentum"]),
            eta=float(arrays["lars_eta"]),
            exclude=exclude,
        ),
        train=TrainConfig(epochs=int(arrays["epochs"]), global_batch_size=batch, ema_momentum=float(arrays["base_ema"])),
    )


def run_loop(arrays: Arrays, name: str, *, eman: bool, dist: Dist) -> Arrays:
    """The engine's own steps on this rank's rows of the file's images."""
    steps, batch = arrays["images_view1"].shape[:2]
    cfg = loop_config(arrays, name=name, eman=eman, batch=batch)
    hidden, channels = (first_width(arrays, f"state_step0/online_net.backbone.conv{i}.weight") for i in (1, 2))
    method = {"lewel": LEWEL, "byol": BYOL}[name](cfg.method, lambda: ToyBackbone(hidden, channels), cfg.model.norm).double()
    load_state(method, arrays, "state_step0/")
    state = prepare(method, cfg, dist, int(arrays["iters_per_epoch"]))
    out: Arrays = {}
    key = "grad_step1_avg/" if dist.world > 1 else "grad_step1/"

    def keep_first_gradients(*_) -> None:
        if state.step == 0:
            out.update(dump_grads(method, arrays, key))

    state.optimizer.register_step_pre_hook(keep_first_gradients)
    mine = slice(dist.rank * batch // dist.world, (dist.rank + 1) * batch // dist.world)
    losses, scheds = [], []
    for t in range(steps):
        scheds.append(state.schedules.at(t))
        losses.append(train_step(state, [two_views(arrays["images_view1"][t, mine], arrays["images_view2"][t, mine])]).loss.item())
        for prefix in (f"state_step{t + 1}/", f"rank{dist.rank}/state_step{t + 1}/"):
            out |= dump_state(method, arrays, prefix)
    groups = {g["excluded"]: [n for n in g["names"]] for g in state.optimizer.param_groups}
    for key, excluded in (("group_excluded_names", True), ("group_adapted_names", False)):
        if key in arrays:
            official = {ours(str(n)): str(n) for n in arrays[key]}
            out[key] = np.array([official.get(n, n) for n in groups[excluded]])
    buffers = dict(zip((n for n, p in method.named_parameters() if p.requires_grad), momentum_buffers(state), strict=True))
    prefix = "momentum_buffer_final/"
    out |= {k: buffers[ours(k.removeprefix(prefix))].reshape(a.shape) for k, a in arrays.items() if k.startswith(prefix)}
    out["losses" if dist.world == 1 else f"losses_rank{dist.rank}"] = np.array(losses)
    out["lrs"], out["ema_momentum"] = np.array([s.lr for s in scheds]), np.array([s.ema_momentum for s in scheds])
    method.eval()
    with torch.no_grad():
        out["features_eval_final"] = method.backbone(tensor(arrays["images_view1"][0])).pooled.numpy()
    return out


def momentum_buffers(state) -> list[np.ndarray]:
    return [state.optimizer.state[p]["momentum_buffer"].numpy() for p in state.method.parameters() if p.requires_grad]


def single(name: str):
    def reproduce(arrays: Arrays) -> Arrays:
        return run_loop(arrays, name, eman=bool(arrays["eman"]), dist=Dist(0, 1, 0, 1, torch.device("cpu")))

    return reproduce


def one_rank(rank: int, world: int, arrays: Arrays, name: str) -> Arrays:
    return run_loop(arrays, name, eman=True, dist=Dist(rank, world, rank, world, torch.device("cpu")))


def lewel_ddp(arrays: Arrays) -> Arrays:
    world = sum(k.startswith("losses_rank") for k in arrays)
    results = run_ranks(world, one_rank, arrays, "lewel")
    for other in results[1:]:
        for k in set(other) & set(results[0]):
            assert np.allclose(other[k], results[0][k], rtol=1e-12, atol=0) or not k.startswith("state_"), f"{k} differs between ranks"
    return {k: v for result in results for k, v in result.items()}


LOOP_INPUTS = (
    *("batch", "per_rank_batch", "num_heads", "temperature_scale", "loss_weight", "base_lr", "weight_decay", "sgd_momentum", "lars_eta"),
    *("base_ema", "epochs", "warmup_epochs", "iters_per_epoch", "num_steps", "eman", "images_view?", "state_step0/*"),
)
HEAD_INPUTS = ("feature_map", "num_heads", "temperature_scale", "num_layers", "bn_training", "state_before/*", "cotangent_*")

KINDS = {
    "byol/mlp": Kind(byol_mlp, ("x", "cotangent", "num_layers", "bn_training", "state_before/*")),
    "byol/loss": Kind(byol_loss, ("prediction_view?", "target_view?")),
    "byol/step": Kind(single("byol"), LOOP_INPUTS),
    "byol/param_groups": Kind(byol_param_groups, ()),
    "lewel/head": Kind(lewel_head, HEAD_INPUTS),
    "lewel/loss": Kind(lewel_loss, ("online_*", "target_*", "loss_weight", "state_before/*")),
    "lewel/lars": Kind(
        lewel_lars, ("num_params", "excluded", "lr_sequence", "weight_decay", "momentum", "eta", "param*/init", "param*/grad_step*")
    ),
    "lewel/schedules": Kind(lewel_schedules, ("*/config", "*/epoch_iter")),
    "lewel/param_groups": Kind(lewel_param_groups, ()),
    "lewel/step": Kind(single("lewel"), LOOP_INPUTS),
    "lewel/ddp": Kind(lewel_ddp, LOOP_INPUTS),
}
