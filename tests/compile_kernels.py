"""Compile the augmentation's and the optimizers' kernels for a compute capability, without a GPU:  python -m tests.compile_kernels 90

Prints the registers and spilled bytes of a thread: what to look at before a change of tile sizes is timed on a GPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastssl.augment import fused
from fastssl.augment.fused.draws import SAMPLES, draw_kernel
from fastssl.optim import momentum_kernel, scale_kernel
from fastssl.optim.tables import BLOCK

# Types of the kernels' arguments, in the names they share.
TYPES = {
    "*u16": "mid",
    "*u8": "pixels",
    "*i64": "offset order orders key tensors weights grads buffers sizes owners starts firsts",
    "*i32": "pitch height width",
    "*i1": "flips bicubic whole jitter grey solarize",
    "*fp32": "sums boxes brightness contrast saturation hue sigma mean std table factors parts roots scales found_inf",
    "*fp64": "limits",
    "fp32": "decay momentum lr",
    "i32": "batch all_views first_view seed epoch",
}
TYPE = {name: kind for kind, names in TYPES.items() for name in names.split()}
VIEWS = {"VIEWS": 2, "SIZE": 224, "CHANNELS_LAST": True}
TILES = {"TILE": fused.TILE, "CHUNK": fused.CHUNK, "SPLIT": None}
KERNELS = (
    (fused.crop_kernel, {**VIEWS, **TILES, "JITTER": True, "BLUR": True}),
    (fused.crop_kernel, {**VIEWS, **TILES, "JITTER": False, "BLUR": False}),
    (fused.colour_kernel, {**VIEWS, "TILES": 49, "BLOCK": fused.BLOCK, "BLUR": True, "SUMS": 64}),
    (fused.weights_kernel, {"SIZE": 224, "TAPS": 16, "LINES": fused.LINES}),
    (fused.blur_kernel, {**VIEWS, **TILES, "TAPS": 16}),
    (draw_kernel, {"STREAM": 2, "LIMITS": 14, "BLOCK": SAMPLES}),
    (scale_kernel.scale_kernel, {"DTYPE": scale_kernel.DTYPES[torch.float32], "BLOCK": BLOCK}),
    (momentum_kernel.squares_kernel, {"BLOCK": BLOCK}),
    (momentum_kernel.roots_kernel, {"ROUNDS": 256, "BLOCK": momentum_kernel.PARTS}),
    (momentum_kernel.step_kernel, {"SKIPS": True, "BLOCK": BLOCK}),
)


def main() -> None:
    capability = int(sys.argv[1])
    target = GPUTarget("cuda", capability, 32)
    # What the engine and the augmentation take there.
    types, choices = TYPE | {"out": "*bf16" if capability >= 80 else "*fp16"}, {"SPLIT": capability >= 75}
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for kernel, given in KERNELS:
        names, constants = kernel.arg_names, given | {name: choices[name] for name in given if name in choices}
        signature = {name: "constexpr" if name in constants else types[name] for name in names}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(names)
            if signature[n][0] == "*" and not kernel.params[i].do_not_specialize
        }
        source = ASTSource(kernel, signature, constexprs={(names.index(k),): v for k, v in constants.items()}, attrs=aligned)
        compiled = triton.compile(source, target=target, options={"num_warps": fused.WARPS if "TILE" in constants else 4})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
        print(f"{kernel.fn.__name__} compiled: {registers} registers, {stack} bytes spilled, {compiled.metadata.shared} bytes shared")


if __name__ == "__main__":
    main()
