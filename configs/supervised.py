"""Supervised training of HiViT from scratch, ImageNet-1k, 300 epochs.

    hivit_jax --config supervised:tiny --workdir runs/tiny

Variants: tiny, small, base (default). Values: as in the official supervised code, but
not the schedule. To match it too, add `--config.optimizer.schedule=cosine_from_start`.
Expected: top-1 tiny 82.1, small 83.5, base 83.8 % (published, not reproduced here).
Hardware: any mesh. The official runs used 8 GPUs with 128 images each.
Cost: the run trains on 384 million images. A train step (forward and backward, counted
as three forward passes) takes, in GFLOP per image: tiny 27.5, small 54.3, base 94.9.
"""


def get_config(size: str = "base") -> dict:
    """Return the keys that differ from the defaults."""
    run = dict(task="classify", total_epochs=300.0, eval_every=12510)  # every 10 epochs
    regularizers = dict(label_smoothing=0.1, mixup=0.8, cutmix=1.0, random_erasing=0.25)
    drop_path_rate = {"tiny": 0.05, "small": 0.3, "base": 0.5}[size]
    model = dict(name=f"hivit_{size}", num_classes=1000, drop_path_rate=drop_path_rate)
    model |= dict(dtype="bfloat16")
    data = dict(randaugment=True)
    # At batch size 1024, the learning rate rises from 1e-6 to 1e-3, then falls to 1e-5.
    optimizer = dict(base_learning_rate=2.5e-4, warmup_epochs=20.0)
    optimizer |= dict(warmup_learning_rate=1e-6, min_learning_rate=1e-5)
    return run | regularizers | dict(model=model, data=data, optimizer=optimizer)
