"""Where results are written, and what they do not replace."""

import json
from pathlib import Path

import pytest

from eval import command
from eval.command import BackboneArgs
from eval.results import check_same, result_path, side_file
from fastssl.config import ConfigError


def test_names(tmp_path):
    checkpoint = str(tmp_path / "a.b.pth")
    named = result_path(checkpoint, None, "linear/dino", "online", "data/imagenet", "first:20", "", seed=3)
    assert named == tmp_path / "a.b.linear-dino.online.imagenet.first-20.seed3.json"
    assert result_path(checkpoint, None, "linear/dino", "online", "data/imagenet") == tmp_path / "a.b.linear-dino.online.imagenet.json"
    assert result_path("random:resnet18", None, "linear/dino", "online", "data/imagenet") is None
    assert result_path("random:resnet18", tmp_path / "r", "linear/dino", "online", "data/imagenet") == tmp_path / "r"
    files = [side_file(Path(out), "head").name for out in ("lin.e1", "lin.e2", "r.json", "r")]
    assert files == ["lin.e1.head.pt", "lin.e2.head.pt", "r.head.pt", "r.head.pt"]


def test_an_interrupted_command_says_nothing(capsys):
    def run(args, dist):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        command.main(BackboneArgs, run, "eval.x", ["--checkpoint", "random:resnet18"])
    assert stop.value.code == 130 and capsys.readouterr() == ("", "")


def test_a_result_is_replaced_by_the_same_evaluation_only(tmp_path):
    out = tmp_path / "r.json"
    check_same(None, data="a", run_as="x")
    check_same(out, data="a", run_as="x")
    out.write_text(json.dumps({"data": "a", "run_as": "x", "seed": 0, "top1": 3.0}))
    check_same(out, data=str(Path("a").resolve()), run_as="x", seed=0, sweep="none")
    for of, message in (
        ({"run_as": "x, crop 64", "seed": 0}, "run_as was x and is x, crop 64[.]"),
        ({"run_as": "x", "seed": 1}, "seed was 0 and is 1.*--out FILE"),
        ({"run_as": "x", "seed": 0, "data": "b"}, "data was .*a and is .*b"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_same(out, **{"data": "a"} | of)
    for other in ("", "[3]"):
        out.write_text(other)
        with pytest.raises(ConfigError, match="no result of an evaluation"):
            check_same(out, data="a", run_as="x")
