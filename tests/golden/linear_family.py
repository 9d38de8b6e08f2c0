"""Checks of the linear evaluation goldens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from eval.accuracy import accuracy
from eval.heads import Heads
from eval.linear_protocols import LINEAR_PROTOCOLS, Setting
from tests.golden.evaluation import ALONE
from tests.golden.kind import Arrays, Kind


def reproduce_linear(arrays: Arrays) -> Arrays:
    """dino/linear: epochs of consecutive batches, and an evaluation on the same batches after each."""
    batch, epochs = int(arrays["batch_size"]), int(arrays["epochs"])
    protocol = replace(LINEAR_PROTOCOLS["linear/dino"], batch=batch, base_lr=float(arrays["base_lr"])).shortened(epochs)
    x, y = torch.from_numpy(arrays["features"]), torch.from_numpy(arrays["labels"]).long()
    classes, width = arrays["init_weight"].shape
    settings = protocol.settings(vit=False)
    heads = Heads(settings, width, classes, dist=ALONE, dtype=x.dtype)
    heads.weight[0], heads.bias[0] = torch.from_numpy(arrays["init_weight"]), torch.from_numpy(arrays["init_bias"])
    out, rates, losses, scores = {}, [], [], []
    batches = list(zip(x.split(batch), y.split(batch), strict=True))
    for e in range(epochs):
        factor = protocol.factor(e)
        rates.append(settings[0].lr * factor)
        losses.append(np.mean([heads.learn(a, b, factor).item() for a, b in batches]))
        found = accuracy(((heads(a), b) for a, b in batches), classes, ALONE)
        # the reference averages its loss over batches, which may be of different sizes
        loss = np.mean([accuracy([(heads(a), b)], classes, ALONE).loss[0] for a, b in batches])
        scores.append((found.top1[0], found.top5[0], loss))
        out |= {f"weight_after_epoch{e}": heads.weight[0].numpy().copy(), f"bias_after_epoch{e}": heads.bias[0].numpy().copy()}
    rows = {"lr_per_epoch": rates, "train_loss_mean_per_epoch": losses, "eval_acc1_acc5_loss": scores}
    return out | {name: np.array(row) for name, row in rows.items()}


def reproduce_lars(arrays: Arrays) -> Arrays:
    """ibot/lars: one classifier beside another that SGD trains with the same gradients."""
    w, b = (torch.from_numpy(arrays[name]) for name in ("W0", "b0"))
    lr, decay = float(arrays["lr"]), float(arrays["weight_decay"])
    settings = [Setting(lr, lr, decay, "sgd"), Setting(lr, lr, decay, "lars")]
    heads = Heads(settings, w.shape[1], w.shape[0], dist=ALONE, dtype=w.dtype)
    heads.weight[:], heads.bias[:] = w, b
    out = {}
    for t in range(int(arrays["n_steps"])):
        gradients = (torch.from_numpy(arrays[f"step{t}/grad_{name}"]).expand(2, *s.shape).clone() for name, s in (("W", w), ("b", b)))
        heads.update(*gradients, momentum=float(arrays["momentum"]), eta=float(arrays["eta"]))
        out |= {f"step{t}/W": heads.weight[1].numpy().copy(), f"step{t}/b": heads.bias[1].numpy().copy()}
    return out


KINDS = {
    "dino/linear": Kind(reproduce_linear, ("features", "labels", "batch_size", "epochs", "base_lr", "init_*")),
    "ibot/lars": Kind(reproduce_lars, ("W0", "b0", "lr", "weight_decay", "momentum", "eta", "n_steps", "step*/grad_*")),
}
