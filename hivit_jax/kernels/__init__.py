"""Attention and MLP of a block as single programs."""
