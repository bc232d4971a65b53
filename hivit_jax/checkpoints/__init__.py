"""Checkpoints of a run, in Orbax format."""
