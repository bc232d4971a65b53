"""Checkpoints of a run, in orbax format."""
