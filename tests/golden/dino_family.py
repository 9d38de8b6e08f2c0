"""Kinds of the DINO and SCFS files that need the whole method: multi-crop forward passes, steps, training loops."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.batch import Group, Views
from fastssl.config import AdamW, BarlowLars, EfficiencyConfig, ModelConfig, OptimConfig, RunConfig, Sgd, TrainConfig
from fastssl.distributed import Dist
from fastssl.engine import prepare, train_step
from fastssl.methods.dino import DINO, DistillationConfig, MultiCrop, SelfDistillation
from fastssl.methods.scfs import SCFS, STAGES
from fastssl.models.features import Backbone, Features
from fastssl.models.stage_heads import feature_search
from fastssl.models.vit import ViT
from fastssl.optim.schedules import Sched
from fastssl.recipes import dino
from fastssl.views import Crop, View, groups
from tests.golden.kind import Arrays, Kind
from tests.golden.vit_family import vit_name

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))


class TinyConv(Backbone):
    """Four stages of conv 3x3 /2 - BN - ReLU; the feature is the mean of the last."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        for name, (a, b) in zip(("stem", *STAGES), zip((3, *widths), widths, strict=False), strict=True):
            conv = nn.Conv2d(a, b, 3, 2, 1, bias=False)
            self.add_module(name, nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(b), relu=nn.ReLU())))
        self.num_features, self.stage_channels = widths[-1], dict(zip(STAGES, widths[1:], strict=True))

    def forward(self, x: Tensor) -> Features:
        x, stages = self.run(self.stem, x), {}
        for name in STAGES:
            stages[name] = x = self.run(self.get_submodule(name), x)
        return Features(pooled=x.mean((2, 3)), map=x, stages=stages)


def backbone_of(arrays: Arrays, prefix: str) -> nn.Module:
    """The untrained network with the shapes of the file's weights."""
    if f"{prefix}cls_token" not in arrays:
        return TinyConv([arrays[f"{prefix}{stage}.conv.weight"].shape[0] for stage in ("stem", *STAGES)])
    dim, _, patch, _ = arrays[f"{prefix}patch_embed.weight"].shape
    depth = len([k for k in arrays if k.startswith(prefix) and k.endswith(".norm1.weight")])
    side = round((arrays[f"{prefix}pos_embed"].shape[1] - 1) ** 0.5)
    return ViT(dim, depth, int(arrays.get("num_heads", 2)), patch, image_size=side * patch)


def ours(name: str) -> str:
    """Official name of a parameter or buffer -> ours."""
    if name.startswith("backbone."):
        return "backbone." + vit_name(name.removeprefix("backbone."))
    stage, dot, rest = name.partition("_head.")
    return f"stage_heads.{stage}.{rest}" if dot else name


def load(module: nn.Module, arrays: Arrays, prefix: str, part: str = "") -> None:
    """The file's `prefix` + names into `module`; only those of ours that begin with `part`, which is cut off."""
    state = {ours(k.removeprefix(prefix)): torch.from_numpy(np.array(a)) for k, a in arrays.items() if k.startswith(prefix)}
    state = {k.removeprefix(part): v for k, v in state.items() if k.startswith(part)}
    counters = {k: v for k, v in module.state_dict().items() if k.endswith("num_batches_tracked")}
    module.load_state_dict(counters | state)


def dump(module: nn.Module, arrays: Arrays, prefix: str) -> Arrays:
    state = module.state_dict()
    return {k: state[ours(k.removeprefix(prefix))].numpy().copy() for k in arrays if k.startswith(prefix)}


def gradients(module: nn.Module, arrays: Arrays, prefix: str) -> Arrays:
    params = dict(module.named_parameters())
    return {k: params[ours(k.removeprefix(prefix))].grad.numpy().copy() for k in arrays if k.startswith(prefix)}


def config(arrays: Arrays, prefix: str, cls: type[DistillationConfig], **given) -> DistillationConfig:
    """Widths from the head's weights, options from the scalars."""
    out_dim, bottleneck = arrays[f"{prefix}head.last.v"].shape
    scalars = ("warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp_epochs", "freeze_last_layer", "student_temp", "center_momentum")
    return cls(
        out_dim=out_dim,
        bottleneck=bottleneck,
        hidden=arrays[f"{prefix}head.linear1.weight"].shape[0],
        head_layers=sum(k.startswith(f"{prefix}head.linear") and k.endswith(".weight") for k in arrays),
        bn_in_head=f"{prefix}head.bn1.weight" in arrays,
        norm_last_layer=bool(arrays.get("norm_last_layer", 1)),
        **{name: arrays[name].item() for name in scalars if name in arrays},
        **given,
    )


def stage_widths(arrays: Arrays, prefix: str) -> dict[str, int]:
    dim, hidden = arrays[f"{prefix}layer2_head.fc2.weight"].shape
    return {"stage_dim": dim, "stage_hidden": hidden, "stage_bottleneck": arrays[f"{prefix}layer2_head.conv1.weight"].shape[0]}


def grouped(crops: Sequence[np.ndarray]) -> Views:
    """Crops [B, 3, s, s] in order -> the groups the loader would make of views of these sizes."""
    spec = tuple(View(crop=Crop(size=x.shape[-1])) for x in crops)
    made = []
    for views in groups(spec):
        pixels = torch.from_numpy(np.concatenate([crops[v] for v in views])).double()
        made.append(Group(crops[views[0]].shape[-1], views, pixels))
    return Views(groups=tuple(made), boxes=None, flips=None, source_hw=None, index=torch.arange(len(crops[0])))


# ------------------------------------------------------------------------------------------------ multi-crop


def dino_multicrop(arrays: Arrays) -> Arrays:
    net = MultiCrop(backbone_of(arrays, "param/backbone."), config(arrays, "param/", DINO.Config)).double()
    load(net, arrays, "param/")
    crops = [arrays[f"crop{i}"] for i in range(len(arrays["crop_sizes"]))]
    calls: list[tuple[int, int]] = []
    hook = net.backbone.register_forward_pre_hook(lambda _, args: calls.append((len(args[0]), args[0].shape[-1])))
    output = net([group.pixels for group in grouped(crops).groups])
    hook.remove()
    (output * torch.from_numpy(arrays["grad_output"])).sum().backward()
    out = {
        "output": output.detach().numpy(),
        "backbone_call_batch_and_size": np.array(calls),
        **gradients(net, arrays, "grad/"),
        **dump(net, arrays, "after/"),
    }
    with torch.no_grad():
        out["output_first2_only"] = net([group.pixels for group in grouped(crops[:2]).groups]).numpy()
    return out


# ------------------------------------------------------------------------------------------------ SCFS's step


def scfs_step(arrays: Arrays) -> Arrays:
    """Two calls from injected stage maps: the method's own heads, search and losses, without its backbone."""
    prefix = "param/student/"
    channels = [arrays[f"{prefix}layer{k}_head.conv1.weight"].shape[1] for k in (2, 3, 4)]
    cfg = config(arrays, prefix, SCFS.Config, **stage_widths(arrays, prefix))
    method = SCFS(cfg, lambda: TinyConv([1, *channels]), "local").double().train()
    for net, name in ((method.student, "student"), (method.teacher, "teacher")):
        load(net.head, arrays, f"param/{name}/", "head.")
        load(net.stage_heads, arrays, f"param/{name}/", "stage_heads.")
    out: Arrays = {}
    losses: dict[str, list[float]] = {}
    for c, epoch in enumerate(arrays["epoch"].tolist()):
        call = f"call{c}/"
        sched = Sched(epoch=epoch, lr=0.0, weight_decay=0.0, ema_momentum=1.0)
        maps = {which: {f"layer{k}": stage_map(arrays, f"{call}{which}_feat_l{k}") for k in (2, 3, 4)} for which in INJECTED}
        student, teacher = method.student, method.teacher
        method.zero_grad()
        method.before_step(sched)
        s_global, s_local = (student.outputs(features(maps[which])) for which in INJECTED[:2])
        with torch.no_grad():
            queries = {s: m.detach().mean((2, 3)) for s, m in maps["student_local"].items()}
            t, searched = method.search(features(maps["teacher_global"]), queries)
        step = method.losses(s_global, s_local, t, searched)
        step.loss.backward()
        method.after_step(sched)
        out |= {f"{call}{who}_logits": o.logits.detach().numpy() for who, o in zip(INJECTED, (s_global, s_local, t), strict=True)}
        for k, s in zip((2, 3, 4), STAGES, strict=True):
            found = maps["teacher_global"][s]
            attention = feature_search(queries[s], found[: len(found) // 2]).numpy()
            out |= {f"{call}{who}_proj_l{k}": o.stages[s].detach().numpy() for who, o in zip(INJECTED, (s_global, s_local, t), strict=True)}
            out |= {f"{call}teacher_searched_proj_l{k}": searched[s].numpy(), f"{call}attention_l{k}": attention}
            out |= {f"{call}grad_{who}_feat_l{k}": maps[who][s].grad.numpy() for who in INJECTED[:2]}
            out[f"{call}center_l{k}"] = method.centers[s].numpy().copy()
        out[f"{call}center_final"] = method.centers["final"].numpy().copy()
        out |= gradients(student, arrays, f"{call}grad/student/")
        for net, name in ((student, "student"), (teacher, "teacher")):
            out |= dump(net, arrays, f"{call}after/{name}/")
        for name, value in {"loss_total": step.loss, **step.logs}.items():
            losses.setdefault(name.replace("layer", "l"), []).append(value.item())
    return out | {name: np.array(values) for name, values in losses.items()}


INJECTED = ("student_global", "student_local", "teacher_global")


def stage_map(arrays: Arrays, name: str) -> Tensor:
    return torch.from_numpy(np.array(arrays[name])).requires_grad_("student" in name)


def features(maps: dict[str, Tensor]) -> Features:
    return Features(pooled=maps["layer4"].mean((2, 3)), map=maps["layer4"], stages=maps)


# ------------------------------------------------------------------------------------------------ training loops

OPTIMIZERS: dict[str, type[OptimConfig]] = {"sgd": Sgd, "lars": BarlowLars, "adamw": AdamW}


def trained(arrays: Arrays, method: SelfDistillation, optimizer: str) -> tuple[Arrays, list[dict[str, float]]]:
    """The engine's own steps on the file's crops -> schedules and states after each epoch, and the loss and logs of every step."""
    epochs, per_epoch, batch = (int(arrays[name]) for name in ("epochs", "iters_per_epoch", "batch_size"))
    cfg = RunConfig(
        preset="golden",
        method=method.cfg,
        model=ModelConfig(),
        views=dino(),
        optim=OPTIMIZERS[optimizer](
            base_lr=float(arrays["lr_base"]),
            base_batch_size=256,
            min_lr=float(arrays["min_lr"]),
            weight_decay=float(arrays["weight_decay"]),
            weight_decay_end=float(arrays["weight_decay_end"]),
            schedule="dino",
            warmup_epochs=int(arrays["warmup_epochs"]),
            clip_grad=float(arrays["clip_grad"]),
        ),
        train=TrainConfig(epochs=epochs, global_batch_size=batch, ema_momentum=float(arrays["momentum_teacher"])),
        efficiency=EfficiencyConfig(dtype="fp64", compile="off"),
    )
    for net in (method.double().student, method.teacher):
        load(net, arrays, "init/")
    state = prepare(method, cfg, ALONE, per_epoch)
    out: Arrays = {}
    scheds, steps = [], []
    crops = [arrays[f"crop{i}"] for i in range(sum(k.startswith("crop") and k[4:].isdecimal() for k in arrays))]
    for t in range(epochs * per_epoch):
        scheds.append(state.schedules.at(t))
        step = train_step(state, [grouped([x[t] for x in crops])])
        steps.append({"loss": step.loss.item(), **{k: v.item() for k, v in step.logs.items()}})
        if (t + 1) % per_epoch == 0:
            e = t // per_epoch
            out |= dump(method.student, arrays, f"student_after_epoch{e}/") | dump(method.teacher, arrays, f"teacher_after_epoch{e}/")
            out |= {f"center_{name}_after_epoch{e}": method.centers[name].numpy().copy() for name in method.centers.sizes}
    for name, field in (("lr", "lr"), ("wd", "weight_decay"), ("momentum", "ema_momentum")):
        out[f"{name}_schedule"] = np.array([getattr(s, field) for s in scheds])
    return out, steps


def dino_trainloop(arrays: Arrays) -> Arrays:
    method = DINO(config(arrays, "init/", DINO.Config), lambda: backbone_of(arrays, "init/backbone."), "local")
    out, steps = trained(arrays, method, str(arrays["optimizer"]))
    out["loss_per_iter"] = np.array([step["loss"] for step in steps])
    out["center_after_epoch"] = np.stack([out[f"center_final_after_epoch{e}"] for e in range(int(arrays["epochs"]))])
    return out


def scfs_trainloop(arrays: Arrays) -> Arrays:
    cfg = config(arrays, "init/", SCFS.Config, **stage_widths(arrays, "init/"))
    method = SCFS(cfg, lambda: backbone_of(arrays, "init/backbone."), "local")
    out, steps = trained(arrays, method, "lars" if arrays["optimizer_is_lars"] else "sgd")
    out["loss_total_per_iter"] = np.array([step["loss"] for step in steps])
    out["loss_final_per_iter"] = np.array([step["loss_final"] for step in steps])
    for s in STAGES:
        both = [[step[f"loss_{s}_{part}"] for part in ("global", "local")] for step in steps]
        out[f"loss_{s.replace('layer', 'l')}_global_local_per_iter"] = np.array(both)
    return {k.replace("center_layer", "center_l"): v for k, v in out.items()}


LOOP_INPUTS = (
    *("batch_size", "crop_sizes", "epochs", "iters_per_epoch", "lr_base", "min_lr", "warmup_epochs", "weight_decay", "weight_decay_end"),
    *("momentum_teacher", "warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp_epochs", "clip_grad", "freeze_last_layer"),
    *("norm_last_layer", "head_use_bn", "optimizer", "backbone", "num_heads", "num_local_crops", "global_size", "local_size"),
    *("optimizer_is_lars", "init/*", "crop[0-9]", "crop[0-9][0-9]"),
)
STEP_INPUTS = (
    *("nepochs", "warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp_epochs", "dino_out_dim", "batch_size", "num_local_crops"),
    *("epoch", "param/*", "call?/*_feat_l?"),
)

KINDS = {
    "dino/multicrop": Kind(dino_multicrop, ("batch_size", "crop_sizes", "head_use_bn", "param/*", "grad_output", "crop[0-9]*")),
    "dino/trainloop": Kind(dino_trainloop, LOOP_INPUTS),
    "scfs/step": Kind(scfs_step, STEP_INPUTS),
    "scfs/trainloop": Kind(scfs_trainloop, LOOP_INPUTS),
}
