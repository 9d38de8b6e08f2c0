"""Logistic regression on kept features (protocol logreg/sfrik):  python -m eval.logreg --checkpoint FILE --data DIR

Features are extracted once, by all ranks, into a folder; another run takes them from there.  The classifier is trained by one
rank, so its numbers do not depend on how many there are.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from eval import command
from eval.accuracy import Accuracy, accuracy
from eval.command import Subject, open_subject
from eval.extract import FeatureArgs, Part, shown, take
from eval.features import Bank
from eval.labels import checked_classes
from eval.protocols import LogisticRegression
from eval.results import beside, check_same, data_name, publish, result_path, table_line, together
from fastssl.config import ConfigError
from fastssl.distributed import Dist

ROWS = 8192
"""Validation features classified at a time."""


@dataclass(frozen=True)
class Epoch:
    loss: float
    """Mean over the epoch's samples, of each before the step that it took part in."""
    val: Accuracy
    """After the epoch."""


def order(count: int, epoch: int) -> Tensor:
    """int64 [count]: the samples of an epoch as torch's DistributedSampler with seed 0 has them for one process."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(epoch))


def new_head(dim: int, num_classes: int, protocol: LogisticRegression, seed: int = 0) -> nn.Linear:
    head = nn.utils.skip_init(nn.Linear, dim, num_classes)
    nn.init.normal_(head.weight, std=protocol.init_std, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    return head


def fit(
    head: nn.Linear, train: Bank, val: Bank, protocol: LogisticRegression, after: Callable[[Epoch], None] = lambda epoch: None
) -> list[Epoch]:
    """Train `head` in place on `train`, and measure it on `val` after every epoch.

    The features may stay where they are: each batch goes to the head's device.
    """
    sgd = torch.optim.SGD(head.parameters(), lr=protocol.lr, momentum=protocol.sgd_momentum, weight_decay=protocol.weight_decay)
    epochs = []
    device = head.weight.device
    for epoch in range(protocol.epochs):
        sgd.param_groups[0]["lr"] = protocol.lr * (1 + math.cos(math.pi * epoch / protocol.epochs)) / 2
        total = torch.zeros((), device=device)
        for rows in order(len(train), epoch).to(train.features.device).split(protocol.batch):
            loss = F.cross_entropy(head(train.features[rows].to(device)), train.labels[rows].to(device))
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            total += loss.detach() * len(rows)
        epochs.append(Epoch(float(total) / len(train), measure(head, val)))
        after(epochs[-1])
    return epochs


@torch.no_grad()
def measure(head: nn.Linear, bank: Bank) -> Accuracy:
    device = head.weight.device
    batches = zip(bank.features.split(ROWS), bank.labels.split(ROWS), strict=True)
    scored = ((head(features.to(device)), labels.to(device)) for features, labels in batches)
    return accuracy(scored, head.out_features, Dist(0, 1, 0, 1, device))


# ------------------------------------------------------------------------------------------------ the command line


@dataclass(frozen=True, kw_only=True)
class Args(FeatureArgs):
    """Logistic regression on the features of a frozen backbone.

    An interrupted extraction goes on where it was; the training, which is short, starts over.
    """

    protocol: Literal["logreg/sfrik"] = "logreg/sfrik"
    features: Path | None = None
    """Folder of the features, as eval.extract writes it, or to be filled; default: beside the checkpoint."""
    epochs: int | None = None
    """Default: the protocol's 100."""
    batch: int | None = None
    """Images of a step."""
    lr: float | None = None
    weight_decay: float | None = None
    seed: int = 0
    """Of the initial weight."""
    out: Path | None = None
    """JSON of the result; default: beside the checkpoint (none for a random backbone)."""


def settings(args: Args) -> LogisticRegression:
    """The protocol with the command line's changes.  ConfigError for impossible ones."""
    args.check()
    names = ("epochs", "batch", "lr", "weight_decay", "resize", "crop")
    protocol = replace(LogisticRegression(), **{name: getattr(args, name) for name in names if getattr(args, name) is not None})
    if min(protocol.epochs, protocol.batch) < 1 or not protocol.lr > 0 or not protocol.weight_decay >= 0:
        raise ConfigError("--epochs, --batch and --lr must be positive, and --weight-decay at least 0.")
    return protocol


def features_folder(args: Args, subject: Subject) -> Path:
    folder = args.features or beside(args.checkpoint, subject.network, data_name(args.data), "features")
    if folder is None:
        raise ConfigError("Features of a random backbone have no place beside a checkpoint: say where to keep them with --features DIR.")
    return folder


def at_hand(bank: Bank, device: torch.device) -> Bank:
    """The features on a GPU if half of its free memory holds them, else where they are."""
    if device.type != "cuda" or bank.features.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return bank
    return Bank(bank.features.to(device), bank.labels.to(device), bank.index)


def trained(found: Mapping[str, Part], protocol: LogisticRegression, args: Args, dist: Dist) -> dict[str, object]:
    """The numbers, percent; the other ranks are told after each epoch that it goes on.  ConfigError when the regression diverges."""
    train, val = (at_hand(found[name].store.bank(), dist.device) for name in ("train", "val"))
    loaders = {name: part.loader for name, part in found.items()}
    head = new_head(train.features.shape[1], checked_classes(loaders["train"], loaders["val"], args.data), protocol, args.seed)
    with tqdm(total=protocol.epochs, unit="epoch", leave=False, disable=not sys.stderr.isatty()) as bar:

        def after(epoch: Epoch) -> None:
            bar.update()
            bar.set_postfix_str(f"loss {epoch.loss:.3f}, top-1 {epoch.val.top1[0]:.2f} %")
            dist.broadcast_object(False)

        epochs = fit(head.to(dist.device), train, val, protocol, after)
    top1, top5 = ([top[0] for top in tops] for tops in zip(*((e.val.top1, e.val.top5) for e in epochs), strict=True))
    best = int(np.argmax(top1))
    if not math.isfinite(epochs[-1].loss):
        raise ConfigError(f"The regression diverged with --lr {protocol.lr}. Take a smaller one.")
    result = {"top1_last": top1[-1], "top5_last": top5[-1], "top1_best": top1[best], "top5_best": max(top5), "best_epoch": best + 1}
    return result | {"loss_last": epochs[-1].loss, "per_class": epochs[-1].val.per_class(0, loaders["val"].classes)}


def run(args: Args, dist: Dist) -> None:
    protocol = settings(args)
    subject = open_subject(args, dist)
    recipe, folder = args.recipe(subject, protocol), features_folder(args, subject)
    name = args.run_as(protocol, LogisticRegression())
    out = result_path(args.checkpoint, args.out, args.protocol, subject.network, args.data, args.subset, args.queries, seed=args.seed)
    check_same(out, data=args.data, run_as=name, seed=args.seed, mean=subject.origin["mean"], std=subject.origin["std"])
    found = take(
        args, subject, recipe, dist, args.parts, folder=folder, check=lambda parts: checked_classes(parts["train"], parts["val"], args.data)
    )
    result, lines = {}, []
    with together(dist, folder):
        if dist.is_main:
            try:
                result = trained(found, protocol, args, dist)
            finally:
                dist.broadcast_object(True)  # whatever happened
        else:
            while not dist.broadcast_object(None):  # a process group gives up where ranks wait for half an hour
                pass
    if dist.is_main:
        how = {n: getattr(protocol, n) for n in ("epochs", "batch", "lr", "weight_decay")} | {"seed": args.seed} | shown(args, recipe)
        sizes = {f"num_{part}": f.loader.num_samples for part, f in found.items()}
        best = f"top-1 {result['top1_best']:.2f} % at best, after epoch {result['best_epoch']}; top-5 {result['top5_best']:.2f} %"
        lines = [str(subject), f"{name}  top-1 {result['top1_last']:.2f} %, top-5 {result['top5_last']:.2f} % after the last epoch"]
        lines += [f"{name}  {best}", table_line(subject.origin, name, f"{result['top1_last']:.2f} (best {result['top1_best']:.2f})")]
        lines.append(", ".join(f"{n} {v}" for n, v in (sizes | how).items()) + f"; features in {folder}")
        result = {"protocol": protocol.name, "run_as": name} | subject.origin | sizes | how | {"features": str(folder)} | result
    publish(result, lines, out, dist)


def main(argv: Sequence[str] | None = None) -> None:
    command.main(Args, run, "eval.logreg", argv)


if __name__ == "__main__":
    main()
