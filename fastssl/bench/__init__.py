"""Measurements: `python -m fastssl.bench loader`. A top layer like train.py, so it may import every other part."""
