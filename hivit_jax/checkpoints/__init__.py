"""Checkpoints of a run, by orbax."""
