"""k-NN on sharded banks: two and three gloo processes, one process and a naive full-matrix reference give the same numbers.

Run as a script, this file is one of those processes: it needs no start method that imports test modules.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.features import Bank
from eval.neighbours import search
from eval.protocols import LewelMonitor
from eval.votes import knn, lewel_monitor
from fastssl.distributed import Dist

CLASSES, KS, T = 7, (1, 5, 30), 0.07


def data(which: str) -> tuple[Bank, Bank]:
    """`random`: no ties. `ties`: vectors of four entries +-1/2, so every similarity is a multiple of 1/4, exactly."""
    rng = np.random.default_rng(3)
    sizes = (83, 41)
    if which == "random":
        centres = rng.normal(size=(CLASSES, 24))
        labels = [rng.integers(CLASSES, size=n) for n in sizes]
        features = [(centres[y] + 1.5 * rng.normal(size=(len(y), 24))).astype(np.float32) for y in labels]
    else:
        features = [np.zeros((n, 8), np.float32) for n in sizes]
        for x in features:
            for row in x:
                row[rng.choice(8, 4, replace=False)] = rng.choice([-0.5, 0.5], 4)
        labels = [rng.integers(CLASSES, size=n) for n in sizes]
    return tuple(Bank(torch.tensor(x), torch.tensor(y), torch.arange(len(y))) for x, y in zip(features, labels, strict=True))


def shards(bank: Bank, query: Bank, rank: int, world: int) -> tuple[Bank, Bank]:
    """Uneven ones, in reverse order: the last of several ranks has two rows of the bank, rank 1 of three has no query."""
    rows, asked = torch.arange(len(bank)).flip(0), torch.arange(len(query)).flip(0)
    if world == 1:
        return bank[rows], query[asked]
    held = rows[:2] if rank == world - 1 else rows[2:][rank :: world - 1]
    if world == 2:
        return bank[held], query[asked[rank::2]]
    return bank[held], query[(asked[::3], asked[:0], torch.cat((asked[1::3], asked[2::3])))[rank]]


def results(dist: Dist) -> dict[str, np.ndarray]:
    """Everything that must not depend on the number of ranks, by query id."""
    out = {}
    for which in ("random", "ties"):
        whole, queries = data(which)
        bank, query = shards(whole, queries, dist.rank, dist.world)
        for l2 in (False, True):
            near = search(bank, query, k=max(KS), dist=dist, squared_l2=l2, chunk=10, tile=9)
            parts = dist.gather_objects((query.index.numpy(), near.value.numpy(), near.index.numpy(), near.label.numpy()))
            ids, *fields = (np.concatenate(field) for field in zip(*parts, strict=True))
            out |= {f"{which}/{l2}/{n}": f[ids.argsort()] for n, f in zip(("value", "index", "label"), fields, strict=True)}
            out[f"{which}/ids"] = np.sort(ids)
        scores = knn(bank, query, k=KS, temperature=T, num_classes=CLASSES, dist=dist)
        scores |= {"monitor": lewel_monitor(bank, whole.labels.numpy(), protocol=LewelMonitor(), dist=dist)["knn20_top1"]}
        out[f"{which}/scores"] = np.array(list(scores.values()))
    return out


def naive(bank: Bank, query: Bank) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Similarities [q, n], neighbours by (similarity, sample id) [q, n] and accuracies, from the full matrix in float64."""
    b, q = (x.features.numpy().astype(np.float64) for x in (bank, query))
    similarity = (q / np.linalg.norm(q, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
    order = np.argsort(-similarity.round(12), axis=1, kind="stable")
    labels, truth, scores = bank.labels.numpy(), query.labels.numpy(), []
    for k in KS:
        votes = np.zeros((len(q), CLASSES))
        for i in range(len(q)):
            for j in order[i, :k]:
                votes[i, labels[j]] += np.exp(similarity[i, j].round(12) / T)
        ranking = np.argsort(-votes.round(6), axis=1, kind="stable")
        scores += [100 * np.mean([truth[i] in ranking[i, :top] for i in range(len(q))]) for top in (1, 5)]
    return similarity, order, np.array(scores)


@pytest.fixture(scope="module")
def by_world(tmp_path_factory) -> dict[int, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("knn")
    root = str(Path(__file__).resolve().parents[2])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=env) for rank in range(3)]
    try:
        assert [p.wait(timeout=240) for p in processes] == [0] * 3
    finally:
        for p in processes:
            p.kill()
    found = {world: dict(np.load(folder / f"{world}.npz")) for world in (2, 3)}
    return found | {1: results(Dist(0, 1, 0, 1, torch.device("cpu")))}


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_gives_the_same_bits(by_world, world):
    alone, several = by_world[1], by_world[world]
    assert several["ties/ids"].tolist() == list(range(41))
    for name, expected in alone.items():
        np.testing.assert_array_equal(several[name], expected, err_msg=name)


@pytest.mark.parametrize("which", ["random", "ties"])
def test_one_rank_equals_the_full_matrix(by_world, which):
    similarity, order, scores = naive(*data(which))
    for l2 in (False, True):
        index = by_world[1][f"{which}/{l2}/index"]
        np.testing.assert_array_equal(index, order[:, : max(KS)])
        expected = np.take_along_axis(similarity, index, 1)
        np.testing.assert_allclose(by_world[1][f"{which}/{l2}/value"], 2 - 2 * expected if l2 else expected, rtol=0, atol=1e-7)
        np.testing.assert_array_equal(by_world[1][f"{which}/{l2}/label"], data(which)[0].labels.numpy()[index])
    np.testing.assert_allclose(by_world[1][f"{which}/scores"][:-1], scores, rtol=1e-12)


def test_the_tie_data_has_ties_at_every_cut():
    similarity, order, _ = naive(*data("ties"))
    ranked = np.take_along_axis(similarity, order, 1)
    for k in KS:
        assert (ranked[:, k - 1] == ranked[:, k]).any()


def main(rank: int, folder: Path) -> None:
    """Rank `rank` of a group of three, then of a group of two."""
    for world in (3, 2):
        if rank < world:
            torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init{world}", rank=rank, world_size=world)
            found = results(Dist(rank, world, rank, world, torch.device("cpu")))
            if rank == 0:
                np.savez(folder / f"{world}.npz", **found)
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
