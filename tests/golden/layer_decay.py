"""Checks of the fine-tuning goldens: parameter groups with layer decay, and MAE's schedule (methods/ibot.md 10, sere.md 9)."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from eval.classifier import Classifier
from eval.tuning_protocols import TUNING_PROTOCOLS
from fastssl.models.vit import ViT
from tests.golden.kind import Arrays, Kind


def reproduce(arrays: Arrays) -> Arrays:
    out: Arrays = {}
    for c in range(int(arrays["n_cfg"])):
        which, depth, decay, wd = re.fullmatch(r"(\w+) depth=(\d+) layer_decay=(\S+) wd=(\S+)", str(arrays[f"cfg{c}/spec"])).groups()
        protocol = replace(TUNING_PROTOCOLS[f"finetune/{which}"], layer_decay=float(decay), weight_decay=float(wd), crop=32)
        model = Classifier(ViT(8, int(depth), 2, 16, image_size=32), 3, protocol)
        of = {id(p): group for group in model.optimizer(protocol).param_groups for p in group["params"]}
        named = dict(model.named())
        out[f"cfg{c}/names"] = np.array(sorted(named))
        out[f"cfg{c}/lr_scale"] = np.array([of[id(named[name])]["lr_scale"] for name in sorted(named)])
        out[f"cfg{c}/weight_decay"] = np.array([of[id(named[name])]["weight_decay"] for name in sorted(named)])
    if "mae_sched/epoch_frac" in arrays:
        warmup, peak, low, epochs = (float(v) for v in arrays["mae_sched/args_warmup_lr_minlr_epochs"])
        given = {"epochs": int(epochs), "base_lr": peak, "per_images": None, "warmup_epochs": warmup, "min_lr": low}
        protocol = replace(TUNING_PROTOCOLS["finetune/mae"], **given)
        out["mae_sched/lr"] = np.array([protocol.lr(float(t), 1) for t in arrays["mae_sched/epoch_frac"]])
    return out


KINDS = {"ibot/layerdecay": Kind(reproduce, ("n_cfg", "cfg*/spec", "mae_sched/epoch_frac", "mae_sched/args_*"))}
