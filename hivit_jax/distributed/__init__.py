"""Meshes and multi-process runs."""
