"""Supervised training of Swin from scratch, ImageNet-1k, 300 epochs.

    hivit_jax --config supervised_swin:tiny --workdir runs/swin_tiny

Variants: tiny, small, base (default). Values: as in the official Swin code.
Expected: top-1 tiny 81.2, small 83.2, base 83.5 % (published, not reproduced here).
Hardware: any mesh. The official runs used 8 GPUs with 128 images each.
Cost: the run trains on 384 million images. A train step (forward and backward, counted
as three forward passes) takes, in GFLOP per image: tiny 26.9, small 52.4, base 92.6.
"""


def get_config(size: str = "base") -> dict:
    """Return the keys that differ from the defaults."""
    run = dict(task="classify", total_epochs=300.0, eval_every=12510)  # every 10 epochs
    regularizers = dict(label_smoothing=0.1, mixup=0.8, cutmix=1.0, random_erasing=0.25)
    drop_path_rate = {"tiny": 0.2, "small": 0.3, "base": 0.5}[size]
    model = dict(name=f"swin_{size}", num_classes=1000, drop_path_rate=drop_path_rate)
    model |= dict(dtype="bfloat16")
    # At batch size 1024, the learning rate rises from 1e-6 to 1e-3, then falls to 1e-5.
    optimizer = dict(base_learning_rate=5e-4, lr_batch=512, warmup_epochs=20.0)
    optimizer |= dict(warmup_learning_rate=1e-6, min_learning_rate=1e-5, clip_norm=5.0)
    optimizer |= dict(schedule="cosine_from_start")
    data = dict(randaugment=True)
    return run | regularizers | dict(model=model, data=data, optimizer=optimizer)
