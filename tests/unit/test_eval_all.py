import json

import numpy as np
import pytest

from eval import all as eval_all
from eval.all import Row, chosen, part_of_labels, setting_of, smaller_batch, table
from eval.linear_protocols import LINEAR_PROTOCOLS
from eval.protocols import KNN_PROTOCOLS
from eval.tuning_protocols import TUNING_PROTOCOLS
from fastssl.config import ConfigError


def commands(tmp_path, *, vit, only=()):
    args = eval_all.Args(checkpoint="random:resnet18", data="x", only=only, out=tmp_path)
    return eval_all.commands(args, tmp_path, np.repeat(np.arange(30), 20), 30, vit=vit)


def test_every_protocol_that_fits(tmp_path):
    shared = {*KNN_PROTOCOLS, *LINEAR_PROTOCOLS, "logreg/sfrik", *(p for p in TUNING_PROTOCOLS if p.startswith("semi/"))}
    assert set(commands(tmp_path, vit=False)) == shared
    assert set(commands(tmp_path, vit=True)) == shared | {"finetune/mae", "finetune/ibot", "finetune/mocov3", "transfer/mocov3"}
    named = commands(tmp_path, vit=True, only=("transfer/mocov3-pets",))
    assert list(chosen(named, ("transfer/mocov3-pets",))) == ["transfer/mocov3-pets"]
    assert set(chosen(named, ("knn",))) == set(KNN_PROTOCOLS)
    with pytest.raises(ConfigError, match="No protocol 'finetune' fits"):
        chosen(commands(tmp_path, vit=False), ("finetune",))


def test_batches_and_labels_of_small_data():
    assert [smaller_batch(256, n) for n in (10, 128, 4000, 3_000_000)] == [8, 8, 128, 256]
    one, ten = TUNING_PROTOCOLS["semi/lewel-1pct"], TUNING_PROTOCOLS["semi/lewel-10pct"]
    labels = np.repeat(np.arange(30), 40)
    assert part_of_labels(one, labels, 30) == ("random:1", 30)
    assert part_of_labels(ten, labels, 30) == ("random:4", 120)
    assert part_of_labels(ten, np.concatenate((labels, [30, 30])), 31) == ("random:2", 62)
    assert part_of_labels(one, labels, 1000) == ("", 12)
    assert part_of_labels(TUNING_PROTOCOLS["finetune/mae"], labels, 30) == ("", 1200)


def test_rows_say_what_was_changed():
    knn = {"resize": 72, "crop": 224, "knn20_top1": 40.0}
    assert setting_of(knn, "knn/dino", "knn20_top1") == "k 20, resize 72 instead of 256"
    assert setting_of({"run_as": "linear/dino, 5 of 100 epochs"}, "linear/dino", "top1") == "5 of 100 epochs"
    shown = table([Row("knn/dino", "k 20", 41.234, 9.6), Row("finetune/mae", "not possible: too few", None, 0.2)])
    assert "| knn/dino | k 20 | 41.23 | 10 |" in shown
    assert "| finetune/mae | not possible: too few | - | 0 |" in shown


def test_a_random_backbone_needs_a_place(class_folders):
    with pytest.raises(SystemExit, match="--out DIR"):
        eval_all.main(["--checkpoint", "random:resnet18", "--data", str(class_folders)])


@pytest.mark.slow
def test_one_command_makes_the_table(class_folders, tmp_path, capsys):
    flags = ["--epochs", "1", "--crop", "32", "--resize", "36", "--workers", "1", "--out", str(tmp_path / "all")]
    eval_all.main(["--checkpoint", "random:vit_tiny_patch16", "--data", str(class_folders), *flags])
    rows = json.loads((tmp_path / "all" / "all.json").read_text())["rows"]
    assert all(0 <= row["top1"] <= 100 for row in rows)
    shown = capsys.readouterr().out
    assert all(f"| {row['protocol']} |" in shown for row in rows)
    assert "| finetune/mae | 1 of 100 epochs, batch 8 instead of 1024" in shown
