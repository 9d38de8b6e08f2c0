"""The file formats that other libraries load a backbone from (methods/transfer.md section 8, methods/ibot.md section 10).

Names of the weights are torchvision's (ResNets) and timm's (transformers) in training and in most formats; the others rename
them by fastssl/models/keymaps.py.  Heads are never part of an export, and no position table is resized: outside the image
size of its table a ViT of ours interpolates as DINO did, timm and torchvision do it otherwise.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastssl.models import keymaps
from fastssl.models.backbones import MOCOV3_VITS
from fastssl.models.features import Backbone
from fastssl.models.weights import CheckpointError

State = dict[str, Tensor]
_FAMILIES = {"resnet": "resnet", "vit_conv_": "conv_vit", "vit_": "vit", "swin_": "swin"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Exported:
    """A backbone on its way into a file."""

    backbone: Backbone
    """On the CPU, in eval mode."""
    arch: str
    """A name of fastssl.models.backbones."""
    origin: dict[str, str]
    """preset, step, network and method, where known: written wherever the format has room for it."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    """Of the images that it was trained on."""

    @property
    def family(self) -> str:
        """resnet, vit, scaled_vit (with LayerScale), conv_vit (patches from a convolutional stem) or swin."""
        family = next(family for prefix, family in _FAMILIES.items() if self.arch.startswith(prefix))
        return "scaled_vit" if family == "vit" and "blocks.0.ls1.gamma" in self.backbone.state_dict() else family

    @property
    def state(self) -> State:
        """Our names; plain contiguous tensors, whatever memory format they were trained in."""
        return {name: t.contiguous() for name, t in self.backbone.state_dict().items()}

    @property
    def unusual(self) -> str:
        """What libraries would build otherwise for this width: MoCo v3's number of heads, as a further argument."""
        return f", num_heads={self.backbone.num_heads}" if self.arch in MOCOV3_VITS else ""

    @property
    def image_size(self) -> int:
        """Pixels a side of the images that a transformer was built for; 224 for other networks."""
        if self.family == "swin":
            return self.backbone.image_size
        return 224 if self.family == "resnet" else self.backbone.grid * self.backbone.patch_size


# ------------------------------------------------------------------------------------------------ weights by name


def torchvision_state(e: Exported) -> State:
    """For torchvision's model of the same name without `fc`, or its VisionTransformer without `heads`."""
    return e.state if e.family == "resnet" else keymaps.renamed(e.state, keymaps.torchvision_vit)


def timm_state(e: Exported) -> State:
    """For timm.create_model(..., num_classes=0)."""
    return e.state


def mmseg_state(e: Exported) -> dict[str, State]:
    """For `init_cfg=dict(type='Pretrained', checkpoint=...)` of ResNet (style 'pytorch') or VisionTransformer."""
    return {"state_dict": e.state if e.family == "resnet" else keymaps.renamed(e.state, keymaps.mmseg_vit)}


def mmdet_state(e: Exported) -> dict[str, State]:
    """For the same of ResNet; ViTs keep timm's names, which the detectors of iBOT read."""
    return {"state_dict": e.state}


def detectron2_fpn_state(e: Exported) -> State:
    """For the FPN detectors' own names, without matching (as W2SSL's detection loads it)."""
    return keymaps.renamed(e.state, keymaps.detectron2_fpn)


def detectron2_pickle(state: State, author: str) -> dict[str, object]:
    """What Detectron2 matches by the suffixes of the names, in C4 and FPN detectors alike."""
    arrays = {name: t.numpy() for name, t in keymaps.renamed(state, keymaps.detectron2).items()}
    return {"model": arrays, "__author__": author, "matching_heuristics": True}


# ------------------------------------------------------------------------------------------------ files


def torch_file(contents: Callable[[Exported], dict]) -> Callable[[Exported, Path], None]:
    def write(e: Exported, out: Path) -> None:
        state = contents(e)
        with out.open("wb") as f:
            try:
                torch.save(state, f)
            except RuntimeError as error:  # what torch's zip writer makes of the OSError of a full disk
                raise OSError(str(error.__context__ or error).splitlines()[0]) from error

    return write


def write_safetensors(e: Exported, out: Path) -> None:
    normalisation = {name: " ".join(map(str, getattr(e, name))) for name in ("mean", "std")}
    save_file(e.state, out, metadata={"arch": e.arch, **e.origin, **normalisation})


def write_detectron2(e: Exported, out: Path) -> None:
    out.write_bytes(pickle.dumps(detectron2_pickle(e.state, author="fastssl")))


def timm_config(e: Exported) -> dict[str, object]:
    """config.json of a timm model on the Hugging Face hub: which model to build, and how its images are prepared."""
    size, options = e.image_size, {}
    if e.family in ("vit", "scaled_vit"):
        name = {192: "tiny", 384: "small", 768: "base", 1024: "large"}[e.backbone.num_features]
        architecture, first = f"vit_{name}_patch16_224", "patch_embed.proj"
        options = {"img_size": size, "patch_size": e.backbone.patch_size, "num_heads": e.backbone.num_heads}
        options |= {"init_values": 1.0} if e.family == "scaled_vit" else {}  # what the loaded factors replace
    elif e.family == "swin":
        architecture, first = f"{e.arch.split('_window')[0]}_window7_224", "patch_embed.proj"
        options = {"img_size": size, "window_size": e.backbone.window}
    else:
        architecture, first = e.arch, "conv1"
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": e.backbone.num_features,
        "global_pool": "token" if "vit" in e.family else "avg",
        "model_args": options,
        "pretrained_cfg": {
            "tag": "fastssl",
            "input_size": [3, size, size],
            "fixed_input_size": e.family != "resnet",
            "mean": e.mean,
            "std": e.std,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "num_classes": 0,
            "first_conv": first,
            "classifier": {"resnet": "fc", "swin": "head.fc"}.get(e.family, "head"),
        },
        "fastssl": {"arch": e.arch, **e.origin},
    }


def write_huggingface(e: Exported, out: Path) -> None:
    """A folder that timm reads as local-dir:FOLDER, or as hf-hub:USER/NAME once it is uploaded."""
    out.mkdir()
    save_file(e.state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(timm_config(e), indent=2) + "\n")


class _Outputs(nn.Module):
    """images -> a tuple: the pooled features, and the feature map or the patch tokens."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(images)
        return features.pooled, features.map if features.tokens is None else features.tokens


def write_onnx(e: Exported, out: Path) -> None:
    """images float32 [batch, 3, size, size], any batch, normalised -> pooled [batch, D], and map or tokens."""
    if missing := [package for package in ("onnx", "onnxscript") if find_spec(package) is None]:
        raise CheckpointError(f"Exporting to ONNX needs {' and '.join(missing)}: pip install onnx onnxscript, or the extra fastssl[onnx]")
    images = torch.zeros(2, 3, e.image_size, e.image_size)
    # Given the network itself, torch.onnx.export would fix the batch without a word where it cannot keep it free.
    graph = torch.export.export(_Outputs(e.backbone).eval(), (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})
    names = {"input_names": ["images"], "output_names": ["pooled", "map" if e.family == "resnet" else "tokens"]}
    torch.onnx.export(graph, f=out, dynamo=True, external_data=False, verbose=False, **names)


# ------------------------------------------------------------------------------------------------ the formats


@dataclass(frozen=True)
class Format:
    suffixes: tuple[str, ...]
    """Of the file; none: a folder."""
    families: tuple[str, ...]
    """Backbones that the other library has (see Exported.family)."""
    write: Callable[[Exported, Path], None]
    loads: str
    """How the result is loaded; OUT stands for it, OPTIONS for what the other library's network is built with."""

    def load_line(self, e: Exported, out: Path) -> str:
        return self.loads.replace("OUT", str(out)).replace("OPTIONS", e.unusual)


_TORCH = (".pth", ".pt")
_NAMED = ("resnet", "vit")
_TIMM = (*_NAMED, "scaled_vit", "swin")
_ALL = (*_TIMM, "conv_vit")
FORMATS = {
    "torchvision": Format(
        _TORCH,
        _NAMED,
        torch_file(torchvision_state),
        "model.load_state_dict(torch.load('OUT'), strict=False)  # no headOPTIONS",
    ),
    "timm": Format(_TORCH, _TIMM, torch_file(timm_state), "timm.create_model(...OPTIONS, num_classes=0, checkpoint_path='OUT')"),
    "safetensors": Format(
        (".safetensors",), _ALL, write_safetensors, "model.load_state_dict(safetensors.torch.load_file('OUT'))  # no headOPTIONS"
    ),
    "detectron2": Format((".pkl",), ("resnet",), write_detectron2, "MODEL.WEIGHTS OUT"),
    "detectron2-fpn": Format(_TORCH, ("resnet",), torch_file(detectron2_fpn_state), "MODEL.WEIGHTS OUT"),
    "mmseg": Format(_TORCH, _NAMED, torch_file(mmseg_state), "init_cfg=dict(type='Pretrained', checkpoint='OUT')OPTIONS"),
    "mmdet": Format(_TORCH, _NAMED, torch_file(mmdet_state), "init_cfg=dict(type='Pretrained', checkpoint='OUT')OPTIONS"),
    "huggingface": Format((), _TIMM, write_huggingface, "timm.create_model('local-dir:OUT', pretrained=True)"),
    "onnx": Format((".onnx",), _ALL, write_onnx, "onnxruntime.InferenceSession('OUT')"),
}
