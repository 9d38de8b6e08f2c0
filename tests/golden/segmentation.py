"""Checks of the segmentation goldens: distortion, scores and losses, heads on dilated trunks, windows (methods/transfer.md, 5)."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from eval.segmentation.datasets import OTHER_VOID, VOID, class_numbers
from eval.segmentation.distortion import Distortion, distorted
from eval.segmentation.heads import FCN, UperNet
from eval.segmentation.inference import slide, windows
from eval.segmentation.loss import doubled_loss, pixel_loss
from eval.segmentation.scores import Scores
from eval.segmentation.trunks import D8, DilatedResNet, d16
from fastssl.models.backbones import build_backbone
from tests.golden.detection_models import named_weight
from tests.golden.kind import Arrays, Kind, compare

DILATIONS = {"d8": D8, "d16_moco": d16(1), "d16_nocontract": d16(2)}


class Close(Kind):
    """Everything to 1e-5 of its largest value; a class that is nowhere has NaN in both."""

    def compare(self, name: str, actual: np.ndarray, expected: np.ndarray) -> None:
        if not np.issubdtype(expected.dtype, np.floating):
            return compare(name, actual, expected)
        assert (np.isnan(actual) == np.isnan(expected)).all(), f"{name}: NaN in other places"
        compare(name, np.nan_to_num(actual), np.nan_to_num(expected), 1e-5)


def photo(arrays: Arrays) -> Arrays:
    """transfer/photo: each row of the script on the image."""
    image, out = arrays["img_bgr"][..., ::-1], []
    for mode, *given in arrays["script"].tolist():
        values = zip(("brightness", "contrast", "saturation", "hue"), given[::2], given[1::2], strict=True)
        how = Distortion(contrast_last=mode == 0, **{n: int(v) if n == "hue" else v for n, on, v in values if on})
        out.append(distorted(image, how)[..., ::-1])
    return {"out_bgr": np.stack(out)}


def miou(arrays: Arrays) -> Arrays:
    """transfer/miou: scores of mmsegmentation and ImageNet-S, and their losses."""
    mmseg = Scores(int(arrays["n_classes"]), VOID)
    for prediction, label in zip(arrays["pred"], arrays["gt"], strict=True):
        mmseg.add(torch.from_numpy(prediction), torch.from_numpy(label))
    inter, union, _ = (part.numpy() for part in mmseg.parts)
    out = {"inter": inter, "union": union, "iou": mmseg.iou.numpy(), "acc": mmseg.accuracy.numpy()}
    out |= {name: np.array(mmseg.result()[name] / 100) for name in ("aAcc", "mIoU", "mAcc")}

    imagenets = Scores(int(arrays["ins_classes"]), OTHER_VOID, "zero")
    for prediction, label in zip(arrays["ins_pred"], arrays["ins_rgb"], strict=True):
        imagenets.add(torch.from_numpy(prediction), torch.from_numpy(class_numbers(Image.fromarray(label))))
    found = imagenets.result()
    out |= {"ins_iou": np.array(found["iou"]), "ins_miou": np.array(found["mIoU"]), "ins_f": np.array(found["F"])}
    out["ins_ids2"] = class_numbers(Image.fromarray(arrays["ins_rgb2"]))

    logits = torch.from_numpy(arrays["ce_logits"]).requires_grad_()
    loss = pixel_loss(logits, torch.from_numpy(arrays["ce_label"]).long(), ignore=VOID)
    loss.backward()
    out |= {"ce_loss": loss.detach().numpy(), "ce_grad": logits.grad.numpy()}
    logits, target = torch.from_numpy(arrays["ins_logits"]), torch.from_numpy(arrays["ins_target"]).long()
    return out | {"ins_loss": doubled_loss(logits, target, ignore=OTHER_VOID).numpy()}


def windows_of(arrays: Arrays) -> Arrays:
    """transfer/slide: where the windows are, and means of what comes out when window k says k."""
    out = {}
    for case in range(int(arrays["n"])):
        h, w, crop, stride = arrays[f"cfg{case}"].tolist()
        calls = iter(range(1, 10**6))

        def number(x: Tensor, calls=calls) -> Tensor:
            return torch.full((1, 1, *x.shape[2:]), float(next(calls)))

        averaged = slide(number, torch.zeros(1, 3, h, w), crop, stride)[0, 0].numpy()
        out |= {f"windows{case}": np.array(windows(h, w, crop, stride))}
        out |= {f"rowmean{case}": averaged.mean(1), f"colmean{case}": averaged.mean(0)}
    return out


def filled(module: nn.Module, salt: str) -> nn.Module:
    """In eval mode, with the weights that the golden's rule gives."""
    norms = {name for name, m in module.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, t in module.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            t.copy_(named_weight(name, t.shape, salt, norm=name.rpartition(".")[0] in norms, transposed=False))
    return module.eval()


def described(module: nn.Module, name: str) -> Arrays:
    """Names and shapes of a head's state, in mmsegmentation's order: the classifier first."""
    state = sorted(module.state_dict().items(), key=lambda item: not item[0].startswith("conv_seg"))
    return {f"{name}_names": np.array([n for n, _ in state]), f"{name}_shapes": np.array(["x".join(map(str, t.shape)) for _, t in state])}


@torch.no_grad()
def seghead(arrays: Arrays) -> Arrays:
    """transfer/seghead: stages of dilated ResNet-50s, and logits of the heads on them and of UperNet."""
    salt, out, maps = str(arrays["salt"]), {}, {}
    resnet = filled(build_backbone("resnet50"), salt)
    for name in [n for n in DILATIONS if f"bb_{n}_shapes" in arrays]:
        trunk, stages = DilatedResNet(deepcopy(resnet), DILATIONS[name]), []
        for i in range(1, 5):
            trunk.backbone.get_submodule(f"layer{i}").register_forward_hook(lambda module, x, y, stages=stages: stages.append(y))
        maps[name] = trunk(torch.from_numpy(arrays["x"]))
        out[f"bb_{name}_shapes"] = np.array([m.shape for m in stages])
        out[f"bb_{name}_mean"] = np.array([m.double().mean() for m in stages])
        out[f"bb_{name}_std"] = np.array([m.double().std() for m in stages])
        out[f"bb_{name}_last"] = stages[-1][0, :8].numpy()
        out[f"bb_{name}_keys"] = np.array(len(trunk.backbone.state_dict()))

    shapes = {n: dict(zip(arrays[f"{n}_names"], arrays[f"{n}_shapes"], strict=True)) for n in ("fcn", "aux", "moco", "uper")}
    sizes = {n: [int(s) for s in shapes[n]["conv_seg.weight"].split("x")[1::-1]] for n in shapes}
    heads = {
        "fcn": FCN(2048, *sizes["fcn"]),
        "aux": FCN(1024, *sizes["aux"], at=0, convs=1, concat=False),
        "moco": FCN(2048, *sizes["moco"], dilation=6, concat=False, dropout=0.0),
        "uper": UperNet([arrays[f"uf{i}"].shape[1] for i in range(4)], *sizes["uper"]),
    }
    inputs = {"fcn": maps["d8"], "aux": maps["d8"], "moco": maps["d16_moco"]}
    inputs["uper"] = [torch.from_numpy(arrays[f"uf{i}"]) for i in range(4)]
    for name, head in heads.items():
        filled(head, salt + "aux" if name == "aux" else salt)
        out |= {f"{name}_out": head(inputs[name]).numpy(), **described(head, name)}
    return out


MIOU_INPUTS = ("pred", "gt", "n_classes", "ins_rgb*", "ins_pred", "ins_classes", "ce_logits", "ce_label", "ins_logits", "ins_target")
KINDS = {
    "transfer/photo": Kind(photo, ("img_bgr", "script")),
    "transfer/miou": Close(miou, MIOU_INPUTS),
    "transfer/slide": Close(windows_of, ("n", "cfg*")),
    "transfer/seghead": Close(seghead, ("salt", "x", "uf[0-9]")),
}
