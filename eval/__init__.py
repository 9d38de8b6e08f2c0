"""Evaluations that state their protocol."""
