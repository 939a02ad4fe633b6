"""Phases of steps, checkpoints, resume."""
