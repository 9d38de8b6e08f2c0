"""One paper per file; METHODS is the only list of them."""

from fastssl.method import Method
from fastssl.methods.byol import BYOL
from fastssl.methods.lewel import LEWEL

METHODS: dict[str, type[Method]] = {"byol": BYOL, "lewel": LEWEL}
