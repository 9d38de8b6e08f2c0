"""Optimizers, parameter groups and schedules of the papers."""
