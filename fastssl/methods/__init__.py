"""One paper per file; METHODS is the only list of them."""

from fastssl.method import Method
from fastssl.methods.byol import BYOL
from fastssl.methods.dino import DINO
from fastssl.methods.lewel import LEWEL
from fastssl.methods.scfs import SCFS

METHODS: dict[str, type[Method]] = {"byol": BYOL, "dino": DINO, "lewel": LEWEL, "scfs": SCFS}
