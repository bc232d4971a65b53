"""Conversion of state dicts from and to the names and layouts of other programs."""
