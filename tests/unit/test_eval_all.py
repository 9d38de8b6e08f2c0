import json

import numpy as np
import pytest

from eval import all as eval_all
from eval.all import Row, chosen, part_of_labels, read_row, smaller_batch, table
from eval.linear_protocols import LINEAR_PROTOCOLS
from eval.protocols import KNN_PROTOCOLS
from eval.tuning_protocols import TUNING_PROTOCOLS
from fastssl.config import ConfigError


def commands(tmp_path, *, vit, only=()):
    args = eval_all.Args(checkpoint="random:resnet18", data="x", only=only, out=tmp_path)
    return eval_all.commands(args, tmp_path, np.repeat(np.arange(30), 20), np.repeat(np.arange(30), 5), 30, vit=vit)


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


def test_rows_say_what_was_changed(tmp_path):
    def row(name: str, **result) -> Row:
        path = tmp_path / "x.json"
        path.write_text(json.dumps(result))
        return read_row(path, name, 9.6)

    knn = row("knn/dino", run_as="knn/dino, resize 72 instead of 256, kind cls", knn10_top1=1.0, knn20_top1=41.234, knn20_top5=80.0)
    assert knn == Row("knn/dino", "k 20, kind cls", 41.234, 80.0, 9.6)
    linear = row("linear/dino", run_as="linear/dino, 5 of 100 epochs", top1=7.0, top5=9.0, per_class={"a": 1.0})
    assert linear == Row("linear/dino", "5 of 100 epochs", 7.0, 9.0, 9.6, "x.json")
    assert row("semi/x", run_as="semi/x", top1=7.0, top5=9.0).setting == "as published"
    shown = table([knn, Row("finetune/mae", "not possible: too few", None, None, 0.2)])
    assert "| knn/dino | k 20, kind cls | 41.23 | 80.00 | 10 | - |" in shown
    assert "| finetune/mae | not possible: too few | - | - | 0 | - |" in shown


def test_what_is_done_is_not_done_again(class_folders, tmp_path, capsys, monkeypatch):
    flags = ["--checkpoint", "random:resnet18", "--data", str(class_folders), "--crop", "32", "--resize", "36", "--workers", "1"]
    flags += ["--epochs", "1", "--out", str(tmp_path / "all"), "--only"]
    eval_all.main([*flags, "knn/dino", "knn/lewel-monitor"])
    shown = capsys.readouterr().out
    assert "| knn/dino | k 20 |" in shown and "resize 36, crop 32" in shown
    assert "| knn/lewel-monitor | not possible: 20 neighbours are asked for, and the bank has 3 images" in shown
    saved = json.loads((tmp_path / "all" / "all.json").read_text())
    assert [row["protocol"] for row in saved["rows"]] == ["knn/dino", "knn/lewel-monitor"]

    with monkeypatch.context() as patch:
        patch.setattr(eval_all.knn, "run", lambda args, dist: (_ for _ in ()).throw(ConfigError("run again")))
        eval_all.main([*flags, "knn/dino", "knn/sfrik"])
    assert "1/2  knn/dino" in (shown := capsys.readouterr().out) and "done before" in shown
    assert "| knn/sfrik | not possible: run again |" in shown
    rows = {row["protocol"]: row for row in json.loads((tmp_path / "all" / "all.json").read_text())["rows"]}
    assert rows["knn/dino"] == saved["rows"][0] and set(rows) == {"knn/dino", "knn/sfrik"}
    knn = tmp_path / "all" / "knn-dino.json"
    assert "crop 32" in knn.read_text()
    (tmp_path / "all" / "linear-dino.state.pt").touch()
    eval_all.main([*flags[:-1], "--crop", "28", "--only", "knn/dino"])
    assert "other settings (crop): starting over" in (shown := capsys.readouterr().out) and "done before" not in shown
    assert not (tmp_path / "all" / "linear-dino.state.pt").exists() and "crop 28" in knn.read_text()


def test_a_random_backbone_needs_a_place(class_folders):
    with pytest.raises(SystemExit, match="--out DIR"):
        eval_all.main(["--checkpoint", "random:resnet18", "--data", str(class_folders)])


@pytest.mark.slow
def test_one_command_makes_the_table(class_folders, tmp_path, capsys):
    flags = ["--epochs", "1", "--crop", "32", "--resize", "36", "--workers", "1", "--out", str(tmp_path / "all")]
    eval_all.main(["--checkpoint", "random:vit_tiny_patch16", "--data", str(class_folders), *flags])
    rows = json.loads((tmp_path / "all" / "all.json").read_text())["rows"]
    assert all(0 <= row["top1"] <= 100 for row in rows if row["protocol"] != "knn/lewel-monitor")
    shown = capsys.readouterr().out
    assert all(f"| {row['protocol']} |" in shown for row in rows)
    assert "| finetune/mae | 1 of 100 epochs, batch 8 instead of 1024" in shown
