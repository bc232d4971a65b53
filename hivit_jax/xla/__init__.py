"""Compile train steps and analyze compiled programs."""
