"""Backbones from files: a run's checkpoint, weights by torchvision's or timm's names, other projects' files; and random ones."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fastssl.checkpoint import FORMAT, CheckpointError
from fastssl.models.backbones import ARCHITECTURES, MOCOV3_VITS, SWINS, VITS, build_backbone
from fastssl.models.features import Backbone
from fastssl.models.official import Network, find_backbone, is_state

KNOWN = (
    "a run's checkpoint_last.pt or backbone.safetensors, a state dict of torchvision's ResNets and ViTs or timm's ViTs and Swins (.pt, "
    ".pth or .safetensors), a checkpoint that DINO, iBOT, SERE, SCFS, LEWEL, BYOL-EMAN, SFRIK, VICReg, W2SSL, MoCo v2 or v3 or MAE "
    "wrote, or random:ARCH[:SEED]"
)


HUB = ("model.safetensors", "pytorch_model.bin")
"""Weights beside a config.json that timm or an export of ours wrote."""


def load_backbone(checkpoint: str, *, arch: str | None = None, network: Network = "auto") -> tuple[Backbone, dict[str, object]]:
    """The backbone of `checkpoint` in eval mode on the CPU, and what it is.

    checkpoint  one of `KNOWN`
    arch        the architecture expected; None takes the one whose names and shapes the weights have
    network     which network of a training checkpoint; auto: the one that its method is evaluated by

    The description has: source (run, weights, random), arch, network, dropped (the weights that were not used by name, and why
    not), and, None where unknown, method, preset, step and normalisation (mean and std of the images).  CheckpointError when the
    file is missing, unreadable, or fits no backbone exactly.
    """
    about: dict[str, object] = {"source": "weights", "arch": arch, "network": "online", "dropped": {}}
    about |= dict.fromkeys(("method", "preset", "step", "normalisation"))
    if checkpoint.startswith("random:"):
        return _random(checkpoint, arch, about)
    path = Path(checkpoint)
    if path.is_dir():
        held = ", ".join(sorted(str(p) for suffix in ("pt", "pth", "safetensors", "bin") for p in path.glob(f"*.{suffix}")))
        raise CheckpointError(f"{path} is a folder. Give a file{f' in it: {held}' if held else f': {KNOWN}'}.")
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint at {path}. Give {KNOWN}.")
    saved, metadata = _read(path)
    if not is_state(saved) and ("run_as" in saved or "identity" in saved):
        what = f"what an evaluation made ({saved['run_as']})" if "run_as" in saved else "the state of an unfinished evaluation"
        heads = ", and this file to eval.linear --eval-only --head" if "about" in saved else ""
        raise CheckpointError(f"{path} is {what}, and no checkpoint of a backbone. Give the one that was evaluated{heads}.")
    if "format" in saved:
        state = _of_run(path, saved, network, about)
        named = saved["config"]["model"]["arch"]
    else:
        held = metadata.get("network")
        if held and network not in ("auto", held):
            raise CheckpointError(f"{path} holds the {held} network only. Give the run's checkpoint_last.pt for the other.")
        state = _of_others(path, saved, "auto" if held else network, about)
        about |= {name: metadata.get(name) for name in ("preset", "method")}
        about["step"] = int(metadata["step"]) if "step" in metadata else None
        if held:
            about["network"] = held
        if "mean" in metadata:
            about["normalisation"] = {name: tuple(map(float, metadata[name].split())) for name in ("mean", "std")}
        named = metadata.get("arch")
    about["arch"] = _architecture(path, state, arch, named)
    return _filled(path, about["arch"], state), about


def _random(name: str, arch: str | None, about: dict) -> tuple[Backbone, dict]:
    _, found, *rest = name.split(":")
    if len(rest) > 1 or not all(s.isdecimal() for s in rest) or found not in ARCHITECTURES or arch not in (None, found):
        raise CheckpointError(
            f"'{name}' is no random backbone. Write random:ARCH or random:ARCH:SEED, ARCH one of {', '.join(ARCHITECTURES)}."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rest[0]) if rest else 0)
        backbone = build_backbone(found)
    return backbone.eval(), about | {"source": "random", "arch": found, "step": 0}


def _read(path: Path) -> tuple[dict, dict]:
    """Contents and metadata of a .safetensors or a torch file."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as f:
                return {name: f.get_tensor(name) for name in f.keys()}, (f.metadata() or {}) | _hub(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # many projects save their arguments beside the weights
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files of torch's old format give errors of any type
        raise CheckpointError(
            f"{path} cannot be read as weights ({str(error).splitlines()[0] if str(error) else type(error).__name__}): it is cut short, "
            f"or holds more than tensors and plain values. Give {KNOWN}."
        ) from error
    if not isinstance(saved, dict):
        raise CheckpointError(f"{path} holds a {type(saved).__name__}, not weights by name. Give {KNOWN}.")
    return saved, _hub(path)


def _hub(path: Path) -> dict[str, str]:
    """What the config.json of a folder for the Hugging Face hub says of the weights, as our metadata has it."""
    config = path.with_name("config.json")
    if path.name not in HUB or not config.is_file():
        return {}
    try:
        said = json.loads(config.read_text())
        images = said.get("pretrained_cfg", {})
        normalisation = {name: " ".join(map(str, images[name])) for name in ("mean", "std") if name in images}
        return normalisation | said.get("fastssl", {})
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{config}, which belongs to {path}, cannot be read ({error}). Copy the folder again.") from error


def _of_others(path: Path, saved: dict, network: Network, about: dict) -> dict[str, Tensor]:
    """The backbone's part of a file that is no training checkpoint of ours."""
    try:
        found = find_backbone(saved, network)
    except LookupError:
        raise CheckpointError(f"{path} holds one network only. Ask for the online one, or give the run's checkpoint_last.pt.") from None
    if found is None:
        raise CheckpointError(f"{path} holds a dictionary of {', '.join(map(str, list(saved)[:6]))}, not weights by name. Give {KNOWN}.")
    about |= {"network": found.network, "dropped": found.dropped}
    return found.state


def _of_run(path: Path, saved: dict, network: str, about: dict) -> dict[str, Tensor]:
    """The backbone's part of a training checkpoint, names without the prefix."""
    if saved["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has the format {saved['format']}, this version reads {FORMAT}. Evaluate it with the version that wrote it."
        )
    network = saved.get("evaluated", "online") if network == "auto" else network
    prefix = saved["backbone_prefix"] if network == "online" else saved["target_backbone_prefix"]
    if prefix is None:
        raise CheckpointError(f"{path} is of the method {saved['method']}, which has no target network. Ask for the online network.")
    about |= {"source": "run", "network": network, "method": saved["method"], "preset": saved["preset"], "step": saved["step"]}
    if views := saved["config"].get("views"):
        about["normalisation"] = {name: tuple(views[0]["photometric"][name]) for name in ("mean", "std")}
    return {name.removeprefix(prefix): t for name, t in saved["model"].items() if name.startswith(prefix)}


def _architecture(path: Path, state: dict[str, Tensor], expected: str | None, named: str | None) -> str:
    """Name of the backbone with exactly these names and shapes.

    Shapes do not tell the number of attention heads: of several that fit it is the one that the file names, or MoCo v3's if the
    positions are its fixed ones, or the expected one.  Counters of BatchNorm steps may be absent: files older than the counters
    have none.
    """
    problems, size = {}, _image_size(state)
    likely = (named, *(MOCOV3_VITS if _has_mocov3_positions(state) else ()), expected)
    for arch in dict.fromkeys([*(a for a in likely if a in ARCHITECTURES), *ARCHITECTURES]):
        want = _shapes(arch, 224 if arch in SWINS and "pos_embed" in state else size, _layer_scale(arch, state))
        missing = sorted(n for n in want.keys() - state.keys() if not n.endswith("num_batches_tracked"))
        unexpected = sorted(state.keys() - want.keys())
        reshaped = [n for n in want.keys() & state.keys() if want[n] != state[n].shape]
        problems[arch] = (missing, unexpected, reshaped)
        if not any(problems[arch]):
            if expected not in (None, arch):
                raise CheckpointError(f"{path} holds a {arch}, not the {expected} asked for. Ask for {arch}, or give another file.")
            return arch
    nearest = expected if expected in problems else min(problems, key=lambda a: sum(map(len, problems[a])))
    shown = "; ".join(
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in zip(("missing", "unexpected", "of another shape"), problems[nearest], strict=True)
        if names
    )
    raise CheckpointError(f"{path} fits no backbone exactly. Closest is {nearest}: {shown}. Give {KNOWN}.")


@lru_cache
def _shapes(arch: str, image_size: int, layer_scale: float) -> dict[str, torch.Size]:
    """Of the weights by name."""
    with torch.device("meta"):
        return {name: t.shape for name, t in build_backbone(arch, image_size=image_size, layer_scale=layer_scale).state_dict().items()}


def _image_size(state: dict[str, Tensor]) -> int:
    """Pixels a side of the images whose patches a ViT's position table counts, or whose last map is a Swin's smallest window; 224
    for other weights."""
    if (biases := state.get("layers.3.blocks.0.attn.relative_position_bias_table")) is not None:
        return 32 * ((math.isqrt(len(biases)) + 1) // 2)
    table, patches = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    if table is None or table.dim() != 3:
        return 224
    patch_size = patches.shape[-1] if patches is not None and patches.dim() == 4 else 16  # a convolutional stem has 16
    side = math.isqrt(max(table.shape[1] - 1, 0)) * patch_size
    return side if side >= 16 else 224  # the largest patches are 16 pixels


def _layer_scale(arch: str, state: dict[str, Tensor]) -> float:
    """Whether the weights have LayerScale's factors, as a number that builds them."""
    return float("blocks.0.ls1.gamma" in state and arch in (*VITS, *MOCOV3_VITS))


def _has_mocov3_positions(state: dict[str, Tensor]) -> bool:
    table = state.get("pos_embed")
    if (
        table is None
        or table.dim() != 3
        or table.shape[2] % 4
        or (side := math.isqrt(max(table.shape[1] - 1, 0))) ** 2 + 1 != table.shape[1]
    ):
        return False
    from fastssl.models.vit_mocov3 import sincos_positions  # with timm, which takes seconds to load

    return torch.allclose(table.double(), sincos_positions(table.shape[2], side), rtol=0, atol=1e-4)


def _filled(path: Path, arch: str, state: dict[str, Tensor]) -> Backbone:
    options = {"image_size": _image_size(state), "layer_scale": _layer_scale(arch, state)}
    with torch.device("meta"):
        backbone = build_backbone(arch, **options)
    if backbone.state_dict().keys() >= {name for name, _ in backbone.named_buffers()}:
        backbone.to_empty(device="cpu")  # drawing weights that are replaced at once takes longer than reading them
    else:
        backbone = build_backbone(arch, **options)
    counters = {n: torch.zeros_like(t) for n, t in backbone.state_dict().items() if n.endswith("num_batches_tracked")}
    backbone.load_state_dict(counters | state)
    if not all(bool(t.isfinite().all()) for t in backbone.state_dict().values()):
        raise CheckpointError(f"{path} holds weights that are not finite: the run diverged. Evaluate an earlier checkpoint.")
    return backbone.eval()


def output_checksum(backbone: Backbone) -> str:
    """Two numbers of the pooled features of a fixed image, six digits each: equal weights give equal ones, on any machine.

    The image is 64 x 64 waves of the pixel's number; the features, in float64 on the CPU, are weighted with cosines of theirs.
    """
    image = torch.sin(torch.arange(3 * 64 * 64, dtype=torch.float64) * 0.7).view(1, 3, 64, 64)
    training = backbone.training
    with torch.no_grad():
        features = backbone.double().eval()(image).pooled[0]
    backbone.float().train(training)
    weights = torch.cos(torch.arange(len(features), dtype=torch.float64))
    return f"{float(features.norm()):.6g} {float(features @ weights):.6g}"


def weights_digest(backbone: Backbone) -> str:
    """SHA-256 of all weights and their names, whatever file they came from."""
    digest = hashlib.sha256()
    for name, t in sorted(backbone.state_dict().items()):
        digest.update(f"{name} {tuple(t.shape)} {t.dtype}".encode())
        digest.update(t.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
