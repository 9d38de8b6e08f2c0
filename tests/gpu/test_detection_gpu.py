"""Detection on a CUDA device: images, training, BatchNorm statistics, evaluation and picture of a short run."""

import pytest
import torch

from eval.detection.command import measure
from fastssl.distributed import Dist
from tests.detection import backbone_state, small, write_detection_data

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["coco_fpn_mini", "voc_c4_mini"])
def test_a_short_run(name, tmp_path):
    folder = write_detection_data(tmp_path / "data")
    dist = Dist(0, 1, 0, 1, torch.device("cuda"))
    out, picture = tmp_path / "result.json", tmp_path / "sheet.png"
    result = measure(backbone_state(), str(folder), small(name), dist=dist, workers=2, quiet=True, out=out, picture=picture)
    assert result["num_found"] > 0 and len(result["curve"]) == 2
    assert out.with_suffix(".model.pt").exists() and picture.exists()
