"""Bytes to decoded uint8 images on the device."""
