"""Kinds of the SFRIK, SimCLR, AUH and VICReg files that need methods, projector or backbone (losses: gram_family.py)."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.batch import Group, Views
from fastssl.config import BarlowLars, EfficiencyConfig, ModelConfig, RunConfig, TrainConfig
from fastssl.distributed import Dist
from fastssl.engine import forward_backward, prepare, train_step
from fastssl.losses.mmd import kernel_coefficients, mmd_uniform, polynomial
from fastssl.methods.auh import AUH
from fastssl.methods.joint_embedding import JointEmbedding
from fastssl.methods.sfrik import SFRIK, alignment
from fastssl.methods.simclr import SimCLR
from fastssl.methods.vicreg import VICReg
from fastssl.models.backbones import build_backbone
from fastssl.models.features import Features
from fastssl.precision import unit_rows
from fastssl.recipes import vicreg
from tests.golden.kind import Arrays, Kind
from tests.ranks import run_ranks

METHODS: dict[str, type[JointEmbedding]] = {"sfrik": SFRIK, "simclr": SimCLR, "auh": AUH, "vicreg": VICReg}
COEFFICIENTS = ("sim_coeff", "mmd_coeff", "unif_coeff", "std_coeff", "cov_coeff", "scale", "temperature", "reg_small")
ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))


def tensor(a: np.ndarray, *, grad: bool = False) -> Tensor:
    return torch.from_numpy(np.array(a)).requires_grad_(grad)


class PassedThrough(nn.Module):
    """A backbone whose images are its features already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Features:
        return Features(pooled=x)


def rows_as_views(*groups: tuple[Tensor, int]) -> Views:
    """Groups of (features [views * B, d] view-major, number of views)."""
    made, first = [], 0
    for rows, n in groups:
        made.append(Group(size=rows.shape[1], views=tuple(range(first, first + n)), pixels=rows))
        first += n
    index = torch.arange(len(groups[0][0]) // groups[0][1])
    return Views(groups=tuple(made), boxes=None, flips=None, source_hw=None, index=index)


def method_of(name: str, arrays: Arrays, *, mlp: str = "2") -> JointEmbedding:
    cls = METHODS[name]
    given = {k: arrays[k].item() for k in COEFFICIENTS if k in arrays}
    if "weights" in arrays:
        given["weights"] = tuple(arrays["weights"].tolist())
    if "general_indices" in arrays:
        given["general_indices"] = tuple(arrays["general_indices"].tolist())
    elif "num_img_crops" in arrays:  # OBoW's files: all is compared with the original
        given["general_indices"] = (0,)
    mlp_input = int(arrays["mlp"][0]) if "mlp" in arrays else arrays["h0"].shape[-1] if "h0" in arrays else 2
    return cls(cls.Config(mlp=mlp, **given), lambda: PassedThrough(mlp_input), "sync")


def run_config(method: JointEmbedding, **changed) -> RunConfig:
    optim = {"base_lr": 1.0, "base_batch_size": 256, "schedule": "vicreg", **changed.pop("optim", {})}
    return RunConfig(
        preset="golden",
        method=method.cfg,
        model=ModelConfig(norm="sync"),
        views=vicreg(),
        optim=BarlowLars(**optim),
        train=TrainConfig(**changed),
        efficiency=EfficiencyConfig(dtype="fp64", compile="off"),
    )


# ------------------------------------------------------------------------------------------------ losses of several views


def gradients(loss: Tensor, *leaves: Tensor) -> list[np.ndarray]:
    return [g.numpy() for g in torch.autograd.grad(loss, leaves, retain_graph=True)]


def sfrik_twoview(arrays: Arrays) -> Arrays:
    method = method_of("sfrik", arrays)
    x, y = (tensor(arrays[f"proj_{v}"], grad=True) for v in "xy")
    z_x, z_y = unit_rows(x), unit_rows(y)
    align = alignment((z_x, z_y), method.cfg.general_indices)
    mmd_x, mmd_y = (mmd_uniform(z, method.cfg.weights) for z in (z_x, z_y))
    total = method.loss((z_x, z_y))
    gram = z_x.detach() @ z_x.detach().T
    out: Arrays = {
        "z_x": z_x.detach().numpy(),
        "z_y": z_y.detach().numpy(),
        "gram_x": gram.numpy(),
        "phi_x": polynomial(gram, kernel_coefficients(method.cfg.weights, z_x.shape[1])[0]).numpy(),
        "align": align.detach().numpy(),
        "mmd_x": mmd_x.detach().numpy(),
        "mmd_y": mmd_y.detach().numpy(),
        "mmd": total.logs["mmd"].numpy(),
        "total": total.loss.detach().numpy(),
    }
    for name, loss, leaves in (
        ("total_x total_y", total.loss, (x, y)),
        ("align_x align_y", align, (x, y)),
        ("mmd_x", mmd_x, (x,)),
        ("mmd_y", mmd_y, (y,)),
    ):
        out |= {f"grad_{n}": g for n, g in zip(name.split(), gradients(loss, *leaves), strict=True)}
    return out


def several_views(arrays: Arrays) -> Arrays:
    """OBoW's and SwAV's files: what their authors' code computes of views [V, B, q]."""
    method = method_of("sfrik", arrays)
    views = tensor(arrays["views"], grad=True)
    z = [unit_rows(v) for v in views]
    total = method.loss(z)
    with torch.no_grad():
        pairwise = torch.stack([torch.stack([alignment((a, b), (0,)) for b in z]) for a in z]).numpy()
        mmd = torch.stack([mmd_uniform(v, method.cfg.weights) for v in z]).numpy()
    return {
        "align_per_view": pairwise[0, 1:],
        "align_pairwise": pairwise,
        "mmd_per_view": mmd,
        "total": total.loss.detach().numpy(),
        "grad_views": gradients(total.loss, views)[0],
    }


# ------------------------------------------------------------------------------------------------ projector and training


def load(projector: nn.Module, arrays: Arrays, prefix: str) -> None:
    projector.load_state_dict({k.removeprefix(prefix): tensor(a) for k, a in arrays.items() if k.startswith(prefix)})


def projector(arrays: Arrays) -> Arrays:
    """Forward passes of both views through the method, its loss and gradients, and what the passes left in BatchNorm."""
    method = method_of(str(arrays["kind"]).split("/")[0], arrays, mlp="-".join(map(str, arrays["mlp"][1:])))
    state = prepare(method, run_config(method, global_batch_size=int(arrays.get("batch_size_arg", len(arrays["h_x"])))), ALONE, 20)
    load(method.encoder.projector, arrays, "param__")
    h_x, h_y = (tensor(arrays[f"h_{v}"], grad=True) for v in "xy")
    with torch.no_grad():
        method.eval()
        initial = method.encoder([h_x])[0].numpy()
        method.train()
    seen: list[Tensor] = []
    method.encoder.register_forward_hook(lambda module, args, zs: seen.extend(z.detach() for z in zs))
    out = method(rows_as_views((torch.cat((h_x, h_y)), 2)), state.schedules.at(0))
    out.loss.backward()
    x, y = seen
    parameters, after = dict(method.encoder.projector.named_parameters()), method.encoder.projector.state_dict()
    return {
        "proj_x_train": x.numpy(),
        "proj_y_train": y.numpy(),
        "proj_x_eval_initstats": initial,
        "loss": out.loss.detach().numpy(),
        "grad_h_x": h_x.grad.numpy(),
        "grad_h_y": h_y.grad.numpy(),
        **{f"grad__{k}": p.grad.numpy() for k, p in parameters.items()},
        **{f"after__{k}": v.numpy() for k, v in after.items()},
    }


def sfrik_train(arrays: Arrays) -> Arrays:
    """The engine's own steps, from the middle of a run."""
    method = method_of("sfrik", arrays, mlp="-".join(map(str, arrays["mlp"][1:])))
    cfg = run_config(
        method,
        optim={"base_lr": float(arrays["base_lr"]), "weight_decay": float(arrays["weight_decay"])},
        epochs=int(arrays["epochs"]),
        global_batch_size=int(arrays["batch_size"]),
    )
    state = prepare(method, cfg, ALONE, int(arrays["steps_per_epoch"]))
    load(method.encoder.projector, arrays, "param0__")
    state.step = int(arrays["start_step"])
    losses, rates = [], []
    for h_x, h_y in zip(arrays["h_x"], arrays["h_y"], strict=True):
        rates.append(state.schedules.at(state.step).lr)
        losses.append(train_step(state, [rows_as_views((tensor(np.concatenate((h_x, h_y))), 2))]).loss.item())
    after = {f"paramT__{k}": v.numpy() for k, v in method.encoder.projector.state_dict().items()}
    return {"loss": np.array(losses), "lr": np.array(rates), **after}


# ------------------------------------------------------------------------------------------------ several ranks


def distributed(arrays: Arrays) -> Arrays:
    """The file's ranks under DDP, and one process on all their rows."""
    world = int(arrays["world_size"])
    ranks = run_ranks(world, one_rank, arrays)
    alone = one_rank(0, 1, arrays)
    for rank in ranks:
        assert np.allclose(rank["weight"], ranks[0]["weight"], rtol=1e-12, atol=0), "DDP's gradients differ between ranks"
    inputs = [k for k in ranks[0] if k.startswith("h")]
    return {
        "loss_rank": np.array([rank["loss"] for rank in ranks]),
        "grad_weight_ddp": ranks[0]["weight"],
        "loss_global": np.array(alone["loss"]),
        "grad_weight_global": alone["weight"],
        **{f"grad_{h}_rank": np.stack([rank[h] for rank in ranks]) for h in inputs},
    }


def one_rank(rank: int, world: int, arrays: Arrays) -> dict[str, np.ndarray | float]:
    """Loss and gradients of this rank's rows: of the weight after DDP's average, of the inputs as they are."""
    method = method_of(str(arrays["kind"]).split("/")[0], arrays, mlp=str(len(arrays["weight"])))
    load(method.encoder.projector, {"0.weight": arrays["weight"]}, "")
    batch = int(arrays.get("batch_size_arg", int(arrays["world_size"]) * int(arrays["per_rank_batch"])))
    state = prepare(method, run_config(method, global_batch_size=batch), Dist(rank, world, rank, world, torch.device("cpu")), 20)
    names = sorted((k for k in arrays if re.fullmatch(r"h\d+", k)), key=lambda k: int(k[1:]))
    leaves = {k: tensor(arrays[k][rank] if world > 1 else of_all_ranks(arrays, k), grad=True) for k in names}
    rows = int(arrays["per_rank_batch"]) * int(arrays["world_size"]) // world
    groups = [(x, len(x) // rows) for x in leaves.values()]
    if sum(n for _, n in groups) == 2:  # two views of one size are one group
        groups = [(torch.cat([x for x, _ in groups]), 2)]
    out = forward_backward(state, iter([rows_as_views(*groups)]), state.schedules.at(0))
    weight = method.encoder.projector.get_parameter("0.weight").grad.numpy()
    return {"loss": out.loss.item(), "weight": weight, **{k: x.grad.numpy() for k, x in leaves.items()}}


def of_all_ranks(arrays: Arrays, name: str) -> np.ndarray:
    """[world, V * B, d], view-major within a rank -> [V * world * B, d], view-major."""
    h = arrays[name]
    return h.reshape(len(h), -1, int(arrays["per_rank_batch"]), h.shape[-1]).swapaxes(0, 1).reshape(-1, h.shape[-1])


# ------------------------------------------------------------------------------------------------ backbone


def resnet(arrays: Arrays) -> Arrays:
    net = build_backbone(str(arrays["arch"]), zero_init_residual=True).double()
    last = [m.bn3 if hasattr(m, "bn3") else m.bn2 for m in net.modules() if hasattr(m, "downsample")]
    assert not any(bn.weight.any() for bn in last), "the last BatchNorm of each residual branch starts from 0"
    state = net.state_dict()
    out: Arrays = {
        "embedding": np.array(net.num_features),
        "names": np.array(list(state)),
        "shapes": np.array([str(tuple(v.shape)) for v in state.values()]),
        "n_params": np.array(sum(p.numel() for p in net.parameters())),
    }
    for j in range(int(arrays["n_inputs"])):
        x = tensor(arrays[f"x{j}"]).double()
        for mode in ("eval", "train"):
            formula_weights(net)
            with torch.no_grad():
                out[f"feat_{mode}{j}"] = net.train(mode == "train")(x).pooled.numpy()
    for name in ("mean", "var"):
        out[f"bn1_running_{name}_after_last_train"] = net.bn1.get_buffer(f"running_{name}").numpy()
    return out


def formula_weights(net: nn.Module) -> None:
    """The weights of golden/sfrik.md, "Backbone"."""
    tensors = {n: v for n, v in net.state_dict().items() if not n.endswith("num_batches_tracked")}
    for k, (name, v) in enumerate(tensors.items()):
        i = torch.arange(v.numel(), dtype=torch.float64)
        s = torch.sin(1.3 * k + 0.11 + 0.37 * (i % 1009) + 0.91 * (i % 641)).view(v.shape)
        if v.ndim == 4:
            s = s * (4 / (v.shape[0] * v.shape[2] * v.shape[3])) ** 0.5
        elif name.endswith("running_var"):
            s = 1 + 0.5 * s.square()
        else:
            s = 0.1 * s + (name.endswith(".weight"))
        v.copy_(s)


COMMON = (*COEFFICIENTS, "weights", "batch_size_arg")
MULTI_CROP = ("views", "q", "num_img_crops", "num_img_patches", "nmb_crops", "general_indices")
PROJECTOR = Kind(projector, (*COMMON, "mlp", "h_x", "h_y", "param__*"))
DISTRIBUTED = Kind(distributed, (*COMMON, *MULTI_CROP, "mode", "world_size", "per_rank_batch", "weight", "h[0-9]*"))

KINDS = {
    "sfrik/twoview": Kind(sfrik_twoview, (*COMMON, "proj_?", "q")),
    "sfrik/obow": Kind(several_views, (*COMMON, *MULTI_CROP)),
    "sfrik/swav": Kind(several_views, (*COMMON, *MULTI_CROP)),
    "sfrik/train": Kind(
        sfrik_train,
        (*COMMON, "mlp", "h_?", "start_step", "epochs", "steps_per_epoch", "base_lr", "batch_size", "weight_decay", "param0__*"),
    ),
    "sfrik/resnet": Kind(resnet, ("arch", "n_inputs", "x[0-9]*")),
    **{f"{name}/projector": PROJECTOR for name in METHODS},
    **{f"{name}/dist": DISTRIBUTED for name in METHODS},
}
