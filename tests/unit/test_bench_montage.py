"""The bench of W2SSL's montages."""

import json

import pytest

from fastssl.bench import montage
from loaders.errors import DataError


@pytest.mark.slow
def test_one_small_run(tmp_path, capsys):
    montage.bench(ranks=(2,), images=16, size=8, rounds=2, out=tmp_path)
    (file,) = tmp_path.glob("montage_*.json")
    (row,) = json.loads(file.read_text())["measured"]
    ways = row["ways"]
    assert all(len(way["ms_rounds"]) == 2 and way["ms"] > 0 for way in ways.values())
    # the other rank's 16 patches of two views, in fp32; of those what is needed, in bf16; nothing
    assert ways["gather"]["mb_arrived"] == pytest.approx(2 * 16 * 3 * 8 * 8 * 4 / 1e6)
    assert 0 < ways["global"]["mb_arrived"] < ways["gather"]["mb_arrived"] / 2
    assert ways["rank"]["mb_arrived"] == 0
    assert str(file) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [({"ranks": ()}, "Nothing would be measured"), ({"rounds": 0}, "Nothing would be measured"), ({"images": 30}, "multiple of 8")],
)
def test_nothing_to_measure(flags: dict, message: str):
    with pytest.raises(DataError, match=message):
        montage.bench(**flags)
