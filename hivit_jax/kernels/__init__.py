"""Fused kernels of residual branches: attention and MLP on TPUs, LayerNorm on GPUs."""
