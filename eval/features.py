"""Frozen backbones and their features: load any checkpoint, run it over a data set."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from fastssl.batch import ImageBatch, Views
from fastssl.checkpoint import FORMAT, CheckpointError
from fastssl.models.backbones import ARCHITECTURES, build_backbone
from fastssl.models.features import Backbone

KNOWN = (
    "a run's checkpoint_last.pt or backbone.safetensors, a state dict of torchvision's ResNets or timm's ViTs (.pt, .pth or "
    ".safetensors), or random:ARCH[:SEED]"
)


@dataclass
class Bank:
    """Features of this rank's n images."""

    features: Tensor
    """float32 [n, D], as the backbone gave them."""
    labels: Tensor | None
    """int64 [n]; None for unlabelled images."""
    index: Tensor
    """int64 [n]: sample ids, unique over all ranks."""

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Tensor | slice) -> Bank:
        labels = None if self.labels is None else self.labels[rows]
        return Bank(self.features[rows], labels, self.index[rows])


def load_backbone(
    checkpoint: str, *, arch: str | None = None, network: Literal["auto", "online", "target"] = "auto"
) -> tuple[Backbone, dict[str, object]]:
    """The backbone of `checkpoint` in eval mode on the CPU, and what it is.

    checkpoint  one of `KNOWN`
    arch        the architecture expected; None takes the one whose names and shapes the weights have
    network     which network of a training checkpoint; auto: the one that its method is evaluated by

    The description has: source (run, weights, random), arch, method, step (None where unknown), network, dropped (names of
    the weights that were not used).  CheckpointError when the file is missing, unreadable, or fits no backbone exactly.
    """
    about: dict[str, object] = {"source": "weights", "arch": arch, "method": None, "step": None, "network": "online", "dropped": []}
    if checkpoint.startswith("random:"):
        return _random(checkpoint, arch, about)
    path = Path(checkpoint)
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint at {path}. Give {KNOWN}.")
    saved, metadata = _read(path)
    if "format" in saved:
        state = _of_run(path, saved, network, about)
    else:
        if network == "target":
            raise CheckpointError(f"{path} holds one network only. Ask for the online one, or give the run's checkpoint_last.pt.")
        state = saved
        about["dropped"] = sorted(name for name in state if name.startswith(("fc.", "head.")))
        about["step"] = int(metadata["step"]) if "step" in metadata else None
    state = {name: t for name, t in state.items() if name not in about["dropped"]}
    about["arch"] = _architecture(path, state, arch)
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
                return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError, UnpicklingError) as error:
        raise CheckpointError(
            f"{path} cannot be read as weights ({str(error).splitlines()[0] if str(error) else type(error).__name__}): it is cut short, "
            f"or holds more than tensors and plain values. Give {KNOWN}."
        ) from error
    if not isinstance(saved, dict) or not ("format" in saved or all(isinstance(v, Tensor) for v in saved.values())):
        what = f"a dictionary of {', '.join(map(str, list(saved)[:6]))}" if isinstance(saved, dict) else f"a {type(saved).__name__}"
        raise CheckpointError(f"{path} holds {what}, not weights by name. Give {KNOWN}.")
    return saved, {}


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
    about |= {"source": "run", "network": network, "method": saved["method"], "step": saved["step"]}
    return {name.removeprefix(prefix): t for name, t in saved["model"].items() if name.startswith(prefix)}


def _architecture(path: Path, state: dict[str, Tensor], expected: str | None) -> str:
    """Name of the backbone with exactly these names and shapes.

    Counters of BatchNorm steps may be absent: files older than the counters have none.
    """
    problems = {}
    for arch in ARCHITECTURES:
        with torch.device("meta"):
            want = build_backbone(arch, image_size=_table_size(state)).state_dict()
        missing = sorted(n for n in want.keys() - state.keys() if not n.endswith("num_batches_tracked"))
        unexpected = sorted(state.keys() - want.keys())
        reshaped = [n for n in want.keys() & state.keys() if want[n].shape != state[n].shape]
        problems[arch] = (missing, unexpected, reshaped)
    fitting = [arch for arch, lists in problems.items() if not any(lists)]
    if fitting and expected in (None, fitting[0]):
        return fitting[0]
    if fitting:
        raise CheckpointError(f"{path} holds a {fitting[0]}, not the {expected} asked for. Ask for {fitting[0]}, or give another file.")
    nearest = expected if expected in problems else min(problems, key=lambda a: sum(map(len, problems[a])))
    shown = "; ".join(
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in zip(("missing", "unexpected", "of another shape"), problems[nearest], strict=True)
        if names
    )
    raise CheckpointError(f"{path} fits no backbone exactly. Closest is {nearest}: {shown}. Give {KNOWN}.")


def _table_size(state: dict[str, Tensor]) -> int:
    """Pixels a side of the images whose patches a ViT's position table counts; 224 for other weights."""
    table, patches = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    if table is None or patches is None or table.dim() != 3 or patches.dim() != 4:
        return 224
    side = math.isqrt(max(table.shape[1] - 1, 0)) * patches.shape[-1]
    return side if side >= 16 else 224  # the largest patches are 16 pixels


def _filled(path: Path, arch: str, state: dict[str, Tensor]) -> Backbone:
    backbone = build_backbone(arch, image_size=_table_size(state))
    counters = {n: t for n, t in backbone.state_dict().items() if n.endswith("num_batches_tracked")}
    backbone.load_state_dict(counters | state)
    if not all(bool(t.isfinite().all()) for t in backbone.state_dict().values()):
        raise CheckpointError(f"{path} holds weights that are not finite: the run diverged. Evaluate an earlier checkpoint.")
    return backbone.eval()


@torch.no_grad()
def extract(
    backbone: nn.Module, loader: Iterable[ImageBatch], augment: Callable[[ImageBatch], Views], dtype: torch.dtype, *, what: str = "features"
) -> Bank:
    """Pooled features of every image of this rank's `loader`, by `backbone` in eval mode.

    dtype   autocast type of the forward pass; float32 and float64 run without autocast
    what    label of the progress bar, which rank 0 shows on a terminal

    The training mode of every submodule is put back afterwards, and no buffer changes: a live network can be passed.
    """
    device = next(backbone.parameters()).device
    modes = {module: module.training for module in backbone.modules()}
    features, labels, index = [], [], []
    try:
        backbone.eval()
        with torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            for batch in _progress(loader, what):
                (images,) = augment(batch).per_view()
                features.append(backbone(images).pooled.float())
                if batch.label is not None:
                    labels.append(batch.label.clone())
                index.append(batch.index.clone())
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not index:
        none = torch.empty(0, dtype=torch.int64, device=device)
        return Bank(torch.empty(0, backbone.num_features, device=device), none, none)
    return Bank(torch.cat(features), torch.cat(labels).long() if labels else None, torch.cat(index))


def _progress(loader: Iterable[ImageBatch], what: str) -> Iterable[ImageBatch]:
    main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    return tqdm(loader, desc=what, unit="batch", leave=False, disable=not (main and sys.stderr.isatty()))
