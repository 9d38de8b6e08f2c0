"""Backbones, heads and normalisation policies."""
