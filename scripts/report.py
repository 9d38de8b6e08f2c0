"""What this environment can do, in a dozen lines:  python -m scripts.report  (`make report`, and the end of `make setup`).

For everything that does not work it prints the line that would make it work.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import sysconfig
from pathlib import Path

APT_FFCV = "sudo apt-get install -y g++ pkg-config libopencv-dev libturbojpeg0-dev {python}-dev && make setup"
CONDA_FFCV = "conda install -c conda-forge compilers pkg-config opencv libjpeg-turbo && make setup"
APT_COMPILER = "sudo apt-get install -y g++ {python}-dev"


def python_dev() -> str:
    return f"python{sys.version_info.major}.{sys.version_info.minor}"


def device() -> tuple[str, str]:
    """What torch computes on, and the line to run when a GPU is there that this torch cannot use."""
    import torch

    older, built = "make setup TORCH=2.7.1", f"this torch is built for CUDA {torch.version.cuda}"
    if not torch.cuda.is_available():
        if Path("/dev/nvidiactl").exists():
            return f"a GPU that torch does not reach ({built})", f"a newer NVIDIA driver, or: {older}"
        return f"CPU only ({built})", ""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    text = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    major, minor = torch.cuda.get_device_capability(0)
    oldest = min(int(re.sub(r"\D", "", arch)) for arch in torch.cuda.get_arch_list())
    if 10 * major + minor < oldest:
        return f"{text}, too old for this torch ({built}, kernels from sm_{oldest})", older
    return f"{text} (CUDA {torch.version.cuda})", ""


def compiler() -> tuple[str, str]:
    """Whether torch.compile can build its kernels."""
    missing = [] if shutil.which("g++") or shutil.which("clang++") else ["g++"]
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        missing.append("Python.h")
    if missing:
        return f"off: no {' and no '.join(missing)}", APT_COMPILER.format(python=python_dev())
    return "usable", ""


def ffcv() -> tuple[str, str]:
    from loaders.ffcv import load

    problem = load()
    if not problem:
        return "usable", ""
    return f"off: {problem}", f"{APT_FFCV.format(python=python_dev())}\n  or, without root: {CONDA_FFCV}"


def dali() -> tuple[str, str]:
    from loaders.dali import load

    problem = load()
    if problem:
        return f"off: {problem}", "rm -rf .venv && make setup"
    import torch

    return ("usable" if torch.cuda.is_available() else "usable, on the CPU"), ""


def torchvision_cuda() -> tuple[str, str]:
    import torch

    if not torch.cuda.is_available():
        return "off: no CUDA device", ""
    from loaders.torchvision_cuda import problem_on

    problem = problem_on(torch.device("cuda"))
    return (f"off: {problem}", "") if problem else ("usable", "")


def torchvision() -> tuple[str, str]:
    try:
        import torch
        from torchvision.io import decode_jpeg, encode_jpeg

        decode_jpeg(encode_jpeg(torch.zeros(3, 8, 8, dtype=torch.uint8)))
    except (ImportError, RuntimeError) as error:
        return f"off: {error}", "rm -rf .venv && make setup"
    return "usable", ""


def folder() -> tuple[str, str]:
    try:
        import PIL.features
    except ImportError as error:
        return f"off: {error}", "rm -rf .venv && make setup"
    return ("usable", "") if PIL.features.check("jpg") else ("off: this Pillow has no JPEG", "rm -rf .venv && make setup")


def versions() -> str:
    import torch
    import torchvision

    return f"{platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}"


def main() -> None:
    rows = [
        ("Python", (versions(), "")),
        ("device", device()),
        ("cores", (str(len(os.sched_getaffinity(0))), "")),
        ("torch.compile", compiler()),
        ("loader ffcv", ffcv()),
        ("loader dali", dali()),
        ("loader torchvision", torchvision()),
        ("loader torchvision_cuda", torchvision_cuda()),
        ("loader folder", folder()),
    ]
    for name, (state, line) in rows:
        print(f"{name:<24}{state}")
        if line:
            print(f"  to change that:  {line}")


if __name__ == "__main__":
    main()
