"""Meshes and multi-process runs: start, consistency checks, preemption, exit codes."""
