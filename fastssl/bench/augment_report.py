"""What the augmentation bench found: numbers as JSON, a table, and in one line what binds.  Units are part of every key."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import textwrap
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from fastssl.bench.augment_rivals import RIVALS
from fastssl.bench.augment_work import PER, SOURCE
from fastssl.bench.machine import device_name, slug
from fastssl.bench.parity import Error
from fastssl.checkpoint import versions

if TYPE_CHECKING:
    from fastssl.bench.augment import Contestant, Row

OURS = {"triton": "fastssl, Triton kernels", "numba": "fastssl, numba kernels", "torch": "fastssl, torch operations"}
_NEAR = 0.85
"""From this share of the time on, the host's launches or the memory bind."""
_RESOLVED = 0.02
"""A fused operation that takes less than this share of the crop that it came with gets no rate and no ratio: it is noise."""
_PAGE = 150
"""Characters of a line of text."""
NOTES = (
    "Ours: a crop is handed out flipped, normalised and cast; a colour operation is fused with it and costs what the crop takes longer "
    "with it; a recipe includes the draws. Others: decoded images or ready crops in; only recipes end with normalised views.",
    "Floor: every image (of a single operation: every crop) read once as bytes and every view written once, at the rate of a copy.",
)


# ------------------------------------------------------------------------------------------------ numbers


def result(
    rows: list[Row], errors: dict[str, Error], step: dict | str, device: torch.device, dtype: torch.dtype, copy_rate: float, setting: dict
) -> dict:
    """All that is written to JSON but the command."""
    described = [_row(row, errors, copy_rate) for row in rows]
    packages = ("torchvision", "triton", "numba", "numpy", "pillow", "kornia", "nvidia-dali-cuda120")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(device),
        "device_type": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "source_hw": list(SOURCE),
        **setting,
        "copy_gb_per_s": copy_rate / 1e9,
        "titles": {**OURS, **{name: rival.title for name, rival in RIVALS.items()}},
        "notes": {name: rival.note for name, rival in RIVALS.items()},
        "rows": described,
        "parity_grey_levels": {name: dataclasses.asdict(error) for name, error in errors.items()},
        "step": step if isinstance(step, dict) else None,
        "step_not_measured": step if isinstance(step, str) else None,
        "binds": binds(described, device.type),
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in packages}, **versions()},
    }


def _row(row: Row, errors: dict[str, Error], copy_rate: float) -> dict:
    name = row.task.name
    floor_bytes = (row.read_bytes + row.written_bytes) * PER / row.views
    floor_ms = 1e3 * floor_bytes / copy_rate
    error = errors.get(name)
    first = row.contestants[0]
    ours = [PER / first.views * t.ms for t in first.times] if first.name in OURS and _resolved(first) else None
    return {
        "name": name,
        "kind": "recipe" if row.task.is_recipe else "operation",
        "sizes": row.sizes,
        "images": row.images,
        "views_per_image": row.views // row.images,
        "floor_mb_per_512_views": floor_bytes / 1e6,
        "floor_ms_per_512_views": floor_ms,
        "results": {one.name: _result(one, row.views, floor_ms, ours) for one in row.contestants},
        "parts_ms_per_batch": {one.name: median(t.ms for t in one.times) for one in row.parts},
        "absent": row.absent,
        "parity_grey_levels": dataclasses.asdict(error) if error else None,
    }


def _result(one: Contestant, views_per_batch: int, floor_ms: float, ours: list[float] | None) -> dict:
    """One contestant.  ours: the product's ms per 512 views, round by round."""
    scale = PER / one.views
    rounds = [scale * t.ms for t in one.times]
    ms = median(rounds)
    return {
        "views_measured": one.views,
        "ms_per_512_views": ms,
        "views_per_s": 1e3 * PER / ms if _resolved(one) else None,
        "ms_per_batch": ms * views_per_batch / PER,
        "host_ms_per_512_views": median(scale * t.host_ms for t in one.times),
        "with_crop_ms_per_512_views": median(scale * t.ms for t in one.whole),
        "time_over_floor": ms / floor_ms,
        # within a round: the machine's drift hits both
        "time_over_ours": median(theirs / our for theirs, our in zip(rounds, ours, strict=True)) if ours else None,
        "ms_per_512_views_rounds": rounds,
    }


def _resolved(one: Contestant) -> bool:
    return median(t.ms for t in one.times) > _RESOLVED * median(t.ms for t in one.whole)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def binds(rows: list[dict], device_type: str) -> str:
    """For each recipe, what our implementation is bound by."""
    return "; ".join(f"{row['name']}: {_binds(row, device_type)}" for row in rows if row["kind"] == "recipe")


def _binds(row: dict, device_type: str) -> str:
    name, best = next(iter(row["results"].items()))
    ms, host, floor = best["ms_per_512_views"], best["host_ms_per_512_views"], best["time_over_floor"]
    if device_type == "cuda" and host >= _NEAR * ms:
        return f"launching from the host ({host:.2f} of {ms:.2f} ms; the memory floor is {row['floor_ms_per_512_views']:.2f})"
    if floor * _NEAR <= 1:
        return f"memory ({floor:.1f} x the time of a copy)"
    parts = {k: v / best["ms_per_batch"] for k, v in row["parts_ms_per_batch"].items()}
    parts["colours"] = 1 - sum(parts.values())
    shares = ", ".join(f"{part} {share:.0%}" for part, share in sorted(parts.items(), key=lambda item: -item[1]))
    return f"{name}'s own work, at {floor:.1f} x the memory floor ({shares} of the time)"


# ------------------------------------------------------------------------------------------------ the table


def table(result: dict) -> str:
    """The result for a terminal."""
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["results"]))
    height, width = result["source_hw"]
    per_core = ", 1 thread, CPU time: rates are per core" if result["device_type"] == "cpu" else ""
    rounds = f"medians of {result['rounds']} alternating rounds of {result['seconds']:g} s"
    lines = [
        f"{result['device']}{per_core}; views as {result['dtype']}; copies move {result['copy_gb_per_s']:,.0f} GB/s",
        f"{result['images']} random images of {width} x {height}, {rounds}",
        "",
        f"ms per {PER} views (ours: x the memory floor; the others: x ours); error: ours against Pillow, in grey levels of 255",
        f"{'':20}{'floor':>7}" + "".join(f"{name:>19}" for name in names) + f"{'mean':>8}{'max':>6}",
    ]
    lines += [_ms_line(row, names) for row in result["rows"]]
    lines += ["", "views per second", f"{'':27}" + "".join(f"{name:>19}" for name in names)]
    lines += [f"{row['name']:27}" + "".join(_rate(row["results"].get(name)) for name in names) for row in result["rows"]]
    lines += ["", *_recipes(result["rows"])]
    rest = {k: v for k, v in result["parity_grey_levels"].items() if k not in {row["name"] for row in result["rows"]}}
    if rest:
        lines += ["", *_text("Errors of the rest: " + "; ".join(f"{k} {v['mean']:.2f} mean, {v['max']:.1f} max" for k, v in rest.items()))]
    lines += ["", *_legend(result, names), *(line for note in NOTES for line in _text(note)), ""]
    return "\n".join([*lines, *_text(_step(result)), *_text(f"What binds: {result['binds']}.")])


def _text(sentence: str) -> list[str]:
    return textwrap.wrap(sentence, _PAGE)


def _ms_line(row: dict, names: list[str]) -> str:
    cells = ""
    for place, name in enumerate(names):
        one = row["results"].get(name)
        ratio = one and (one["time_over_floor"] if place == 0 else one["time_over_ours"])
        nothing = "in the crop" if name in OURS else "-"
        cells += f"{nothing:>19}" if one is None else f"{one['ms_per_512_views']:10,.2f}" + (f"({ratio:,.1f})" if ratio else "").rjust(9)
    error = row["parity_grey_levels"]
    end = f"{error['mean']:8.2f}{error['max']:6.1f}" if error else f"{'-':>8}{'-':>6}"
    return f"{row['name']:20}{row['floor_ms_per_512_views']:7.2f}{cells}{end}"


def _rate(one: dict | None) -> str:
    return f"{'-' if one is None or one['views_per_s'] is None else format(one['views_per_s'], ',.0f'):>19}"


def _recipes(rows: list[dict]) -> list[str]:
    """Whole batches, and what our time for them is made of."""
    lines = []
    for row in (r for r in rows if r["kind"] == "recipe"):
        name, ours = next(iter(row["results"].items()))
        parts = ", ".join(f"{part} {ms:.2f}" for part, ms in row["parts_ms_per_batch"].items())
        times = f"{ours['ms_per_batch']:.2f} ms per batch of {row['images']} ({parts}), {ours['ms_per_512_views']:.2f} per {PER} views"
        lines.append(f"{row['name']}: {row['sizes']}: {name} {times}")
    return lines


def _legend(result: dict, names: list[str]) -> list[str]:
    notes, absent = result["notes"], {}
    for row in result["rows"]:
        for name, why in row["absent"].items():
            absent.setdefault((name, why), []).append(row["name"])
    lines = [f"  {name:19}{result['titles'][name]}" + (f": {notes[name]}" if name in notes else "") for name in names]
    for (name, why), tasks in absent.items():
        where = "not measured" if len(tasks) == len(result["rows"]) else f"not measured for {', '.join(tasks)}"
        lines.append(f"  {name:19}{where}: {why}")
    return lines


def _step(result: dict) -> str:
    step = result["step"]
    if step is None:
        return f"Share of a training step: not measured ({result['step_not_measured']})."
    how = f"{step['preset']}, {step['images']} images x {step['views']} x {step['size']}, {step['dtype']}, "
    how += "compiled" if step["compiled"] else "not compiled"
    alone = f"{step['augment_ms']:.2f} of {step['step_ms']:.1f} ms = {step['share_of_step']:.1%}"
    both = f"with it the step takes {step['step_and_augment_ms']:.1f} ms ({step['added_to_step']:+.1%})"
    return f"Share of a training step ({how}): {alone}; {both}."


# ------------------------------------------------------------------------------------------------ files


def file(out: Path, device: torch.device) -> Path:
    """The JSON file for --out, which is that file or a folder."""
    if out.suffix == ".json":
        return out
    return out / f"augment_{slug(device_name(device))}.json"
