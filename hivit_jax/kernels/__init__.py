"""Fused kernels of the residual branches: attention and MLP."""
