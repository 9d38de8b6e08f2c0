"""Kinds of the MoCo v2 and LEWEL_M files: losses and queues, schedules, whole loops on one and several ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastssl.config import EfficiencyConfig, ModelConfig, RunConfig, Sgd, TrainConfig
from fastssl.distributed import Dist
from fastssl.engine import prepare, train_step
from fastssl.method import StepOutput
from fastssl.methods.lewel_m import LEWELM
from fastssl.methods.mocov2 import MoCoV2, MomentumContrast
from fastssl.optim.build import build_schedules
from fastssl.optim.schedules import step_decay
from fastssl.precision import unit_rows
from fastssl.presets import PRESETS
from fastssl.recipes import mocov2
from tests.golden.kind import Arrays, Kind
from tests.golden.toy import ToyBackbone, two_views
from tests.ranks import run_ranks

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))
NETWORKS = {"encoder_q.": "query.", "encoder_k.": "key."}
MODULES = {"fc.": "projector.mlp.", "neck.proj.": "projector.", "neck.proj_obj.": "aligned_projector.", "backbone.": "backbone."}
QUEUES = {"queue": "global", "queue_global": "global", "queue_aligned": "aligned"}


def ours(name: str) -> str:
    """Official name of a parameter or buffer -> ours."""
    if name.removesuffix("_ptr") in QUEUES:
        return f"queues.{QUEUES[name.removesuffix('_ptr')]}.{'pointer' if name.endswith('_ptr') else 'rows'}"
    for network, our_network in NETWORKS.items():
        if name.startswith(network):
            rest = name.removeprefix(network)
            for module, our_module in MODULES.items():
                if rest.startswith(module):
                    return our_network + our_module + rest.removeprefix(module)
            return f"{our_network}backbone.{rest}"
    return name


def theirs(name: str, tensor: Tensor, like: np.ndarray) -> np.ndarray:
    """Our tensor in the file's layout: queues are columns there, position-wise linears have one more axis, pointers too."""
    a = tensor.detach().numpy()
    return (a.T if name.endswith(".rows") else a.reshape(like.shape)).copy()


def load(method: MomentumContrast, arrays: Arrays, prefix: str) -> None:
    state = method.state_dict()
    given = {ours(k.removeprefix(prefix)): torch.from_numpy(np.array(a)) for k, a in arrays.items() if k.startswith(prefix)}
    method.load_state_dict({k: t.T if k.endswith(".rows") else t.reshape(state[k].shape) for k, t in given.items()})


def dump(tensors: dict[str, Tensor], arrays: Arrays, prefix: str) -> Arrays:
    names = {k: ours(k.removeprefix(prefix)) for k in arrays if k.startswith(prefix)}
    return {k: theirs(name, tensors[name], arrays[k]) for k, name in names.items()}


def logits(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> np.ndarray:
    """[R, 1 + K]: what the loss never holds."""
    return (torch.cat(((q * k).sum(1, keepdim=True), q @ queue.T), 1) / temperature).detach().numpy()


# ------------------------------------------------------------------------------------------------ losses and queues


def with_queues(method: MomentumContrast, arrays: Arrays, names: dict[str, str]) -> None:
    for official, name in names.items():
        method.queues[name].rows.copy_(torch.from_numpy(arrays[f"{official}_before"].T))
        method.queues[name].pointer.fill_(int(arrays[f"{official}_ptr_before"].item()))


def queues_after(method: MomentumContrast, names: dict[str, str]) -> Arrays:
    out: Arrays = {}
    for official, name in names.items():
        queue = method.queues[name]
        out |= {f"{official}_after": queue.rows.numpy().T.copy(), f"{official}_ptr_after": queue.pointer.numpy().reshape(1).copy()}
    return out


def mocov2_loss(arrays: Arrays) -> Arrays:
    raw = torch.from_numpy(np.array(arrays["query_raw"])).requires_grad_()
    cfg = MoCoV2.Config(dim=raw.shape[1], queue_size=arrays["queue_before"].shape[1], temperature=float(arrays["temperature"]))
    method = MoCoV2(cfg, lambda: ToyBackbone(1, 2), "local").to(raw.dtype)
    with_queues(method, arrays, {"queue": "global"})
    q, k = unit_rows(raw), unit_rows(torch.from_numpy(arrays["key_raw"]))
    step = method.losses(q, k)
    step.loss.backward()
    scores = logits(q, k, method.queues["global"].rows, cfg.temperature)
    for n, name in ((1, "top1"), (5, "top5")):
        assert np.isclose(step.logs[name], ((scores[:, 1:] > scores[:, :1]).sum(1) < n).mean()), f"{name} is not that of the logits"
    method.enqueue(step.keys)
    return {
        "query": q.detach().numpy(),
        "key": k.numpy(),
        "logits": scores,
        "labels": np.zeros(len(q), dtype=np.int64),  # the positive comes first
        "loss": step.loss.detach().numpy(),
        "grad_query_raw": raw.grad.numpy(),
        **queues_after(method, {"queue": "global"}),
    }


def lewel_m_loss(arrays: Arrays) -> Arrays:
    names = {"queue_global": "global", "queue_aligned": "aligned"}
    leaves = {k: torch.from_numpy(np.array(arrays[k])) for k in ("query_global", "query_aligned", "key_global", "key_aligned")}
    dim, aligned = arrays["query_aligned"].shape[1:]
    temperature = float(arrays["temperature"])
    cfg = LEWELM.Config(
        dim=dim,
        heads=dim // aligned,
        loss_weight=float(arrays["loss_weight"]),
        queue_size=arrays["queue_global_before"].shape[1],
        aligned_queue_size=arrays["queue_aligned_before"].shape[1],
        aligned_queue=str(arrays["queue_mode"]),
        temperature=temperature,
        aligned_temperature=temperature,
    )
    method = LEWELM(cfg, lambda: ToyBackbone(1, dim), "local").to(leaves["query_global"].dtype)
    with_queues(method, arrays, names)

    def encoder(net: str):
        """A network that puts out the file's embeddings."""
        return lambda x: (leaves[f"{net}_global"][..., 0], leaves[f"{net}_aligned"].transpose(1, 2))

    for name in ("query_global", "query_aligned"):
        leaves[name].requires_grad_()
    q, k = method.encode(encoder("query"), None), method.encode(encoder("key"), None)
    step = method.losses(q, k)
    step.loss.backward()
    out = {
        "logits_global": logits(q[:, 0], k[:, 0], method.queues["global"].rows, temperature),
        "logits_aligned": logits(q[:, 1:].flatten(0, 1), k[:, 1:].flatten(0, 1), method.queues["aligned"].rows, temperature),
        "loss_global": step.logs["loss_global"].numpy(),
        "loss_aligned": step.logs["loss_aligned"].numpy(),
        "loss_total": step.loss.detach().numpy(),
        "aligned_keys_enqueued": step.keys["aligned"].numpy(),
        **{f"grad_{name}": leaves[name].grad.numpy() for name in ("query_global", "query_aligned")},
    }
    method.enqueue(step.keys)
    return out | queues_after(method, names)


def mocov2_schedules(arrays: Arrays) -> Arrays:
    """mocov2_E: the preset of E epochs at its published batch; mocov1_E: the step schedule, which no preset of ours has."""
    out: Arrays = {}
    for key in (k for k in arrays if k.endswith("/lr_per_epoch")):
        version, epochs = key.split("/")[0].split("_")
        if version == "mocov2":
            schedules = build_schedules(PRESETS[f"mocov2_r50_{epochs}ep"](), steps_per_epoch=3)
            rates = [{schedules.at(3 * e + i).lr for i in range(3)} for e in range(int(epochs))]
            assert all(len(r) == 1 for r in rates), "the learning rate changes within an epoch"
            out[key] = np.array([r.pop() for r in rates])
        else:
            out[key] = np.array([step_decay(e, base_lr=0.03, milestones=(120, 160)) for e in range(int(epochs))])
    return out


# ------------------------------------------------------------------------------------------------ whole loops


class Seen:
    """Mixed into a method: keeps MoCo's logits of every step, and shuffles by the file instead of by chance."""

    def __init__(self, *args):
        super().__init__(*args)
        self.logits: list[np.ndarray] = []
        self.orders: Iterator[np.ndarray] = iter(())

    def losses(self, q: Tensor, k: Tensor) -> StepOutput:
        if isinstance(self, MoCoV2):
            self.logits.append(logits(q, k, self.queues["global"].rows, self.temperature))
        return super().losses(q, k)

    def permutation(self, n: int, device: torch.device) -> Tensor:
        order = torch.from_numpy(next(self.orders))
        assert len(order) == n, f"{n} images are shuffled, the file's permutation has {len(order)}"
        return order


class SeenMoCoV2(Seen, MoCoV2):
    pass


class SeenLEWELM(Seen, LEWELM):
    pass


def method_of(arrays: Arrays, norm: str) -> MomentumContrast:
    """The untrained method with the shapes and options of the file."""
    start = "state_step0/encoder_q."
    temperature = float(arrays["temperature"])
    nested = "backbone." if f"{start}backbone.conv1.weight" in arrays else ""
    widths = [arrays[f"{start}{nested}conv{i}.weight"].shape[0] for i in (1, 2)]
    if "state_step0/queue" in arrays:
        hidden, dim = arrays[f"{start}fc.0.weight"].shape[0], arrays[f"{start}fc.2.weight"].shape[0]
        queue = arrays["state_step0/queue"].shape[1]
        cfg = MoCoV2.Config(hidden=hidden, dim=dim, queue_size=queue, temperature=temperature)
        return SeenMoCoV2(cfg, lambda: ToyBackbone(*widths), norm)
    bn = bool(arrays["head_batchnorm"])
    cfg = LEWELM.Config(
        hidden=arrays[f"{start}neck.proj.mlp.0.weight"].shape[0],
        dim=arrays[f"{start}neck.proj.mlp.{3 if bn else 2}.weight"].shape[0],
        heads=int(arrays["num_heads"]),
        scale=float(arrays["temperature_scale"]),
        loss_weight=float(arrays["loss_weight"]),
        head_norm="bn" if bn else "none",
        queue_size=arrays["state_step0/queue_global"].shape[1],
        aligned_queue_size=arrays["state_step0/queue_aligned"].shape[1],
        aligned_queue=str(arrays["queue_mode"]),
        temperature=temperature,
        aligned_temperature=temperature,
    )
    return SeenLEWELM(cfg, lambda: ToyBackbone(*widths), norm)


def run_loop(arrays: Arrays, dist: Dist, norm: str) -> Arrays:
    """The engine's own steps on this rank's rows of the file's images."""
    steps, batch = arrays["images_query"].shape[:2]
    method = method_of(arrays, norm).double()
    method.orders = iter(arrays.get("shuffle_permutations", ()))
    load(method, arrays, "state_step0/")
    cfg = RunConfig(
        preset="golden",
        method=MoCoV2.Config(),
        model=ModelConfig(norm=norm),
        views=mocov2(),
        optim=Sgd(
            base_lr=float(arrays.get("base_lr", arrays.get("lr"))),
            weight_decay=float(arrays["weight_decay"]),
            sgd_momentum=float(arrays["sgd_momentum"]),
            not_decayed="none",
            warmup_epochs=int(arrays.get("warmup_epochs", 0)),
        ),
        train=TrainConfig(
            epochs=int(arrays.get("epochs", 1)),
            global_batch_size=batch,
            ema_momentum=float(arrays["key_momentum"]),
            ema_schedule="constant",
        ),
        efficiency=EfficiencyConfig(dtype="fp64", compile="off"),
    )
    # A file with one learning rate is one epoch of the cosine over epochs.
    state = prepare(method, cfg, dist, int(arrays.get("iters_per_epoch", steps)))
    several = dist.world > 1
    out: Arrays = {}

    def keep_first_gradients(*_) -> None:
        if state.step == 0:
            gradients = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
            out.update(dump(gradients, arrays, "grad_step1_avg/" if several else "grad_step1/"))

    state.optimizer.register_step_pre_hook(keep_first_gradients)
    mine = slice(dist.rank * batch // dist.world, (dist.rank + 1) * batch // dist.world)
    rates, losses, parts = [], [], {"loss_global": [], "loss_aligned": []}
    for t in range(steps):
        rates.append(state.schedules.at(t).lr)
        step = train_step(state, [two_views(arrays["images_query"][t, mine], arrays["images_key"][t, mine])])
        losses.append(step.loss.item())
        for name in parts.keys() & step.logs.keys():
            parts[name].append(step.logs[name].item())
        for prefix in (f"state_step{t + 1}/", f"rank{dist.rank}/state_step{t + 1}/"):
            out |= dump(method.state_dict(), arrays, prefix)
    buffers = {n: state.optimizer.state[p]["momentum_buffer"] for n, p in method.named_parameters() if p.requires_grad}
    out |= dump(buffers, arrays, "momentum_buffer_final/")
    suffix = f"_rank{dist.rank}" if several else ""
    out |= {f"losses{suffix}": np.array(losses), "lrs": np.array(rates)}
    out |= {f"{name.replace('loss', 'losses')}{suffix}": np.array(values) for name, values in parts.items()}
    if several:
        out[f"logits{suffix}"] = np.array(method.logits)
    elif method.logits:
        out |= {"logits_step1": method.logits[0], "logits_final": method.logits[-1]}
    return out


def loop(eman: bool = False):
    def reproduce(arrays: Arrays) -> Arrays:
        return run_loop(arrays, ALONE, "eman" if eman or arrays.get("eman", 0) else "shuffle")

    return reproduce


def one_rank(rank: int, world: int, arrays: Arrays) -> Arrays:
    return run_loop(arrays, Dist(rank, world, rank, world, torch.device("cpu")), "shuffle")


def ddp(arrays: Arrays) -> Arrays:
    results = run_ranks(sum(k.startswith("losses_rank") for k in arrays), one_rank, arrays)
    for other in results[1:]:
        for name in other.keys() & results[0].keys():
            assert np.allclose(other[name], results[0][name], rtol=1e-12, atol=1e-15), f"{name} differs between ranks"
    return {k: v for result in results for k, v in result.items()}


LOOP_INPUTS = (
    *("batch", "per_rank_batch", "base_lr", "lr", "weight_decay", "sgd_momentum", "key_momentum", "temperature", "queue_size", "epochs"),
    *("warmup_epochs", "iters_per_epoch", "num_steps", "num_heads", "temperature_scale", "head_batchnorm", "loss_weight", "queue_mode"),
    *("eman", "images_query", "images_key", "shuffle_permutations", "state_step0/*"),
)

KINDS = {
    "mocov2/loss": Kind(mocov2_loss, ("query_raw", "key_raw", "temperature", "queue_before", "queue_ptr_before")),
    "mocov2/schedules": Kind(mocov2_schedules, ()),
    "mocov2/step": Kind(loop(), LOOP_INPUTS),
    "mocov2/eman_step": Kind(loop(eman=True), LOOP_INPUTS),
    "mocov2/ddp": Kind(ddp, LOOP_INPUTS),
    "lewel_m/loss": Kind(
        lewel_m_loss,
        ("query_global", "query_aligned", "key_*", "temperature", "loss_weight", "queue_mode", "queue_*_before"),
    ),
    "lewel_m/step": Kind(loop(), LOOP_INPUTS),
}
