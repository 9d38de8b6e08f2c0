"""Kinds of the names that weights get in other libraries: key maps of the official conversion scripts."""

from __future__ import annotations

import numpy as np

from convert.exports import detectron2_pickle
from fastssl.models.keymaps import detectron2, detectron2_c4, detectron2_fpn, mmseg_vit
from tests.golden.kind import Arrays, Kind

TRUNK = {"c4": detectron2_c4, "fpn": detectron2_fpn}


def mapped(names: np.ndarray, rule) -> np.ndarray:
    return np.array([rule(str(name)) for name in names])


def suffix_matches(weights: list[str], model: list[str]) -> set[str]:
    """Names of `model` that Detectron2's checkpointer fills from a pickle: each from the weight that is its longest dotted suffix."""
    return {name for name in model if any(name == w or name.endswith(f".{w}") for w in weights)}


def keymap(arrays: Arrays) -> Arrays:
    out: Arrays = {}
    for prefix, rule in (("moco", detectron2), ("w2pkl", detectron2), ("w2pth", detectron2_fpn), ("vit_mmseg", mmseg_vit)):
        if f"{prefix}_src" in arrays:
            out[f"{prefix}_dst"] = mapped(arrays[f"{prefix}_src"], rule)
    if "moco_top" in arrays:
        (author,) = (line.removeprefix("__author__=") for line in arrays["moco_top"] if line.startswith("__author__="))
        entries = detectron2_pickle({}, author).items()
        out["moco_top"] = np.array(sorted(f"{name}={value}" for name, value in entries if name != "model"))
    sources = next(arrays[name] for name in ("moco_src", "w2pkl_src", "w2pth_src") if name in arrays)
    trunk = [str(name) for name in sources if not str(name).startswith("fc")]
    for loaded in (name for name in arrays if name.endswith("_loaded") and not name.endswith("_not_loaded")):
        detector = loaded.removesuffix("_loaded")
        model = [str(name) for name in (*arrays[loaded], *arrays[f"{detector}_not_loaded"])]
        filled = suffix_matches([detectron2(name) for name in trunk], model)
        # What the pickle fills by its suffixes is what the detector's own names of the trunk say.
        assert filled == {TRUNK[detector.split("_")[0]](name) for name in trunk}
        assert len(filled) == len(trunk)
        out[loaded] = np.array(sorted(filled))
        out[f"{detector}_not_loaded"] = np.array(sorted(set(model) - filled))
    return out


def d2keys(arrays: Arrays) -> Arrays:
    ours = [str(name).removeprefix("module.base_encoder.") for name in arrays["source_keys"]]
    return {"fpn_pth_keys": mapped(np.array(ours), detectron2_fpn), "matching_pkl_keys": mapped(np.array(ours), detectron2)}


KINDS = {
    "transfer/keymap": Kind(keymap, ("*_src",)),
    "w2ssl/d2keys": Kind(d2keys, ("source_keys",)),
}
