"""What the loader bench found: the numbers as JSON, as a table, and in one line what binds.  Units are part of every key."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from fastssl.bench import yardsticks as known
from fastssl.bench.clock import Rate
from fastssl.bench.machine import cpu_name, slug
from fastssl.checkpoint import versions

_NEAR = 0.85
"""From this share of a ceiling, or of the threads' time, on, that ceiling binds."""
_STALLED = 0.1
"""From this share of a cold pass on, the disk binds."""
OURS = "decoded images and the boxes of all views; crops and colours run on the device"


# ------------------------------------------------------------------------------------------------ numbers


def series(rates: Sequence[Rate], threads: int) -> dict:
    """Medians of the rounds, and the rounds."""
    images, cpu = [r.images_per_s for r in rates], [r.cpu_ms_per_image for r in rates]
    return {
        "images_per_s": median(images),
        "images_per_s_per_thread": median(images) / threads,
        "cpu_ms_per_image": median(cpu),
        "images_per_s_rounds": images,
        "cpu_ms_per_image_rounds": cpu,
    }


def cold(rates: Sequence[Rate], again: Sequence[Rate], mean_bytes: float, threads: int) -> dict:
    """Passes from the disk, next to the same passes from memory."""
    stalled = [1 - c.images_per_s / w.images_per_s for c, w in zip(rates, again, strict=True)]
    return {
        **series(rates, threads),
        "megabytes_per_s": median(r.images_per_s for r in rates) * mean_bytes / 1e6,
        "same_pass_from_memory_images_per_s": median(r.images_per_s for r in again),
        "stalled_share": max(0.0, median(stalled)),
    }


def yardstick(name: str, workers: int, rates: Sequence[Rate], startup_s: float) -> dict:
    """One yardstick; its ratios to ours are added by `result`."""
    return {
        "name": name,
        "title": known.TITLES[name],
        "delivers": known.DELIVERS[name],
        "workers": workers,
        "startup_s": startup_s,
        **series(rates, max(1, workers)),
    }


def result(*, origin: str, forms: list[dict], unusable: dict, yardsticks: list[dict], failed: dict, setting: dict) -> dict:
    """All that is written to JSON."""
    name = reference(forms[0])
    ours = forms[0]["backends"][name]["warm"]
    for row in yardsticks:
        # Within a round: the machine's drift hits both.
        cpu = zip(row["cpu_ms_per_image_rounds"], ours["cpu_ms_per_image_rounds"], strict=True)
        rate = zip(ours["images_per_s_rounds"], row["images_per_s_rounds"], strict=True)
        row["cpu_time_of_ours"] = median(theirs / our for theirs, our in cpu)
        row["rate_of_ours_to_this"] = median(our / theirs for our, theirs in rate)
    packages = ("torch", "torchvision", "numpy", "numba", "tbb", "ffcv", "nvidia-dali-cuda120", "pillow")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "origin": origin,
        **setting,
        "forms": forms,
        "unusable_backends": unusable,
        "reference": {"form": forms[0]["name"], "backend": name, "delivers": OURS},
        "yardsticks": yardsticks,
        "yardsticks_not_measured": failed,
        "binds": binds(forms, setting["threads"]),
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in packages}, **versions()},
    }


def reference(form: dict) -> str:
    """The back end that the yardsticks are compared with: the one that training takes by itself."""
    return next(name for name in ("ffcv", *form["backends"]) if name in form["backends"])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# ------------------------------------------------------------------------------------------------ what binds


def binds(forms: list[dict], threads: int) -> str:
    """For each stored form, what its fastest back end is bound by, from memory and from the disk."""
    return "; ".join(f"{form['name']}: {_binds(form, threads)}" for form in forms)


def _binds(form: dict, threads: int) -> str:
    name, best = max(form["backends"].items(), key=lambda item: item[1]["warm"]["images_per_s"])
    warm, disk, bound = best["warm"], best["cold"], form["ceiling"]
    busy = warm["images_per_s"] * warm["cpu_ms_per_image"] / 1e3 / threads
    if bound and warm["share_of_ceiling"] >= _NEAR:
        what = "memory copy" if form["kind"] == "raw" else "JPEG decoding"
        text = f"{what} ({name} at {warm['share_of_ceiling']:.0%} of {bound['what']})"
    elif busy < _NEAR:
        text = f"waiting, not work ({name}'s threads are busy {busy:.0%} of the time)"
    elif bound:
        more = f"{warm['cpu_ms_per_image']:.2f} ms of CPU time per image, {bound['what']} {bound['cpu_ms_per_image']:.2f}"
        text = f"{name}'s own work ({more})"
    else:
        text = f"CPU time ({name}'s threads are busy {busy:.0%} of the time; no ceiling was measured)"
    if disk is None:
        return text
    if disk["stalled_share"] > _STALLED:
        return f"{text}, cold: the disk ({disk['stalled_share']:.0%} of the time, at {disk['megabytes_per_s']:,.0f} MB/s)"
    return f"{text}, cold: the same (the disk gives {disk['megabytes_per_s']:,.0f} MB/s and more)"


# ------------------------------------------------------------------------------------------------ the table


def table(result: dict) -> str:
    """The result for a terminal."""
    rounds = f"medians of {result['rounds']} alternating rounds of {result['seconds']:g} s"
    lines = [
        f"{result['origin']}; {result['threads']} threads on {result['cores']} cores of {result['cpu']}, device {result['device']};",
        rounds,
        "",
        f"{'':32}{'images/s':>10}{'lowest - highest':>19}{'per thread':>12}{'of bound':>10}{'CPU ms':>8}"
        f"{'cold images/s':>15}{'MB/s':>7}{'stalled':>9}",
    ]
    for form in result["forms"]:
        size = f"{form['samples']:,} samples of {form['mean_kb']:.1f} KB, {form['mean_megapixels']:.3f} megapixels, batch {form['batch']}"
        lines.append(f"{form['name']}: {size}")
        for name, row in form["backends"].items():
            lines.append(f"  {'loader, ' + name:30}" + _columns(row["warm"], row["warm"]["share_of_ceiling"]) + _cold_columns(row["cold"]))
        if form["ceiling"]:
            lines.append(f"  {form['ceiling']['what']:30}" + _columns(form["ceiling"], 1.0))
        else:
            lines.append(f"  no bound: {form['no_ceiling']}")
    lines += result["unusable_backends"].values()
    lines += ["", *_page_cache(result["forms"]), "", *_yardsticks(result), "", f"What binds: {result['binds']}."]
    return "\n".join(lines)


def _columns(row: dict, share: float | None) -> str:
    rounds = row["images_per_s_rounds"]
    spread = f"{min(rounds):,.0f} - {max(rounds):,.0f}"
    of_bound = "" if share is None else f"{share:.1%}"
    return f"{row['images_per_s']:10,.0f}{spread:>19}{row['images_per_s_per_thread']:12,.0f}{of_bound:>10}{row['cpu_ms_per_image']:8.3f}"


def _cold_columns(row: dict | None) -> str:
    return f"{row['images_per_s']:15,.0f}{row['megabytes_per_s']:7,.0f}{row['stalled_share']:9.0%}" if row else f"{'-':>15}{'-':>7}{'-':>9}"


def _page_cache(forms: list[dict]) -> list[str]:
    left = max(form["page_cache"]["resident_share_after"] for form in forms)
    lines = [
        f"Cold: one pass after {forms[0]['page_cache']['how']};",
        f"at most {left:.1%} of a file stayed in memory. Stalled: share of that pass that the same pass from memory does not take.",
    ]
    for form in forms:
        if not form["page_cache"]["dropped"]:
            share = form["page_cache"]["resident_share_after"]
            lines.append(f"{form['name']}: {share:.0%} could not be dropped here, so nothing was measured cold.")
    return lines


def _yardsticks(result: dict) -> list[str]:
    reference = result["reference"]
    ours = next(f for f in result["forms"] if f["name"] == reference["form"])["backends"][reference["backend"]]["warm"]
    lines = [
        f"CPU time that a source image costs the loader, for {result['views']} views of it ({reference['form']}):",
        f"  {'':52}{'images/s':>10}{'CPU ms':>9}{'of ours':>9}  delivers",
        f"  {'fastssl, ' + reference['backend']:52}{ours['images_per_s']:10,.0f}{ours['cpu_ms_per_image']:9.2f}{'1.0 x':>9}  {OURS}",
    ]
    for row in result["yardsticks"]:
        threads = f", {row['workers']} {'workers' if row['name'] == 'pillow' else 'threads'}"
        times = f"{row['cpu_time_of_ours']:.1f} x"
        numbers = f"{row['images_per_s']:10,.0f}{row['cpu_ms_per_image']:9.2f}{times:>9}"
        lines.append(f"  {row['title'] + threads:52}{numbers}  {row['delivers']}")
    lines += [f"  {known.TITLES[name]}: not measured ({reason})" for name, reason in result["yardsticks_not_measured"].items()]
    return lines


# ------------------------------------------------------------------------------------------------ files


def file(out: Path) -> Path:
    """The JSON file for --out, which is that file or a folder."""
    if out.suffix == ".json":
        return out
    return out / f"loader_{len(os.sched_getaffinity(0))}cores_{slug(cpu_name())}.json"
