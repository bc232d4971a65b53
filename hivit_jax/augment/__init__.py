"""Data augmentation on the device, inside the train step.

Each sample has its own PRNG key, so that neither the number of devices nor gradient
accumulation changes the draws.
"""
