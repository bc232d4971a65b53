"""Augmentation on the device: one key per sample, so that neither the number of devices
nor gradient accumulation changes the draws.
"""
