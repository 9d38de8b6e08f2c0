"""Where the backbone is in the files of other projects: under which entry, behind which prefixes, and what else lies beside it.

file of                            entry                  names of the backbone           evaluated
DINO, iBOT, SERE                   teacher (or student)   [module.]backbone.*             teacher
SCFS                               teacher (or student)   module.backbone.model.*         teacher
LEWEL, BYOL-EMAN                   state_dict             module.online_net.backbone.*    online
MoCo v2                            state_dict             module.encoder_q.*              query
MoCo v3, W2SSL                     state_dict             module.base_encoder.*           online
SFRIK, VICReg                      model                  module.backbone.*               the only one
MAE-style; DeiT exports            model                  no prefix                       the only one
torchvision's ViTs           state_dict, or none    none (class_token, encoder.*)  the only one
iBOT's, SFRIK's backbone; others   state_dict, or none    none, or encoder., trunk.       the only one

Sources: the checkpoint sections of methods/{dino,ibot,sere,scfs,lewel,mocov2,mocov3,w2ssl,sfrik}.md.  Names behind the prefix are
torchvision's (ResNets) or timm's (ViTs).  Inferred, since no spec names them: target_net, encoder_k and momentum_encoder for the
other network of LEWEL, MoCo v2 and MoCo v3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fastssl.models import keymaps

Network = Literal["auto", "online", "target"]

# Of several that occur the first one counts: backbone.model. before backbone., of which it is a part.
ONLINE = ("online_net.backbone.", "base_encoder.", "encoder_q.", "backbone.model.", "backbone.", "encoder.", "trunk.")
TARGET = ("target_net.backbone.", "momentum_encoder.", "encoder_k.")
HEADS = re.compile(r"(fc|heads?|fc_crop|fc_loc|layer\d_head|(channel|pixel)_sere(_local)?)\.|decoder_")
TORCHVISION_VIT = "encoder.layers.encoder_layer_"
"""Of torchvision's ViTs alone: their other names begin with `encoder.`, too, which is no prefix there."""
MASKED = ("masked_embed", "mask_token")


@dataclass
class Found:
    """The backbone in a file."""

    state: dict[str, Tensor]
    """By names without prefixes."""
    network: Literal["online", "target"]
    dropped: dict[str, str]
    """Every other weight of the entry by its name in the file, and what it is."""


def find_backbone(saved: Mapping, network: Network) -> Found | None:
    """The backbone among the contents of a file; None if no entry of it is weights by name.  LookupError without that network."""
    if is_state(saved.get("teacher")) and is_state(saved.get("student")):
        network = "online" if network == "online" else "target"
        entry, prefixes = saved["student" if network == "online" else "teacher"], ONLINE
    else:
        entry = next((saved[key] for key in ("state_dict", "model") if is_state(saved.get(key))), saved)
        network = "target" if network == "target" else "online"
        prefixes = TARGET if network == "target" else ONLINE
    if not is_state(entry):
        return None
    names = {name: name.removeprefix("module.") for name in entry}
    if any(name.startswith(TORCHVISION_VIT) for name in names.values()):
        names = {name: keymaps.from_torchvision_vit(bare) for name, bare in names.items()}
    prefix = next((p for p in prefixes if any(n.startswith(p) for n in names.values())), "")
    if prefixes is TARGET and not prefix:
        raise LookupError("target")
    found = Found({}, network, {})
    for name, bare in names.items():
        if why := _not_of_backbone(bare, prefix):
            found.dropped[name] = why
        else:
            found.state[bare.removeprefix(prefix)] = entry[name]
    return found


def is_state(value: object) -> bool:
    """Whether `value` is weights by name."""
    return isinstance(value, Mapping) and bool(value) and all(isinstance(n, str) and isinstance(v, Tensor) for n, v in value.items())


def _not_of_backbone(name: str, prefix: str) -> str | None:
    if not name.startswith(prefix):
        return "of another network" if name.startswith((*ONLINE, *TARGET)) else f"beside {prefix.rstrip('.')}"
    rest = name.removeprefix(prefix)
    if HEADS.match(rest):
        return "of a head"
    return "for masked patches" if rest in MASKED else None


def left_out(dropped: Mapping[str, str]) -> str:
    """One line: how many weights of each kind were left out, and the first of them."""
    kinds: dict[str, list[str]] = {}
    for name, why in sorted(dropped.items()):
        kinds.setdefault(why, []).append(name)
    return "; ".join(f"{len(names)} {why} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" for why, names in kinds.items())
