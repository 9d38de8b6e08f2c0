"""Kinds of the W2SSL files: montages, decoupling, loss, heads, optimizer, schedules, whole steps on one and several ranks."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.batch import Group, Views
from fastssl.config import BarlowLars, EfficiencyConfig, ModelConfig, RunConfig, TrainConfig
from fastssl.distributed import Dist
from fastssl.engine import prepare, train_step
from fastssl.losses.supervised_contrastive import supervised_contrastive
from fastssl.methods.w2ssl import W2SSL
from fastssl.models.backbones import build_backbone
from fastssl.models.features import Features
from fastssl.models.montage import decouple, rank_rows
from fastssl.optim.build import build_optimizer, build_schedules
from fastssl.optim.schedules import Sched, Schedules, epoch_cosine
from fastssl.precision import unit_rows
from fastssl.presets import PRESETS
from fastssl.recipes import w2ssl
from tests.golden.kind import Arrays, Checked, Kind
from tests.golden.toy import ToyBackbone
from tests.ranks import run_ranks

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))
SCHED = Sched(epoch=0, lr=0.0, weight_decay=0.0, ema_momentum=1.0)
# Official prefix -> ours, first match wins.
NAMES = (
    ("base_encoder.fc_crop.", "online.projector."),
    ("base_encoder.fc_loc.", "online.locator."),
    ("base_encoder.", "online.backbone."),
    ("momentum_encoder.fc_crop.", "target.projector."),
    ("momentum_encoder.fc_loc.", "target.locator."),
    ("momentum_encoder.", "target.backbone."),
)


def ours(name: str) -> str:
    return next((own + name.removeprefix(official) for official, own in NAMES if name.startswith(official)), name)


def tensor(a: np.ndarray, *, grad: bool = False) -> Tensor:
    return torch.from_numpy(np.array(a)).requires_grad_(grad)


def load_state(method: nn.Module, arrays: Arrays) -> None:
    # The files of trunks without BatchNorm have no counters.
    counters = {k: v for k, v in method.state_dict().items() if k.endswith("num_batches_tracked")}
    method.load_state_dict(counters | {ours(k.removeprefix("before.")): tensor(a) for k, a in arrays.items() if k.startswith("before.")})


def dump_state(method: nn.Module, arrays: Arrays, prefix: str) -> Arrays:
    state = method.state_dict()
    return {k: state[ours(k.removeprefix(prefix))].numpy().copy() for k in arrays if k.startswith(prefix)}


def dump_grads(method: nn.Module, arrays: Arrays, prefix: str) -> Arrays:
    params = dict(method.named_parameters())
    return {k: params[ours(k.removeprefix(prefix))].grad.numpy().copy() for k in arrays if k.startswith(prefix)}


class Given(W2SSL):
    """Shuffles patches as the file says."""

    permutation: np.ndarray

    def rows(self, images: int, world: int, sched: Sched) -> np.ndarray:
        return rank_rows(self.permutation, world)


class TrunkWithoutNorm(nn.Module):
    """conv 3x3 /2 - ReLU, twice."""

    def __init__(self, hidden: int, num_features: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, hidden, 3, 2, 1, bias=False)
        self.conv2 = nn.Conv2d(hidden, num_features, 3, 2, 1, bias=False)
        self.num_features = num_features

    def forward(self, x: Tensor) -> Features:
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return Features(pooled=x.mean((2, 3)), map=x)


class NoTrunk(nn.Module):
    """For files that begin behind it."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def trunk_of(arrays: Arrays) -> nn.Module:
    prefix = "before.base_encoder."
    if f"{prefix}conv1.weight" not in arrays:
        return NoTrunk(arrays[f"{prefix}fc_crop.0.weight"].shape[1])
    kind = ToyBackbone if f"{prefix}bn1.weight" in arrays else TrunkWithoutNorm
    return kind(*(arrays[f"{prefix}conv{i}.weight"].shape[0] for i in (1, 2)))


def config_of(arrays: Arrays, **train) -> RunConfig:
    hidden, dim = arrays["before.predictor.0.weight"].shape
    options = {"temperature": "temperature", "base_temperature": "base_temperature"}
    options |= {"location_weight": "weight_loc", "contrast_weight": "weight_crop"}
    parts = arrays["before.base_encoder.fc_loc.weight"].shape[0]
    lars = {"sgd_momentum": "sgd_momentum", "eta": "trust_coefficient", "weight_decay": "weight_decay"}
    return RunConfig(
        preset="golden",
        method=W2SSL.Config(parts=parts, hidden=hidden, dim=dim, **{k: float(arrays[v]) for k, v in options.items() if v in arrays}),
        model=ModelConfig(norm="sync"),
        views=w2ssl(),
        optim=BarlowLars(base_lr=1.0, schedule="mocov3", **{k: float(arrays[v]) for k, v in lars.items() if v in arrays}),
        train=TrainConfig(**train),
        efficiency=EfficiencyConfig(dtype="fp64", compile="off"),
    )


def method_of(arrays: Arrays, cfg: RunConfig) -> Given:
    method = Given(cfg.method, lambda: trunk_of(arrays), cfg.model.norm).double()
    load_state(method, arrays)
    return method


def patches(view1: np.ndarray, view2: np.ndarray) -> Views:
    """[k, n, 3, s, s] of each view -> Views of two groups."""
    parts, images = view1.shape[:2]
    return Views(
        groups=tuple(
            Group(size=x.shape[-1], views=tuple(range(v * parts, (v + 1) * parts)), pixels=tensor(x).flatten(0, 1))
            for v, x in enumerate((view1, view2))
        ),
        boxes=torch.zeros(images, 2 * parts, 4),
        flips=torch.zeros(images, 2 * parts, dtype=torch.bool),
        source_hw=torch.zeros(images, 2, dtype=torch.int32),
        index=torch.arange(images),
    )


def image_labels(method: Given, images: int) -> np.ndarray:
    return method.rows(images, 1, SCHED)[0] % images


# ------------------------------------------------------------------------------------------------ parts


def montage(arrays: Arrays) -> Arrays:
    parts, images = arrays["patches_view1"].shape[:2]
    method = Given(W2SSL.Config(parts=parts, hidden=4, dim=4), lambda: NoTrunk(4), "local")
    method.permutation = arrays["permute"]
    made = method.arrange(patches(arrays["patches_view1"], arrays["patches_view2"]), SCHED)
    assert made.view1.is_contiguous(memory_format=torch.channels_last)
    return {
        "montage_view1": made.view1.numpy(),
        "montage_view2": made.view2.numpy(),
        "label_loc": made.location.numpy(),
        "label_img": image_labels(method, images),
    }


def decoupled(arrays: Arrays) -> Arrays:
    out: Arrays = {}
    for i in range(int(arrays["n_cases"])):
        x = tensor(arrays[f"case{i}.feature_map"], grad=True)
        vectors = decouple(x)
        (vectors * tensor(arrays[f"case{i}.grad_out"])).sum().backward()
        out |= {f"case{i}.vectors": vectors.detach().numpy(), f"case{i}.grad_feature_map": x.grad.numpy()}
        out[f"case{i}.pooled_2x2"] = cells(vectors, len(x)).detach().numpy()
    return out


def cells(vectors: Tensor, montages: int) -> Tensor:
    """[4 G, C] -> [G, C, 2, 2]."""
    return vectors.view(2, 2, montages, -1).permute(2, 3, 0, 1)


def supclu(arrays: Arrays) -> Arrays:
    out: Arrays = {}
    for i in range(int(arrays["n_cases"])):
        x, labels = tensor(arrays[f"case{i}.features"], grad=True), arrays[f"case{i}.labels"]
        same = labels == labels[:, None]
        positives = np.stack([np.flatnonzero(row) for row in same & ~np.eye(len(labels), dtype=bool)])
        loss = supervised_contrastive(
            unit_rows(x) if arrays[f"case{i}.l2_normalize_first"] else x,
            tensor(positives),
            temperature=float(arrays[f"case{i}.temperature"]),
            base_temperature=float(arrays[f"case{i}.base_temperature"]),
        )
        loss.backward()
        out |= {f"case{i}.loss": loss.detach().numpy(), f"case{i}.grad_features": x.grad.numpy()}
    return out


def branches(arrays: Arrays) -> Arrays:
    images, parts = int(arrays["n"]), int(arrays["num_loc_classes"])
    cfg = config_of(arrays)
    method = method_of(arrays, cfg)
    method.permutation = arrays["permute"]
    pixels = np.zeros((parts, images, 3, 1, 1))
    montages = method.arrange(patches(pixels, pixels), SCHED)
    seen: dict[str, list[Tensor]] = {}
    watched = {"projection": method.online.projector, "prediction": method.predictor, "key": method.target.projector}
    for name, module in {**watched, "loc_logits": method.online.locator}.items():
        module.register_forward_hook(lambda _m, _i, y, name=name: seen.setdefault(name, []).append(y.detach().clone()))
    rows = [tensor(arrays[f"vectors_online_view{v}"], grad=True) for v in (1, 2)]
    method.ema[0].update_(float(arrays["ema_momentum"]))
    with torch.no_grad():
        keys = [method.target.projector(tensor(arrays[f"vectors_momentum_view{v}"])) for v in (1, 2)]
    out = method.losses(*rows, *keys, montages)
    out.loss.backward()
    return {
        "loss_loc": out.logs["loss_loc"].numpy(),
        "loss_crop": out.logs["loss_crop"].numpy(),
        "total": out.loss.detach().numpy(),
        "label_loc": montages.location.numpy(),
        "label_img": image_labels(method, images),
        "loc_logits": seen["loc_logits"][0].numpy(),
        **{f"{name}_view{v}": seen[name][v - 1].numpy() for name in watched for v in (1, 2)},
        **{f"grad_vectors_online_view{v}": rows[v - 1].grad.numpy() for v in (1, 2)},
        **dump_grads(method, arrays, "grad."),
        **dump_state(method, arrays, "after."),
    }


# ------------------------------------------------------------------------------------------------ backbone, optimizer, schedules


def resnet50(arrays: Arrays) -> Arrays:
    net = build_backbone("resnet50").double()
    draws, more = (np.random.RandomState(int(arrays["seed"]) + i) for i in (0, 1))
    params = dict(sorted(net.named_parameters()))
    for name, p in params.items():
        z = draws.standard_normal(tuple(p.shape))
        if p.ndim == 4:
            z = z * np.sqrt(2 / (p.shape[0] * p.shape[2] * p.shape[3]))
        else:
            z = 1 + 0.1 * z if name.endswith(".weight") else 0.1 * z
        p.data = tensor(z)
    x = more.standard_normal(tuple(arrays["input_shape"]))
    seen: list[Tensor] = []
    hooks = [
        net.get_submodule(str(stage)).register_forward_hook(lambda _m, _i, y: seen.append(y.detach())) for stage in arrays["stage_names"]
    ]
    features = net(tensor(x))
    vectors = decouple(features.map)
    pooled = cells(vectors, len(x))
    (pooled * tensor(more.standard_normal(tuple(pooled.shape)))).sum().backward()
    for hook in hooks:
        hook.remove()
    buffers = {k: v.numpy().copy() for k, v in net.named_buffers()}
    net.eval()
    with torch.no_grad():
        pooled_eval = cells(decouple(net(tensor(x)).map), len(x))
    outputs = {
        "input_head": x.ravel()[: len(arrays["input_head"])],
        "pooled_2x2": pooled.detach().numpy(),
        "global_avgpool": features.pooled.detach().numpy(),
        "stage_shapes": np.array([tuple(y.shape) for y in seen]),
        "stage_mean": np.array([y.mean() for y in seen]),
        "stage_std": np.array([y.std() for y in seen]),
        "stage_absmax": np.array([y.abs().max() for y in seen]),
        "param_names": np.array(list(params)),
        "grad_norm": np.array([p.grad.norm() for p in params.values()]),
        "grad_sum": np.array([p.grad.sum() for p in params.values()]),
        "grad_conv1": net.conv1.weight.grad.numpy(),
        "running_mean_bn1": buffers["bn1.running_mean"],
        "running_var_bn1": buffers["bn1.running_var"],
        "running_mean_layer4_2_bn3": buffers["layer4.2.bn3.running_mean"],
        "running_var_layer4_2_bn3": buffers["layer4.2.bn3.running_var"],
        "pooled_2x2_eval_after": pooled_eval.numpy(),
    }
    return outputs


def lars(arrays: Arrays) -> Arrays:
    params = nn.ParameterDict({k.removeprefix("init."): tensor(a) for k, a in arrays.items() if k.startswith("init.")})
    optim = BarlowLars(
        base_lr=1.0,
        weight_decay=float(arrays["weight_decay"]),
        sgd_momentum=float(arrays["momentum"]),
        eta=float(arrays["trust_coefficient"]),
    )
    optimizer = build_optimizer(params, run_config(optim))
    out: Arrays = {}
    for s, lr in enumerate(arrays["lr"]):
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        for name, p in params.items():
            grad = arrays.get(f"step{s}.grad.{name}")
            p.grad = None if grad is None else tensor(grad)
        optimizer.step()
        out |= {f"step{s}.param.{name}": p.detach().numpy().copy() for name, p in params.items()}
    return out


def run_config(optim: BarlowLars, **train) -> RunConfig:
    return RunConfig(preset="golden", method=W2SSL.Config(), model=ModelConfig(), views=w2ssl(), optim=optim, train=TrainConfig(**train))


def schedules(arrays: Arrays) -> Arrays:
    out: Arrays = {}
    for name in (k.removesuffix(".epoch_iter") for k in arrays if k.endswith(".epoch_iter")):
        value = {k: float(arrays[f"{name}.{k}"]) for k in ("base_lr", "batch_size", "epochs", "warmup_epochs", "moco_m", "iters_per_epoch")}
        optim = BarlowLars(base_lr=value["base_lr"], base_batch_size=256, schedule="mocov3", warmup_epochs=int(value["warmup_epochs"]))
        train = {"epochs": int(value["epochs"]), "global_batch_size": int(value["batch_size"]), "ema_momentum": value["moco_m"]}
        per_epoch = int(value["iters_per_epoch"])
        built = build_schedules(run_config(optim, **train), per_epoch)
        scheds = [built.at(int(t)) for t in arrays[f"{name}.epoch_iter"] @ np.array([per_epoch, 1])]
        out |= {f"{name}.lr": np.array([s.lr for s in scheds]), f"{name}.ema_momentum": np.array([s.ema_momentum for s in scheds])}
    for name in (k.removesuffix(".epoch") for k in arrays if k.endswith(".epoch")):
        batch, epochs = map(int, re.search(r"bs(\d+)_(\d+)ep", name).groups())
        rate = [epoch_cosine(int(e), base_lr=0.1 * batch / 256, epochs=epochs) for e in arrays[f"{name}.epoch"]]
        out[f"{name}.lr"] = np.array(rate)
    return out


def reference_curves(arrays: Arrays) -> None:
    """The published run's learning rates are the preset's, and its three losses add up with the preset's weights, to the log's digits."""
    cfg = PRESETS["w2ssl_r50_200ep_bs256"]()
    assert cfg.train.global_batch_size == arrays["global_batch_images"]
    per_epoch = int(arrays["iters_per_epoch"])
    built = build_schedules(cfg, per_epoch)
    for key in (k for k in arrays if k.startswith("lr_iter")):
        steps = arrays["epoch"] * per_epoch + int(key.removeprefix("lr_iter"))
        np.testing.assert_allclose([built.at(int(t)).lr for t in steps], arrays[key], rtol=5e-5, err_msg=key)
    for key in (k for k in arrays if k.startswith("loss_total")):
        loc, crop = (arrays[key.replace("total", part)] for part in ("loc", "crop"))
        total = cfg.method.location_weight * loc + cfg.method.contrast_weight * crop
        np.testing.assert_allclose(total, arrays[key], rtol=0, atol=1.2e-3, err_msg=key)


# ------------------------------------------------------------------------------------------------ whole steps


def run_steps(arrays: Arrays, dist: Dist, views: list[Views], permutations: list[np.ndarray], lr: list[float], m: list[float], **keys):
    """The engine's own steps -> (outputs of each step, the method's montages in the first)."""
    images = len(views[0].index) * dist.world
    cfg = config_of(arrays, global_batch_size=images)
    method = method_of(arrays, cfg)
    state = prepare(method, cfg, dist, steps_per_epoch=len(views))
    weight_decay = cfg.optim.weight_decay
    state.schedules = Schedules(
        epoch=lambda s: 0, lr=lambda s: float(lr[s]), weight_decay=lambda s: weight_decay, ema_momentum=lambda s: float(m[s])
    )
    out: Arrays = {}
    state.optimizer.register_step_pre_hook(lambda *_: out.update(dump_grads(method, arrays, keys["grad"].format(s=state.step))))
    for s, batch in enumerate(views):
        method.permutation = permutations[s]
        result = train_step(state, [batch])
        out |= {keys["loss"].format(s=s, name=name): result.logs[name].numpy() for name in ("loss_loc", "loss_crop")}
        out[keys["loss"].format(s=s, name="total")] = result.loss.numpy()
        out |= dump_state(method, arrays, keys["after"].format(s=s))
    return out, method.arrange(views[0], SCHED)


def step(arrays: Arrays) -> Arrays:
    steps = range(len(arrays["lr"]))
    views = [patches(*(arrays[f"step{s}.patches_view{v}"].astype(np.float64) for v in (1, 2))) for s in steps]
    permutations = [arrays[f"step{s}.permute"] for s in steps]
    keys = {"grad": "step{s}.grad.", "loss": "step{s}.{name}", "after": "step{s}.after."}
    return run_steps(arrays, ALONE, views, permutations, arrays["lr"], arrays["ema_momentum"], **keys)[0]


def one_rank(rank: int, world: int, arrays: Arrays) -> Arrays:
    views = patches(*(arrays[f"rank{rank}.patches_view{v}"].astype(np.float64) for v in (1, 2)))
    keys = {"grad": "averaged_grad.", "loss": "{name}", "after": "after."}
    dist = Dist(rank, world, rank, world, torch.device("cpu"))
    out, montages = run_steps(arrays, dist, [views], [arrays["permute"]], [0.0], [arrays["ema_momentum"]], **keys)
    return out | {f"rank{rank}.montage_view1": montages.view1.float().numpy(), f"rank{rank}.montage_view2": montages.view2.float().numpy()}


def several_ranks(arrays: Arrays) -> Arrays:
    results = run_ranks(int(arrays["world_size"]), one_rank, arrays)
    for other in results[1:]:
        for k in set(other) & set(results[0]) - {"loss_loc", "total"}:
            np.testing.assert_allclose(other[k], results[0][k], rtol=1e-12, atol=1e-15, err_msg=f"{k} differs between ranks")
    # each rank has the location loss of its own rows
    loss_loc = np.mean([r["loss_loc"] for r in results], axis=0)
    return {**{k: v for r in results for k, v in r.items()}, "loss_loc": loss_loc}


SCALARS = ("n", "num_loc_classes", "ema_momentum", "temperature", "base_temperature", "weight_loc", "weight_crop", "before.*")
STEP_SCALARS = (*SCALARS, "lr", "weight_decay", "sgd_momentum", "trust_coefficient")

KINDS = {
    "w2ssl/montage": Kind(montage, ("patches_view?", "permute")),
    "w2ssl/decouple": Kind(decoupled, ("n_cases", "case*.feature_map", "case*.grad_out")),
    "w2ssl/supclu": Kind(supclu, ("n_cases", "*.features", "*.labels", "*.temperature", "*.base_temperature", "*.l2_normalize_first")),
    "w2ssl/branches": Kind(branches, (*SCALARS, "permute", "vectors_*")),
    "w2ssl/resnet50": Kind(resnet50, ("seed", "input_shape", "stage_names")),
    "w2ssl/lars": Kind(lars, ("n_steps", "lr", "weight_decay", "momentum", "trust_coefficient", "init.*", "step*.grad.*")),
    "w2ssl/sched": Kind(
        schedules,
        (
            *("*.base_lr", "*.batch_size", "*.epochs", "*.warmup_epochs", "*.moco_m", "*.iters_per_epoch"),
            *("*.epoch_iter", "*.epoch"),
        ),
    ),
    # What was measured cannot be computed: accuracies, times.
    "w2ssl/reference_curves": Checked(reference_curves, ("epoch", "linear_*", "seconds_*", "global_batch_images", "iters_per_epoch")),
    "w2ssl/step": Kind(step, (*STEP_SCALARS, "step*.patches_view?", "step*.permute")),
    "w2ssl/dist": Kind(several_ranks, (*SCALARS, "world_size", "n_per_rank", "permute", "rank*.patches_view?")),
}
