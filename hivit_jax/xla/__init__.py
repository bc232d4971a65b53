"""Compiling, and reading compiled programs."""
