"""Decoded uint8 images -> normalised views on the device: see augmenter.py."""

from fastssl.augment.augmenter import Augmenter

__all__ = ["Augmenter"]
