"""Losses as pure functions on tensors, each family in its file."""
