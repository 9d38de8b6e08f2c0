"""Kinds of the DINO and SCFS files that need no whole method: heads, losses, centres, feature search."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fastssl.losses.distillation import dino_loss, matched_loss, teacher_probabilities, teacher_temperature
from fastssl.models.centers import Centers
from fastssl.models.heads import DINOHead
from fastssl.models.stage_heads import StageHead, attended, feature_search
from tests.golden.kind import Arrays, Kind
from tests.golden.toy import dump_grads, dump_state, load_state
from tests.ranks import run_ranks


def tensor(a: np.ndarray, *, grad: bool = False) -> Tensor:
    return torch.from_numpy(np.array(a)).requires_grad_(grad)


class OneDtype(Kind):
    """Files of float32 runs store some scalars as float64: a number computed in float32 is compared as one."""

    def compare(self, name: str, actual: np.ndarray, expected: np.ndarray) -> None:
        super().compare(name, actual, expected.astype(actual.dtype))


# ------------------------------------------------------------------------------------------------ heads and search


def trained_once(head: nn.Module, arrays: Arrays) -> Arrays:
    """One call in training mode with its gradients and running statistics, then one in eval mode."""
    x = tensor(arrays["input"], grad=True)
    load_state(head.to(x.dtype), arrays, "param/")
    y = head.train()(x)
    (y * tensor(arrays["grad_output"])).sum().backward()
    out = {
        "output_train": y.detach().numpy(),
        "grad_input": x.grad.numpy(),
        **dump_grads(head, arrays, "grad/"),
        **dump_state(head, arrays, "after/"),
    }
    with torch.no_grad():
        return {**out, "output_eval_after": head.eval()(x).numpy()}


def dino_head(arrays: Arrays) -> Arrays:
    out_features, bottleneck = arrays["param/last.v"].shape
    head = DINOHead(
        arrays["input"].shape[1],
        out_features,
        hidden=arrays["param/linear1.weight"].shape[0],
        bottleneck=bottleneck,
        layers=int(arrays["nlayers"]),
        bn=bool(arrays["use_bn"]),
        norm_last_layer=bool(arrays["norm_last_layer"]),
    )
    out = trained_once(head, arrays)
    assert {n for n, p in head.last.named_parameters() if p.grad is not None} == ({"v"} if arrays["norm_last_layer"] else {"v", "g"})
    return out


def scfs_head(arrays: Arrays) -> Arrays:
    dim, hidden = arrays["param/fc2.weight"].shape
    bottleneck, channels = arrays["param/conv1.weight"].shape[:2]
    return trained_once(StageHead(channels, bottleneck=bottleneck, hidden=hidden, dim=dim), arrays)


def scfs_search(arrays: Arrays) -> Arrays:
    images = int(arrays["batch_size"])
    out: Arrays = {}
    for stage in (k.removeprefix("teacher_global_feat_") for k in arrays if k.startswith("teacher_global_feat_")):
        maps = tensor(arrays[f"teacher_global_feat_{stage}"])[:images].contiguous(memory_format=torch.channels_last)
        attention = feature_search(tensor(arrays[f"student_local_feat_{stage}"]).mean((2, 3)), maps)
        out |= {f"attention_{stage}": attention.numpy(), f"searched_feat_{stage}": attended(attention, maps).numpy()}
    return out


# ------------------------------------------------------------------------------------------------ losses and centres


def temperature_at(arrays: Arrays, epoch: int) -> float:
    return teacher_temperature(
        int(epoch),
        warmup=float(arrays["warmup_teacher_temp"]),
        final=float(arrays["teacher_temp"]),
        warmup_epochs=int(arrays["warmup_teacher_temp_epochs"]),
    )


def dino_loss_sequence(arrays: Arrays) -> Arrays:
    """The file's loss calls on one rank, each followed by the update of the centre."""
    steps: list[Arrays] = []
    students, teachers = arrays["student_output"], arrays["teacher_output"]
    centers = Centers({"final": students.shape[-1]}, float(arrays["center_momentum"])).to(tensor(students).dtype)
    for epoch, s, t in zip(arrays["epoch"], students, teachers, strict=True):
        student, teacher = tensor(s, grad=True), tensor(t)
        temperature = temperature_at(arrays, epoch)
        probs = teacher_probabilities(teacher, temperature, centers["final"])
        loss = dino_loss(*student.tensor_split((len(t),)), probs, float(arrays["student_temp"]))
        loss.backward()
        centers.accumulate({"final": teacher})
        centers.update()
        steps.append(
            {
                "teacher_temp_at_step": np.array(temperature),
                "teacher_probs": probs.numpy(),
                "loss": loss.detach().numpy(),
                "center_after": centers["final"].numpy().copy(),
                "grad_student_output": student.grad.numpy(),
            }
        )
    return sequence(steps, students.dtype)


def sequence(steps: list[Arrays], dtype: np.dtype) -> Arrays:
    """The steps' arrays along a new first axis; all but the temperatures are in the dtype of the inputs."""
    out = stacked(steps)
    other = {k for k, a in out.items() if a.dtype != dtype}
    assert other <= {"teacher_temp_at_step"}, f"computed in another dtype than {dtype}: {other}"
    return out


def stacked(parts: list[Arrays]) -> Arrays:
    return {k: np.stack([p[k] for p in parts]) for k in parts[0]}


def loss_of_rank(rank: int, world: int, arrays: Arrays) -> Arrays:
    return dino_loss_sequence({**arrays, **{k: arrays[k][rank] for k in ("student_output", "teacher_output")}})


def dino_loss_dist(arrays: Arrays) -> Arrays:
    ranks = run_ranks(int(arrays["world_size"]), loss_of_rank, arrays)
    # The files have one schedule for all ranks, and an axis of ranks for everything else.
    return {**stacked(ranks), "teacher_temp_at_step": ranks[0]["teacher_temp_at_step"]}


def scfs_shallow_loss(arrays: Arrays) -> Arrays:
    steps: list[Arrays] = []
    inputs = [arrays[f"{net}_{view}"] for net in ("student", "teacher") for view in ("global", "local")]
    centers = Centers({"stage": inputs[0].shape[-1]}, float(arrays["center_momentum"])).to(tensor(inputs[0]).dtype)
    tau = float(arrays["student_temp"])
    for epoch, sg, sl, tg, tl in zip(arrays["epoch"], *inputs, strict=True):
        student_global, student_local = tensor(sg, grad=True), tensor(sl, grad=True)
        teacher_global, temperature = tensor(tg), temperature_at(arrays, epoch)
        loss_global = dino_loss(student_global, None, teacher_probabilities(teacher_global, temperature, centers["stage"]), tau)
        loss_local = matched_loss(student_local, teacher_probabilities(tensor(tl), temperature), tau)
        (0.5 * (loss_global + loss_local)).backward()
        centers.accumulate({"stage": teacher_global})
        centers.update()
        steps.append(
            {
                "teacher_temp_at_step": np.array(temperature),
                "loss_global": loss_global.detach().numpy(),
                "loss_local": loss_local.detach().numpy(),
                "center_after": centers["stage"].numpy().copy(),
                "grad_student_global": student_global.grad.numpy(),
                "grad_student_local": student_local.grad.numpy(),
            }
        )
    return sequence(steps, inputs[0].dtype)


SCHEDULE_INPUTS = (
    *("student_temp", "center_momentum", "warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp_epochs", "nepochs", "epoch"),
    *("batch_size", "batch_size_per_rank", "world_size", "ncrops", "num_local_crops"),
)

KINDS = {
    "dino/head": Kind(
        dino_head,
        ("in_dim", "out_dim", "use_bn", "norm_last_layer", "nlayers", "hidden_dim", "bottleneck_dim", "param/*", "input", "grad_output"),
    ),
    "dino/loss": OneDtype(dino_loss_sequence, (*SCHEDULE_INPUTS, "student_output", "teacher_output")),
    "dino/loss_dist": OneDtype(dino_loss_dist, (*SCHEDULE_INPUTS, "student_output", "teacher_output")),
    "scfs/head": Kind(scfs_head, ("in_dim", "out_dim", "bottleneck_dim", "hidden_dim", "param/*", "input", "grad_output")),
    "scfs/search": Kind(scfs_search, ("batch_size", "num_local_crops", "teacher_global_feat_*", "student_local_feat_*")),
    "scfs/shallow_loss": OneDtype(
        scfs_shallow_loss, (*SCHEDULE_INPUTS, "student_global", "student_local", "teacher_global", "teacher_local")
    ),
}
