import hashlib

import numpy as np
import pytest
from PIL import Image

from convert import tiles
from loaders.errors import DataError


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return tiles.write_tiles(tmp_path_factory.mktemp("tiles") / "out", per_class=10)


def digest(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*.jpg"))}


def test_balanced_jpegs_of_varied_size(tree):
    for split, count in (("train", 8), ("val", 2)):
        assert {d.name: len(list(d.iterdir())) for d in (tree / split).iterdir()} == dict.fromkeys(tiles.PHOTOGRAPHS, count)
    sizes = set()
    for path in tree.rglob("*.jpg"):
        with Image.open(path) as image:
            assert image.mode == "RGB" and image.format == "JPEG"
            sizes.add(image.size)
    assert len(sizes) > 150
    assert all(tiles.SIDES[0] <= side <= tiles.SIDES[1] for size in sizes for side in size)
    assert any(w > h for w, h in sizes) and any(w < h for w, h in sizes)


def test_same_seed_same_bytes_other_seed_others(tree, tmp_path):
    again = tiles.write_tiles(tmp_path / "again", per_class=10)
    assert digest(again) == digest(tree)
    other = digest(tiles.write_tiles(tmp_path / "other", per_class=10, seed=1))
    assert not set(other.values()) & set(digest(tree).values())


@pytest.mark.parametrize("height, width", [(300, 451), (660, 550), (172, 448), (1411, 1411)])
def test_no_pixel_is_in_both_splits(height, width):
    for seed in range(5):
        train, val = tiles.cut(height, width, 40, 10, np.random.default_rng(seed))
        covered = {}
        for name, boxes in (("train", train), ("val", val)):
            covered[name] = np.zeros((height, width), bool)
            for b in boxes:
                assert b.top >= 0 and b.left >= 0 and b.top + b.height <= height and b.left + b.width <= width
                covered[name][b.top : b.top + b.height, b.left : b.left + b.width] = True
        assert covered["train"].any() and covered["val"].any()
        assert not (covered["train"] & covered["val"]).any()


def test_a_complete_set_is_left_alone_and_anything_else_refused(tree, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in tree.rglob("*")}
    assert tiles.write_tiles(tree, per_class=10) == tree
    assert {p: p.stat().st_mtime_ns for p in tree.rglob("*")} == before
    with pytest.raises(DataError, match="--out"):
        tiles.write_tiles(tree, per_class=20)
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="Remove it"):
        tiles.write_tiles(tmp_path / "mine")
    assert not list((tmp_path / "mine").iterdir())


def test_nothing_is_left_behind_when_a_photograph_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(tiles.PHOTOGRAPHS, "tissue", ("skimage", "data/no_such.png"))
    with pytest.raises(DataError, match=r"no_such\.png.*make setup"):
        tiles.write_tiles(tmp_path / "out", per_class=5)
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path, capsys):
    tiles.main(["--out", str(tmp_path / "out"), "--per-class", "5"])
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    with pytest.raises(SystemExit, match="--per-class 5 or more"):
        tiles.main(["--out", str(tmp_path / "small"), "--per-class", "4"])
