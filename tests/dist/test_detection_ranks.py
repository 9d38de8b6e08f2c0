"""Detection on two processes: the same numbers of one detector as on one process, and a training whose ranks stay equal."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.detection.coco import read_coco
from eval.detection.command import evaluate, measure
from eval.detection.model import detector_from_backbone
from eval.detection.results import detect
from fastssl.distributed import Dist
from tests.detection import backbone_state, small, write_detection_data
from tests.ranks import run_ranks


def both(rank: int, world: int, name: str, folder: str, out: str) -> tuple[list, dict, dict]:
    """What a random detector finds, its AP, and the result of a short training."""
    torch.set_num_threads(1)
    dist = Dist(rank, world, rank, world, torch.device("cpu"))
    preset = small(name)
    torch.manual_seed(1)
    detector = detector_from_backbone(replace(preset.detector, classes=2), backbone_state())
    test = read_coco(Path(folder), "val2017")
    found = detect(detector, test.photos, side=64, longest=1000, dist=dist, threads=1)
    measured = measure(backbone_state(), folder, preset, dist=dist, workers=1, quiet=True, out=Path(out))
    return [(f.boxes.tolist(), f.scores.tolist(), f.labels.tolist(), f.masks) for f in found], evaluate(preset, test, found), measured


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coco_fpn_mini", "coco_c4_mini"])
def test_two_processes_agree(name, tmp_path):
    folder = str(write_detection_data(tmp_path / "data"))
    found, scores, _ = both(0, 1, name, folder, str(tmp_path / "one.json"))
    (*first, trained), (*second, again) = run_ranks(2, both, name, folder, str(tmp_path / "two.json"))
    assert first == second == [found, scores]
    assert all(len(boxes) for boxes, *_ in found)
    assert trained == again and trained["num_found"] > 0
    assert (tmp_path / "two.model.pt").exists()
