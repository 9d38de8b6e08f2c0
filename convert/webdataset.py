"""A .beton as WebDataset shards, and back:  python -m convert.webdataset --source data/imagenet --out data/imagenet-shards

Shards are what streaming tools and DALI's own readers take, and what copies well between object stores; training reads them
as they are.  The images go over byte by byte: there and back again gives the same .beton.  The tars are written and read by
the webdataset library, equal data gives equal bytes, every image is compared with its CRC-32 on the way, and a conversion
that stops leaves nothing behind.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from convert.command import run, say
from convert.outputs import check_existing, check_space, remove_replaced
from convert.progress import Progress, gigabytes
from convert.shard_writer import SAMPLES_PER_SHARD, ShardWriter
from loaders.beton import JPEG, PAGE_SIZE, RAW, Beton, BetonWriter
from loaders.decoder import Samples
from loaders.errors import DataError
from loaders.shards import Shards

_BLOCK, _RECORD = 512, 10_240
"""Bytes that a tar pads each part and itself to."""


def _damaged(samples: Samples, i: int) -> DataError:
    return DataError(
        f"{samples.file(i)} is damaged: the bytes of sample {i} are not those that were written. Copy the file anew if it was copied "
        f"here. {samples.again}"
    )


def _to_shards(beton: Beton, writer: ShardWriter, shown: Progress) -> None:
    n = len(beton)
    names = beton.names or [f"{i:09d}.jpg" for i in range(n)]
    for i in range(n):
        image = beton.sample(i).tobytes()
        crc32 = zlib.crc32(image)
        if beton.crc32 is not None and crc32 != beton.crc32[i]:
            raise _damaged(beton, i)
        label = None if beton.label is None else int(beton.label[i])
        writer.append(image, JPEG, int(beton.height[i]), int(beton.width[i]), label, crc32=crc32, name=names[i])
        shown.update()
    writer.finish(names, beton.classes, beton.source, beton.options)


def _read(tars: Sequence[Path]) -> Iterator[dict[str, bytes]]:
    """The parts of every sample, by the webdataset library.  It takes a path for an address (`#`, `?` and `s3:` mean something
    there), so the tars are opened here."""
    from webdataset.tariterators import group_by_keys, tar_file_expander  # not at the top: it takes seconds, and --help needs none of it

    def opened() -> Iterator[dict[str, object]]:
        for tar in tars:
            with open(tar, "rb") as stream:
                yield {"url": str(tar), "stream": stream}

    return group_by_keys(tar_file_expander(opened()))


def _to_beton(shards: Shards, writer: BetonWriter, shown: Progress) -> None:
    n = 0
    try:
        for parts in _read(shards.tars):
            if n == len(shards) or not _is_sample(shards, n, parts):
                break
            label = None if shards.label is None else int(shards.label[n])
            writer.append(parts["jpg"], JPEG, int(shards.height[n]), int(shards.width[n]), label, crc32=int(shards.crc32[n]))
            shown.update()
            n += 1
        else:
            if n == len(shards):
                writer.finish(shards.names, shards.classes, shards.source, shards.options)
                return
    except (tarfile.TarError, EOFError, ValueError) as e:
        raise DataError(f"A tar of {shards.path} is damaged: it cannot be read on after sample {n} ({e}). {shards.again}") from e
    raise _damaged(shards, min(n, len(shards) - 1))


def _is_sample(shards: Shards, i: int, parts: dict[str, bytes]) -> bool:
    """Whether the parts that were read are those that were written for sample i."""
    labelled = shards.label is None or parts.get("cls") == b"%d" % int(shards.label[i])
    return labelled and zlib.crc32(parts.get("jpg", b"")) == shards.crc32[i]


def _sources(source: Path) -> list[Beton | Shards]:
    """What `source` holds: .beton files or sets of shards, opened and checked."""
    if source.is_file() and source.suffix == ".beton":
        return [Beton.open(source)]
    if not source.is_dir():
        raise DataError(f"There is neither a .beton nor a folder {source}. Give --source what python -m convert.imagenet wrote.")
    betons = sorted(source.glob("*.beton"))
    splits = sorted({match[1] for tar in source.glob("*.tar") if (match := re.fullmatch(r"(.+)-\d{6}\.tar", tar.name))})
    if betons and splits:
        raise DataError(f"{source} holds .beton files and shards. Give one .beton as --source, or move either into a folder of its own.")
    if not betons and not splits:
        raise DataError(f"{source} holds no .beton and no shards. Give --source what python -m convert.imagenet wrote.")
    return [Beton.open(path) for path in betons] or [Shards.open(source, split) for split in splits]


def _bytes_needed(samples: Samples) -> int:
    """Of the tars and their indices, or of the .beton."""
    if isinstance(samples, Shards):
        return int(samples.size.sum()) * 101 // 100 + 64 * len(samples) + 2 * samples.sidecar.content["page_size"]
    blocks = -(-samples.size.astype(np.int64) // _BLOCK) + (1 if samples.label is None else 3)
    return int(blocks.sum()) * _BLOCK + 256 * len(samples) + _RECORD


def _check(sources: Sequence[Beton | Shards], out: Path, overwrite: bool) -> list[list[Path]]:
    """All that can be known to go wrong, before anything is written.  Returns what is to go when the new files are in place."""
    for samples in sources:
        if (samples.mode == RAW).any():
            raise DataError(
                f"{samples.path} holds {int((samples.mode == RAW).sum()):,} raw images, and shards hold JPEGs only. Convert the images "
                "anew with --raw-fraction 0, or keep the .beton."
            )
    made = [out / f"{samples.path.stem}{'.json' if isinstance(samples, Beton) else '.beton'}" for samples in sources]
    replaced = check_existing(made, overwrite, {samples.path for samples in sources})
    check_space(sum(_bytes_needed(samples) for samples in sources), out)
    return replaced


def convert(source: Path, out: Path, samples_per_shard: int = SAMPLES_PER_SHARD, overwrite: bool = False) -> list[str]:
    """Convert .beton files to WebDataset shards, or such shards back; returns a line about each split.

    Args:
        source: A .beton, or a folder with train.beton and val.beton, or with the shards of both.
        out: Folder for SPLIT-000000.tar, ... with their indices and SPLIT.json, or for SPLIT.beton.
        samples_per_shard: Images in each tar.
        overwrite: Replace what is there of these splits, in either format.
    """
    sources = _sources(source)
    replaced = _check(sources, out, overwrite)
    lines = []
    with ExitStack() as stack:  # all splits are put in place together, or none
        for samples in sources:
            split, labels = samples.path.stem, samples.label is not None
            if isinstance(samples, Beton):
                # A header that no checksum covers may say anything.
                page_size = samples.page_size if samples.sidecar else PAGE_SIZE
                each = {"labels": labels, "samples_per_shard": samples_per_shard, "page_size": page_size}
                writer = stack.enter_context(ShardWriter(out, split, len(samples), **each))
                made, copy = f"{split}-*.tar", _to_shards
            else:
                page_size = samples.sidecar.content["page_size"]
                writer = stack.enter_context(BetonWriter(out / f"{split}.beton", len(samples), labels=labels, page_size=page_size))
                made, copy = f"{split}.beton", _to_beton
            with Progress(made, len(samples)) as shown:
                copy(samples, writer, shown)
            lines.append(f"{out / made}: {len(samples):,} images, {gigabytes(writer.bytes_written)}")
    remove_replaced(replaced)
    return lines


def main(args: Sequence[str] | None = None) -> None:
    say(f"Wrote {'; '.join(run(convert, 'convert.webdataset', args))}.")


if __name__ == "__main__":
    main()
