"""Which JPEGs may be stored as they are: those that every decoder of the loaders, on CPU and GPU, turns into the same RGB."""

from __future__ import annotations

import re

_SUBSAMPLINGS = (0x11, 0x21, 0x22)
"""Sampling factors of the luma that go by 4:4:4, 4:2:2 and 4:2:0 when the chroma has 1 x 1."""
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""A marker that ends entropy-coded data: not a stuffed 0xFF, a restart, or fill."""


def is_plain(data: bytes) -> bool:
    """Whether these bytes are a baseline JPEG of three components in YCbCr, 8 bits, sampled 4:4:4, 4:2:2 or 4:2:0, with
    nothing behind its end marker.  Only headers are read; whether the data is complete is for `loaders.jpeg.complaint` to say."""
    baseline = False
    at = 2
    while at + 2 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if marker == 0xD9:
            return baseline and at + 2 == len(data)
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at + 4 : at + 2 + size]
        if marker == 0xC0:
            baseline = _is_ycbcr(segment)
        elif marker == 0xDB:
            if any(segment[table] >> 4 for table in range(0, len(segment), 65)):  # 16-bit quantisation
                return False
        elif marker == 0xEE and segment.startswith(b"Adobe"):
            if segment[11:12] != b"\x01":  # 0: RGB
                return False
        elif 0xC1 <= marker <= 0xCF and marker != 0xC4:
            return False
        at += 2 + size
        if marker == 0xDA:
            end = _AFTER_SCAN.search(data, at)
            at = end.start() if end else len(data)
    return False


def _is_ycbcr(frame: bytes) -> bool:
    """frame: precision, height, width, number of components, then (id, sampling factors, quantisation table) of each."""
    if len(frame) != 15 or frame[0] != 8:
        return False
    ids, sampling = frame[6::3], frame[7::3]
    return ids == b"\x01\x02\x03" and sampling[0] in _SUBSAMPLINGS and sampling[1:] == b"\x11\x11"
