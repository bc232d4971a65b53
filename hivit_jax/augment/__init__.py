"""Data augmentation on the device, inside the train step.

Flips and random erasing use one PRNG key per sample, Mixup and CutMix one per batch.
Neither the number of devices nor gradient accumulation changes the random draws.
"""
