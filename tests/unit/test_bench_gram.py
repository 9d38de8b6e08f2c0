"""The bench of SFRIK's MMD: what it measures, and what it calculates."""

import json

import pytest
import torch

from fastssl.bench import gram
from fastssl.bench.machine import peak_bytes
from loaders.errors import DataError


def test_one_small_run(tmp_path, capsys):
    gram.bench(device="cpu", rows=(48, 96), dim=256, rounds=2, out=tmp_path)
    (file,) = tmp_path.glob("gram_*.json")
    result = json.loads(file.read_text())
    assert [(row["rows"], row["dim"]) for row in result["measured"]] == [(48, 256), (96, 256)]
    for row in result["measured"]:
        assert row["gradients_apart"] < 1e-5
        assert min(row["ms"].values()) > 0 and len(row["ms_rounds"]["ours"]) == 2
        # at least the gradient
        assert min(row["peak_mib"].values()) > 4 * row["rows"] * row["dim"] / 2**20
    printed = capsys.readouterr().out
    assert "dense" in printed and str(file) in printed


def test_peak_is_what_was_alive_together():
    def run():
        a = torch.ones(1 << 18)  # 1 MiB
        b = a + 1
        del a
        return b + 1

    assert peak_bytes(run, torch.device("cpu")) == pytest.approx(2 << 20, rel=1e-3)


def test_calculated_for_the_published_run():
    """Section 12 of methods/sfrik.md, per view: 0.82 TFLOP against 0.069, 256 MiB gathered in fp32 and all-reduced, nothing backward."""
    found = gram.calculated(2048, 32768, 8)
    assert found["dense"]["tflop"] == pytest.approx(0.82, abs=0.01)
    assert found["ours"]["tflop"] == pytest.approx(0.069, abs=0.001)
    assert found["dense"]["exchanged_mib"] == pytest.approx(7 / 8 * 256 + 2 * 7 / 8 * 256)
    assert found["ours"]["exchanged_mib"] == pytest.approx(7 / 8 * 128)


@pytest.mark.parametrize("flags", [{"rows": ()}, {"rows": (0,)}, {"dim": 1}, {"rounds": 0}])
def test_nothing_to_measure(flags: dict):
    with pytest.raises(DataError, match="Nothing would be measured"):
        gram.bench(device="cpu", **flags)
