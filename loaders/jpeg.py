"""Whether the compressed data of a JPEG is damaged, which decoders do not say.

libjpeg only warns of damaged data and goes on with wrong pixels, and Pillow and torchvision drop the warning.  libjpeg-turbo's
own interface returns it; simplejpeg carries that interface in a wheel.
"""

from __future__ import annotations

import re

import simplejpeg

_DAMAGE = re.compile(r"Corrupt JPEG data|Premature end of JPEG")
_EXTRANEOUS = re.compile(r"(\d+) extraneous bytes before marker 0x([0-9a-f]{2})")


def complaint(data: bytes) -> str | None:
    """What libjpeg-turbo has to say against a complete decode: its first warning or its error; None for a clean JPEG.

    The scan is decoded in full, the picture only at an eighth of its sides: a fraction of what a decode costs.
    """
    return _said(simplejpeg.decode_jpeg, data, "GRAY", min_height=1, min_width=1, strict=True)


def _said(function, *args, **kwargs) -> str | None:
    try:
        function(*args, **kwargs)
    except ValueError as e:
        return str(e)
    return None


def is_damage(data: bytes, message: str) -> bool:
    """Whether a complaint about `data` means that its picture is not what was stored.

    Not so for warnings about headers, for fill bytes (0x00, 0xFF) between picture and end marker, which some cameras write,
    and for errors, which Pillow, with another interface to the same library, has to confirm.
    """
    if not _DAMAGE.search(message):
        return False
    if not (found := _EXTRANEOUS.search(message)):
        return True
    if found[2] == "d9":
        end = data.rfind(b"\xff\xd9")
        return not set(data[end - int(found[1]) : end]) <= {0x00, 0xFF}
    # Stray bytes between two headers do no harm; in front of a later scan they are what its predecessor left unread.
    return _said(simplejpeg.decode_jpeg_header, data, strict=True) != message
