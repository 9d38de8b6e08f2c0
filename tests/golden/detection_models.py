"""Whole detectors: their parameters, and losses, gradients, proposals and detections of two images (golden/transfer.md)."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from eval.detection.model import Detector, DetectorConfig, Target, postprocess, weight_decay_groups
from tests.golden.kind import Arrays, Kind, compare

MODELS = {
    "c4_coco": DetectorConfig(head="c4", classes=80, mask=True),
    "c4_voc": DetectorConfig(head="c4", classes=20, mask=False),
    "fpn_coco": DetectorConfig(head="fpn", classes=80, mask=True),
    "fpn_box_coco": DetectorConfig(head="fpn", classes=80, mask=False),
}

OVERRIDES = {  # every labelled anchor and region takes part: nothing is drawn
    "rpn_batch": 20000,
    "roi_batch": 4000,
    "rpn_pre_nms_train": 100,
    "rpn_pre_nms_test": 60,
    "rpn_post_nms_train": 24,
    "rpn_post_nms_test": 12,
    "score_threshold": 0.02,
    "detections": 8,
}
MEAN = torch.tensor((123.675, 116.28, 103.53)).view(3, 1, 1)
STD = torch.tensor((58.395, 57.12, 57.375)).view(3, 1, 1)


def parameters(a: Arrays) -> Arrays:
    out = {}
    for name in sorted({key.removesuffix("_total") for key in a if key.endswith("_total")}):
        with torch.device("meta"):
            detector = Detector(MODELS[name])
        decay = {p: group["weight_decay"] for group in weight_decay_groups(detector, 1e-4) for p in group["params"]}
        named = dict(detector.named_parameters())
        out[f"{name}_names"] = np.array(list(named))
        out[f"{name}_shapes"] = np.array(["x".join(map(str, p.shape)) for p in named.values()])
        out[f"{name}_wd"] = np.array([decay[p] for p in named.values()])
        out[f"{name}_total"] = np.array(sum(p.numel() for p in named.values()))
        out[f"{name}_buffers"] = np.array([key for key, _ in detector.named_buffers()])
    return out


def named_weight(name: str, shape: torch.Size, salt: str, *, norm: bool, transposed: bool) -> Tensor:
    """The weight that the golden's rule gives a name."""
    r = np.random.RandomState(zlib.crc32((name + salt).encode()) & 0x7FFFFFFF).standard_normal(tuple(shape))
    if name.endswith("running_var"):
        r = 1 + 0.3 * np.abs(r)
    elif name.endswith("running_mean"):
        r = 0.1 * r
    elif name.endswith("bias"):
        r = 0.05 * r
    elif norm:
        r = 0.5 + 0.1 * r
    else:
        r = r * np.sqrt(1.6 / (shape[0] if transposed else np.prod(shape[1:])))
    return torch.from_numpy(r.astype(np.float32))


def filled(config: DetectorConfig, salt: str) -> Detector:
    with torch.device("meta"):
        detector = Detector(config)
    detector.to_empty(device="cpu")
    for prefix, module in detector.named_modules():
        kinds = {"norm": isinstance(module, nn.modules.batchnorm._BatchNorm), "transposed": isinstance(module, nn.ConvTranspose2d)}
        for name, t in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if name == "num_batches_tracked":
                t.zero_()
            else:
                t.data.copy_(named_weight(f"{prefix}.{name}", t.shape, salt, **kinds))
    return detector


def model(head: str) -> Callable[[Arrays], Arrays]:
    def reproduce(a: Arrays) -> Arrays:
        config = DetectorConfig(head=head, classes=int(a["num_classes"]), mask=True, **OVERRIDES)
        detector = filled(config, str(a["salt"]))
        statistics = {name: b.clone() for name, b in detector.named_buffers()}
        count = sum(name.startswith("img") for name in a)
        images = [(torch.from_numpy(a[f"img{i}"]).float() - MEAN) / STD for i in range(count)]
        out = trained(detector.train(), images, [target(a, i) for i in range(count)], a["grad_names"])
        detector.load_state_dict(statistics, strict=False)
        out |= tested(detector.eval(), images)
        return {name: x.detach().numpy() if isinstance(x, Tensor) else np.asarray(x) for name, x in out.items()}

    return reproduce


def target(a: Arrays, i: int) -> Target:
    boxes, classes = (torch.from_numpy(a[f"gt_{what}{i}"]) for what in ("boxes", "classes"))
    return Target(boxes, classes, [[polygon] for polygon in a[f"polys{i}"]])


def trained(detector: Detector, images: list[Tensor], targets: list[Target], grad_names: np.ndarray) -> dict:
    rpn, heads, seen = detector.proposal_generator, detector.roi_heads, {}
    hooks = [
        rpn.register_forward_hook(lambda module, args, out: seen.update(maps=args[0], proposals=out[0])),
        rpn.rpn_head.register_forward_hook(lambda module, args, out: seen.update(logits=out[0][-1])),
        heads.box_predictor.register_forward_hook(lambda module, args, out: seen.update(rois=len(out[0]))),
    ]
    losses = detector(images, targets)
    sum(losses.values()).backward()
    for hook in hooks:
        hook.remove()
    maps, named = seen["maps"], dict(detector.named_parameters())
    out = {f"train_loss_{name}": loss for name, loss in losses.items()} | {"n_rois": seen["rois"]}
    for i, (boxes, logits) in enumerate(seen["proposals"]):
        out |= {f"train_prop{i}": boxes, f"train_prop_logit{i}": logits}
    out["train_feat_mean"] = torch.stack([x.double().mean() for x in maps])
    out["train_feat_std"] = torch.stack([x.double().std() for x in maps])
    out["train_feat_shape"] = [x.shape for x in maps]
    out["rpn_logits_first"] = seen["logits"][0].unflatten(0, (*maps[-1].shape[2:], -1)).permute(2, 0, 1)
    out["grad_norms"] = [named[name].grad.double().norm().item() for name in grad_names]
    out["no_grad_params"] = [name for name, p in named.items() if p.grad is None] or [""]
    return out


@torch.no_grad()
def tested(detector: Detector, images: list[Tensor]) -> dict:
    proposals = []
    hook = detector.proposal_generator.register_forward_hook(lambda module, args, out: proposals.extend(boxes for boxes, _ in out[0]))
    found = detector(images)
    hook.remove()
    out = {f"test_prop{i}": boxes for i, boxes in enumerate(proposals)}
    for i, (image, detections) in enumerate(zip(images, found, strict=True)):
        h, w = image.shape[1:]
        d = postprocess(detections, (h, w), (2 * h, 2 * w))
        out |= {f"det_boxes{i}": d.boxes, f"det_scores{i}": d.scores, f"det_classes{i}": d.classes}
        out |= {f"det_mask{i}": np.packbits(d.masks.numpy().ravel()), f"det_mask_shape{i}": d.masks.shape}
    return out


class Model(Kind):
    """Tolerances of golden/transfer.md: what another convolution algorithm changes."""

    ABSOLUTE = {"train_prop": 0.1, "test_prop": 0.1, "det_boxes": 0.01, "det_scores": 1e-4}
    RELATIVE = {"train_loss": 1e-3, "train_prop_logit": 1e-3, "train_feat": 5e-4, "rpn_logits": 5e-4, "grad_norms": 5e-3}

    def compare(self, name: str, actual: np.ndarray, expected: np.ndarray) -> None:
        if expected.dtype.kind != "f":
            wrong = np.unpackbits(actual ^ expected).sum() if re.fullmatch(r"det_mask\d+", name) else 0
            assert wrong <= 5, f"{name}: {wrong} pixels differ"
            if not wrong:
                compare(name, actual, expected)
        elif relative := next((t for start, t in self.RELATIVE.items() if name.startswith(start)), None):
            compare(name, actual, expected, relative)
        else:
            allowed = next(t for start, t in self.ABSOLUTE.items() if name.startswith(start))
            assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
            error = np.abs(actual - expected).max(initial=0)
            assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


GIVEN = ("salt", "num_classes", "img*", "gt_boxes*", "gt_classes*", "polys*", "grad_names")
KINDS = {
    "transfer/d2params": Kind(parameters, inputs=()),
    "transfer/d2model_c4_mask": Model(model("c4"), GIVEN),
    "transfer/d2model_fpn_mask": Model(model("fpn"), GIVEN),
}
