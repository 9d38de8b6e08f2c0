"""Checks of the evaluation goldens: each takes a file's arrays, runs the project's code and compares every output array."""

from __future__ import annotations

import numpy as np
import torch

from eval.features import Bank
from eval.knn import keep_index, majority_knn
from fastssl.distributed import Dist
from tests.golden.kind import Checked

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

    wanted = arrays["neighbour_index"]
    assert near.index.shape == wanted.shape, f"neighbour_index is {wanted.shape}, ours {tuple(near.index.shape)}"
    resolution = 5e-6
    np.testing.assert_allclose(near.value, arrays["neighbour_sqdist"], rtol=1e-4, atol=resolution, err_msg="neighbour_sqdist")
    assert ((wanted >= 0) & (wanted < len(memory))).all(), "neighbour_index points outside the memory"
    assert all(len(set(row)) == len(row) for row in wanted.tolist()), "neighbour_index names an image twice"
    gap = np.abs(_sqdist(queries, memory, wanted) - near.value.numpy())
    differs = (near.index.numpy() != wanted) & (gap > resolution)
    assert not differs.any(), f"neighbour_index differs at {np.argwhere(differs)[:5].tolist()}"

    np.testing.assert_array_equal(prediction, arrays["predictions"], err_msg="predictions")
    np.testing.assert_allclose(accuracy, arrays["accuracy_percent"], rtol=1e-6, err_msg="accuracy_percent")


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
}
