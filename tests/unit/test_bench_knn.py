"""The bench of k-NN search: what it measures, and what it projects."""

import json

import pytest
import torch

from fastssl.bench import knn
from loaders.errors import DataError


def test_one_small_run(tmp_path, capsys):
    knn.bench(device="cpu", bank=(300, 600), queries=50, dim=64, out=tmp_path)
    (file,) = tmp_path.glob("knn_*.json")
    result = json.loads(file.read_text())
    assert [(row["bank"], row["queries"]) for row in result["measured"]] == [(300, 50), (600, 50)]
    assert all(row["working_mib"] > 0 and row["ns_per_pair"] > 0 for row in result["measured"])
    printed = capsys.readouterr().out
    assert "Projected, not run: 1,281,167 against 50,000" in printed and str(file) in printed


def test_calculated_memory_is_that_of_a_search():
    found = knn.measure(2000, 300, 256, torch.device("cpu"))
    assert found["working_mib"] == pytest.approx(found["working_mib_calculated"], rel=0.2)


def test_projection_goes_with_the_pairs_and_the_ranks():
    one = knn.projected({"ns_per_pair": 1.0}, 2048, 1)
    assert one["seconds"] == pytest.approx(1.281167 * 50)
    assert one["features_gib_per_rank"] == pytest.approx(1331167 * 2048 * 4 / 2**30)
    eight = knn.projected({"ns_per_pair": 1.0}, 2048, 8)
    assert eight["seconds"] == pytest.approx(one["seconds"] / 8)
    assert eight["working_gib_per_rank"] == one["working_gib_per_rank"] < 1.0


@pytest.mark.parametrize("flags", [{"bank": ()}, {"bank": (0,)}, {"queries": 0}])
def test_nothing_to_measure(flags: dict):
    with pytest.raises(DataError, match="Nothing would be measured"):
        knn.bench(device="cpu", **flags)
