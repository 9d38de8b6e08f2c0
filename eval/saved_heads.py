"""Linear classifiers in files: written by a linear evaluation, measured again on other images."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from eval.accuracy import accuracy
from eval.features import check_kind, extracted
from eval.heads import logits
from eval.labels import check_labels, check_same_classes
from eval.probe import BEST, FORMAT, PUBLISHED, Probe
from eval.results import check_same
from fastssl.augment.augmenter import Augmenter
from fastssl.checkpoint import CheckpointError, atomic_save
from fastssl.distributed import Dist
from fastssl.models.features import Backbone
from fastssl.models.weights import weights_digest
from fastssl.views import CenterCrop, Photometric, View
from loaders.build import build_eval_loader
from loaders.errors import DataError


def save_heads(path: Path, probe: Probe, run_as: str, normalisation: Photometric) -> None:
    """The published setting's classifier and the best of all, and what they are of; readable with torch.load(weights_only=True)."""
    protocol, kept = probe.protocol, [probe.kept[what] for what in (PUBLISHED, BEST) if what in probe.kept]
    about = [{"what": k.what, "epoch": k.epoch, "top1": k.top1} | asdict(probe.settings[k.setting]) for k in kept]
    classes = probe.data.train.classes
    saved = {"format": FORMAT, "protocol": protocol.name, "run_as": run_as, "kind": probe.kind, "weights": probe.digest}
    saved |= {"crop": protocol.crop, "resize": protocol.resize, "interpolation": protocol.interpolation, "dtype": probe.dtype}
    saved |= {"mean": normalisation.mean, "std": normalisation.std}
    saved |= {"classes": None if classes is None else list(classes), "about": about}
    atomic_save(saved | {name: torch.stack([getattr(k, name) for k in kept]) for name in ("weight", "bias")}, path)


def measure_saved(
    path: Path,
    backbone: Backbone,
    data_path: str,
    *,
    dist: Dist,
    queries: str,
    forward: int,
    backend: str,
    workers: int,
    normalisation: Photometric,
    out: Path | None = None,
) -> dict:
    """Accuracies of the classifiers in `path` on the val split of `data_path`, or its part `queries` of train.

    out: where the result will be written; ConfigError when another evaluation's is there.
    CheckpointError when the file is none, or of another backbone; DataError for other classes.
    """
    saved = _read(path)
    check_kind(backbone, saved["kind"])
    if saved["weights"] != weights_digest(backbone):
        raise CheckpointError(
            f"{path} was trained on another backbone than this one. Give the checkpoint (and --network) it was trained on."
        )
    if any(saved.get(name, ours := getattr(normalisation, name)) != ours for name in ("mean", "std")):
        flags = " ".join(f"--{name} {' '.join(map(str, saved[name]))}" for name in ("mean", "std"))
        raise CheckpointError(f"{path} was trained on images of another mean and std. Give {flags}.")
    run_as = f"{saved['run_as']}, head of {path}" + (f", queries {queries}" if queries else "")
    check_same(out, data=data_path, run_as=run_as)
    crop = CenterCrop(size=saved["crop"], resize=saved["resize"], interpolation=saved["interpolation"])
    spec = (View(crop=crop, photometric=normalisation),)
    split = "train" if queries else "val"
    loader = build_eval_loader(data_path, split, spec, dist=dist, batch=forward, subset=queries, backend=backend, workers=workers)
    if loader.labels is None:
        raise DataError(f"The {split} split of {data_path} has no labels. Give labelled data with --data.")
    weight, bias = (saved[name].to(dist.device) for name in ("weight", "bias"))
    check_same_classes(saved["classes"], loader.classes, data_path)
    check_labels(loader, weight.shape[1], f"The labels of {data_path}")

    augment = Augmenter(spec, device=dist.device, dtype=saved["dtype"], seed=0)
    parts = extracted(backbone, loader, augment, saved["dtype"], kind=saved["kind"], what="validation")
    found = accuracy(((logits(p.features, weight, bias), p.labels.long()) for p in parts), weight.shape[1], dist)
    scores = [{**about, "top1": found.top1[k], "top5": found.top5[k]} for k, about in enumerate(saved["about"])]
    result = {"protocol": saved["protocol"], "run_as": run_as, "head": str(path), **scores[0]}
    if len(scores) > 1:
        result["best_of_sweep"] = scores[1]
    result |= {name: saved[name] for name in ("kind", "weights", "crop", "resize", "interpolation")}
    return result | {"queries": queries, "num_val": loader.num_samples, "per_class": found.per_class(0, saved["classes"])}


def _read(path: Path) -> dict:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as saved classifiers ({type(error).__name__}). Give the .head.pt of a linear evaluation."
        ) from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT or "about" not in saved:
        raise CheckpointError(f"{path} holds no saved classifiers. Give the .head.pt of a linear evaluation.")
    return saved
