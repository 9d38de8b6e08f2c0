"""Checks of the evaluation goldens: each takes a file's arrays, runs the project's code and compares every output array."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from eval.features import Bank
from eval.logreg import fit, new_head, order
from eval.neighbours import search
from eval.protocols import KNN_PROTOCOLS, LogisticRegression, WeightedKNN
from eval.votes import keep_index, knn, majority_knn, votes
from fastssl.distributed import Dist
from tests.golden.kind import Checked, Kind, compare

RESOLUTION = 5e-6
"""Of squared distances in the reference's float32."""
LOGREG_INPUTS = (
    *("train_*", "val_*", "num_classes", "batch_size", "epochs", "lr_head", "weight_decay", "weight_init", "bias_init", "stats_columns"),
)
ALONE = Dist(rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"))


def check_keep_index(arrays: dict[str, np.ndarray]) -> None:
    """lewel/keep_index: kept_percent_F for every fraction F in the file."""
    kept = {name: float(name.removeprefix("kept_percent_")) for name in arrays if name.startswith("kept_percent_")}
    assert kept, "the file has no kept_percent_* array"
    for name, fraction in kept.items():
        ours = keep_index(arrays["labels"], int(arrays["num_classes"]), fraction)
        np.testing.assert_array_equal(ours, arrays[name], err_msg=name)


def check_knn(arrays: dict[str, np.ndarray]) -> None:
    """lewel/knn: neighbour_index, neighbour_sqdist, predictions, accuracy_percent.

    Two neighbours may stand in either order when the reference's float32 arithmetic cannot tell their distances apart.
    """
    memory, queries = _bank(arrays, "base"), _bank(arrays, "query")
    classes = int(max(arrays["base_labels"].max(), arrays["query_labels"].max())) + 1
    near, prediction, accuracy = majority_knn(memory, queries, k=int(arrays["num_neighbours"]), num_classes=classes, dist=ALONE)

    np.testing.assert_allclose(near.value, arrays["neighbour_sqdist"], rtol=1e-4, atol=RESOLUTION, err_msg="neighbour_sqdist")
    _check_neighbours("neighbour_index", arrays["neighbour_index"], near.index.numpy(), near.value.numpy(), memory, queries)
    np.testing.assert_array_equal(prediction, arrays["predictions"], err_msg="predictions")
    np.testing.assert_allclose(accuracy, arrays["accuracy_percent"], rtol=1e-6, err_msg="accuracy_percent")


def _check_neighbours(name: str, wanted: np.ndarray, ours: np.ndarray, sqdist: np.ndarray, memory: Bank, queries: Bank) -> None:
    """Equal indices, but for neighbours whose squared distances float32 cannot tell apart."""
    assert ours.shape == wanted.shape, f"{name} is {wanted.shape}, ours {ours.shape}"
    assert ((wanted >= 0) & (wanted < len(memory))).all(), f"{name} points outside the memory"
    assert all(len(set(row)) == len(row) for row in wanted.tolist()), f"{name} names an image twice"
    differs = (ours != wanted) & (np.abs(_sqdist(queries, memory, wanted) - sqdist) > RESOLUTION)
    assert not differs.any(), f"{name} differs at {np.argwhere(differs)[:5].tolist()}"


class Weighted:
    """Weighted k-NN of a file's features: neighbours, and for every k votes [M, C], predictions [M] and accuracies."""

    def __init__(self, arrays: dict[str, np.ndarray], suffix: str, ks: np.ndarray, protocol: WeightedKNN):
        self.memory, self.queries = (
            Bank(torch.from_numpy(arrays[f"{w}_features{suffix}"]), torch.from_numpy(arrays[f"{w}_labels"]).long(), torch.arange(n))
            for w, n in ((w, len(arrays[f"{w}_labels"])) for w in ("train", "test"))
        )
        self.ks = [int(k) for k in ks]
        temperature, classes = float(arrays["temperature"]), int(arrays["num_classes"])
        self.near = search(self.memory, self.queries, k=max(self.ks), dist=ALONE)
        weight = torch.exp(self.near.value / temperature)
        self.votes = {k: votes(weight[:, :k], self.near.label[:, :k], classes).numpy() for k in self.ks}
        self.predictions = {k: v.argmax(1) for k, v in self.votes.items()}
        options = {"temperature": temperature, "num_classes": classes, "top5_within_k": protocol.top5_within_k}
        self.accuracy = knn(self.memory, self.queries, k=self.ks, dist=ALONE, **options)

    def top(self, n: int) -> np.ndarray:
        return np.array([self.accuracy[f"knn{k}_top{n}"] for k in self.ks])


def check_dino_knn(arrays: dict[str, np.ndarray]) -> None:
    """dino/knn: nn_indices, votes, pred, top1 and top5 for every k."""
    ours = Weighted(arrays, "_raw", arrays["ks"], KNN_PROTOCOLS["knn/dino"])
    for i, k in enumerate(ours.ks):
        near = ours.near.index[:, :k].numpy(), 2 - 2 * ours.near.value[:, :k].numpy()
        _check_neighbours(f"nn_indices_k{k}", arrays[f"nn_indices_k{k}"], *near, ours.memory, ours.queries)
        compare(f"votes_k{k}", ours.votes[k], arrays[f"votes_k{k}"])
        compare(f"pred_k{k}", ours.predictions[k], arrays[f"pred_k{k}"])
        compare(f"top1_k{k}", ours.top(1)[i], arrays[f"top1_k{k}"])
        compare(f"top5_k{k}", ours.top(5)[i], arrays[f"top5_k{k}"])


def reproduce_ibot_knn(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    ours = Weighted(arrays, "", arrays["ks"], KNN_PROTOCOLS["knn/ibot"])
    return {"top1": ours.top(1), "top5": ours.top(5)}


def check_sfrik_knn(arrays: dict[str, np.ndarray]) -> None:
    """sfrik/knn: votes, pred, top1, and top5 where classes without votes, which tie, do not decide it."""
    ours = Weighted(arrays, "", arrays["k"], KNN_PROTOCOLS["knn/sfrik"])
    few = np.array([((v > 0).sum(1) < 5).sum() for v in ours.votes.values()])
    compare("rows_fewer_than_5_classes", few, arrays["rows_fewer_than_5_classes"])
    compare("votes", np.stack(list(ours.votes.values())), arrays["votes"])
    compare("pred", np.stack(list(ours.predictions.values())), arrays["pred"])
    compare("top1", ours.top(1), arrays["top1"])
    decided = (few == 0) | (arrays["k"] == 1)
    compare("top5", ours.top(5)[decided], arrays["top5"][decided])


def reproduce_sfrik_logreg(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """sfrik/logreg: the order of the samples, the trained classifier, and loss and accuracies of every epoch."""
    train, val = (
        Bank(torch.from_numpy(arrays[f"{w}_features"]), torch.from_numpy(arrays[f"{w}_labels"]).long(), torch.arange(n))
        for w, n in ((w, len(arrays[f"{w}_labels"])) for w in ("train", "val"))
    )
    sizes = {"epochs": int(arrays["epochs"]), "batch": int(arrays["batch_size"])}
    rates = {"lr": float(arrays["lr_head"]), "weight_decay": float(arrays["weight_decay"])}
    protocol = replace(LogisticRegression(), **sizes, **rates)
    head = new_head(train.features.shape[1], int(arrays["num_classes"]), protocol)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(arrays["weight_init"]))
        head.bias.copy_(torch.from_numpy(arrays["bias_init"]))
    epochs = fit(head.to(train.features.dtype), train, val, protocol)
    columns = {
        "epoch": np.arange(len(epochs)),
        "loss_avg": [e.loss for e in epochs],
        "acc1": [e.val.top1[0] for e in epochs],
        "acc5": [e.val.top5[0] for e in epochs],
        "best_acc1": np.maximum.accumulate([e.val.top1[0] for e in epochs]),
        "best_acc5": np.maximum.accumulate([e.val.top5[0] for e in epochs]),
    }
    return {
        "order": np.stack([order(len(train.labels), e).numpy() for e in range(len(epochs))]),
        "weight_final": head.weight.detach().numpy(),
        "bias_final": head.bias.detach().numpy(),
        "stats": np.stack([columns[name] for name in arrays["stats_columns"]], axis=1),
    }


def _bank(arrays: dict[str, np.ndarray], which: str) -> Bank:
    features, labels = (torch.from_numpy(arrays[f"{which}_{what}"]) for what in ("features", "labels"))
    return Bank(features, labels.long(), torch.arange(len(labels)))


def _sqdist(queries: Bank, memory: Bank, index: np.ndarray) -> np.ndarray:
    """Squared distances [n, k] of the unit vectors to the memory images named by `index`."""
    q, m = (torch.nn.functional.normalize(b.features.double(), dim=1).numpy() for b in (queries, memory))
    return np.square(q[:, None] - m[index]).sum(-1)


KINDS = {
    "lewel/keep_index": Checked(check_keep_index, ("labels", "num_classes")),
    "lewel/knn": Checked(check_knn, ("base_*", "query_*", "num_neighbours")),
    "dino/knn": Checked(check_dino_knn, ("train_*", "test_*", "temperature", "num_classes", "ks")),
    "ibot/knn": Kind(reproduce_ibot_knn, ("train_*", "test_*", "temperature", "num_classes", "ks")),
    "sfrik/knn": Checked(check_sfrik_knn, ("train_*", "test_*", "temperature", "num_classes", "k")),
    "sfrik/logreg": Kind(reproduce_sfrik_logreg, LOGREG_INPUTS),
}
