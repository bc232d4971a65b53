"""Datasets: how many examples, their classes, and encoded examples by index."""
