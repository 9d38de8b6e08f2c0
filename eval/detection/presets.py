"""`detection/...`: the published settings of detection and instance segmentation (methods/transfer.md sections 1 and 2).

SGD in fp32 on all weights of a detector whose trunk starts from the backbone.  Numbers in `published` are average precision in percent:
AP / AP50 / AP75 on VOC, box AP / mask AP on COCO.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from eval.detection.config import DetectorConfig
from eval.schedules import warmup_step_decay
from fastssl.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class DetectionPreset:
    name: str
    detector: DetectorConfig
    data: Literal["coco", "voc"]
    train: tuple[str, ...]
    """Parts of the data set to learn from; VOC's are YEAR/LIST."""
    test: str
    batch: int
    """Images of a step on all ranks."""
    base_lr: float
    lr_mult: float = 1.0
    """Factor of the learning rate."""
    iterations: int
    milestones: tuple[int, ...]
    """Iterations from which the learning rate is a tenth of what it was."""
    warmup: int
    """Iterations of the linear warm-up from a thousandth."""
    sgd_momentum: float = 0.9
    weight_decay: float = 1e-4
    """Of weights and biases, not of BatchNorm's."""
    train_sides: tuple[int, ...]
    """Shorter sides of training images, pixels; each image draws one."""
    test_side: int = 800
    longest: int = 1333
    """No image is resized to a longer side."""
    precise_bn: int = 200
    """Training batches that the BatchNorm statistics are taken from after the last iteration; 0: those of training stay."""
    published: str

    def lr(self, iteration: int) -> float:
        """Counted from 0."""
        return warmup_step_decay(iteration, base_lr=self.base_lr * self.lr_mult, milestones=self.milestones, warmup=self.warmup)

    @property
    def eleven_points(self) -> bool:
        """VOC 2007's rule for AP; later years have the area."""
        return self.data == "voc" and self.test.startswith("2007")

    @property
    def run_as(self) -> str:
        """The protocol's name and what differs from the published settings, but for what follows from the batch or the iterations."""
        published = DETECTION_PRESETS[self.name].of_batch(self.batch)
        parts = [f"detection/{self.name}"]
        if self.batch != (theirs := DETECTION_PRESETS[self.name].batch):
            parts.append(f"batch {self.batch} instead of {theirs} (lr {self.base_lr:g}, {published.iterations} iterations)")
        for ours, theirs, names in (
            (self, published, ("iterations", "lr_mult", "precise_bn")),
            (self.detector, published.detector, ("arch", "classes", "syncbn")),
        ):
            differ = [n for n in names if getattr(ours, n) != getattr(theirs, n)]
            parts += [f"{n} {getattr(ours, n)} instead of {getattr(theirs, n)}" for n in differ]
        return ", ".join(parts)

    def of_batch(self, batch: int) -> DetectionPreset:
        """Linear scaling: as many images in all, the learning rate in proportion.  The warm-up keeps its length."""
        times = self.batch / batch
        return replace(
            self,
            batch=batch,
            base_lr=self.base_lr / times,
            iterations=math.ceil(self.iterations * times),
            milestones=tuple(round(m * times) for m in self.milestones),
        )

    def of_iterations(self, iterations: int) -> DetectionPreset:
        """The same shape in fewer iterations: warm-up and milestones at the same fractions."""
        part = iterations / self.iterations
        milestones = tuple(round(m * part) for m in self.milestones)
        return replace(self, iterations=iterations, milestones=milestones, warmup=round(self.warmup * part))


def changed(
    preset: DetectionPreset,
    *,
    batch: int | None = None,
    iterations: int | None = None,
    lr_mult: float | None = None,
    precise_bn: int | None = None,
    **detector: str | int | None,
) -> DetectionPreset:
    """With the command line's values and the detector's, None for those not given.  ConfigError for impossible ones."""
    given = {"lr_mult": lr_mult, "precise_bn": precise_bn}
    preset = replace(preset, **{name: value for name, value in given.items() if value is not None})
    preset = replace(preset, detector=replace(preset.detector, **{name: v for name, v in detector.items() if v is not None}))
    if min(1 if value is None else value for value in (batch, iterations)) < 1:
        raise ConfigError("--batch and --iterations must be positive numbers.")
    if not (math.isfinite(preset.lr_mult) and preset.lr_mult > 0) or preset.precise_bn < 0:
        raise ConfigError("--lr-mult must be positive, and --precise-bn must not be negative.")
    preset = preset if batch is None else preset.of_batch(batch)
    return preset if iterations is None else preset.of_iterations(iterations)


_COCO = {"data": "coco", "train": ("train2017",), "test": "val2017", "train_sides": tuple(range(640, 801, 32)), "warmup": 1000}
_VOC = {"data": "voc", "train": ("2007/trainval", "2012/trainval"), "test": "2007/test", "train_sides": tuple(range(480, 801, 32))}
_1X = {"iterations": 90_000, "milestones": (60_000, 80_000)}
_2X = {"iterations": 180_000, "milestones": (120_000, 160_000)}
_24K = {"iterations": 24_000, "milestones": (18_000, 22_000), "warmup": 100}
_BY_16 = {"batch": 16, "base_lr": 0.02}
_BY_8 = {"batch": 8, "base_lr": 0.01}

_C4, _FPN = {"head": "c4"}, {"head": "fpn"}
_W2SSL = _FPN | {"rpn_pre_nms_test": 6000}
_COCO_MASKS, _COCO_BOXES, _VOC_BOXES = {"classes": 80, "mask": True}, {"classes": 80, "mask": False}, {"classes": 20, "mask": False}

# The mini protocol (methods/transfer.md section 9), its schedules ours: every step of the others on a CPU, numbers without a meaning.
_MINI = {"batch": 2, "base_lr": 0.02, "train_sides": (160,), "test_side": 160, "precise_bn": 10}
_MINI_COCO = _MINI | {"data": "coco", "train": ("train2017",), "test": "val2017"}
_MINI_VOC = _MINI | {"data": "voc", "train": ("2012/train",), "test": "2012/val"}
_60 = {"iterations": 60, "milestones": (40, 53), "warmup": 10}
_20 = {"iterations": 20, "milestones": (13, 18), "warmup": 3}
_MINI_FPN = _FPN | {"roi_batch": 64, "rpn_post_nms_test": 100}
_MINI_C4 = _C4 | {"roi_batch": 64, "rpn_post_nms_train": 100, "rpn_post_nms_test": 100}


def _preset(name: str, detector: dict, recipe: dict, published: str = "nothing") -> DetectionPreset:
    return DetectionPreset(name=name, detector=DetectorConfig(**detector), published=published, **recipe)


DETECTION_PRESETS = {
    p.name: p
    for p in (
        _preset("moco_coco_c4_2x", _C4 | _COCO_MASKS, _COCO | _2X | _BY_16),
        # methods/lewel.md 11.4.  Its README says that EMAN models prefer twice the learning rate of SyncBN models, in numbers that no
        # configuration has: which rate was used is not established.
        _preset(
            "lewel_coco_c4_1x",
            _C4 | _COCO_MASKS,
            _COCO | _1X | _BY_16,
            "LEWEL EMAN 200 epochs 38.5 / 33.7; supervised 38.2 / 33.3",
        ),
        _preset(
            "lewel_coco_fpn_1x",
            _FPN | _COCO_MASKS,
            _COCO | _1X | _BY_16,
            "LEWEL EMAN 200 epochs 41.3 / 37.4, SyncBN 400 epochs 41.9 / 37.9; supervised 39.7 / 35.9",
        ),
        _preset(
            "lewel_coco_fpn_2x",
            _FPN | _COCO_MASKS,
            _COCO | _2X | _BY_16,
            "LEWEL EMAN 200 epochs 42.2 / 38.2, SyncBN 400 epochs 43.4 / 39.1; supervised 41.6 / 37.6; MoCo v2 41.7 / 37.6",
        ),
        # Means of 5 trials; over trials AP varies by 0.2 to 0.4.
        _preset(
            "moco_voc_c4_24k",
            _C4 | _VOC_BOXES,
            _VOC | _24K | _BY_16,
            "MoCo v1 200 epochs 55.9 / 81.5 / 62.6, v2 200 57.0 / 82.4 / 63.6, v2 800 57.4 / 82.5 / 64.0; supervised 53.5 / 81.3 / 58.8",
        ),
        # methods/w2ssl.md 13: half the batch in twice the iterations.
        _preset("w2ssl_coco_fpn", _W2SSL | _COCO_BOXES, _COCO | _2X | _BY_8),
        _preset("w2ssl_coco_mask_fpn", _W2SSL | _COCO_MASKS | {"mask_norm": False}, _COCO | _2X | _BY_8),
        _preset("w2ssl_voc_fpn", _W2SSL | _VOC_BOXES, _VOC | _24K | _BY_8),
        _preset("coco_fpn_mini", _MINI_FPN | _COCO_MASKS, _MINI_COCO | _60),
        _preset("coco_c4_mini", _MINI_C4 | _COCO_MASKS, _MINI_COCO | _20),
        _preset("voc_fpn_mini", _MINI_FPN | _VOC_BOXES, _MINI_VOC | _60),
        _preset("voc_c4_mini", _MINI_C4 | _VOC_BOXES, _MINI_VOC | _20),
    )
}
