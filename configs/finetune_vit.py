"""Finetuning of plain ViT after masked pretraining, ImageNet-1k, 100 or 50 epochs.

    hivit_jax --config finetune_vit:base --workdir runs/ft_vit

Variants: tiny, small, base (default), large, huge; tiny and small use base's values.
Values: as in the official MAE guide. Hardware: any mesh.
Expected: top-1 base 83.6, large 85.9, huge 86.9 % (published, not reproduced here).
Cost: 128 million images in 100 epochs; large, huge: 64 million in 50. A train step
(forward and backward, counted as three forward passes) takes, in GFLOP per image: tiny
7.5, small 27.6, base 105, large 369, huge 1004.
"""


def get_config(size: str = "base") -> dict:
    """Return the keys that differ from the defaults."""
    larger = dict(large=(1e-3, 50.0, 0.75, 0.2), huge=(1e-3, 50.0, 0.75, 0.3))
    rate, epochs, layer_decay, drop_path = larger.get(size, (5e-4, 100.0, 0.65, 0.1))
    run = dict(task="classify", total_epochs=epochs, init_from=f"runs/mae_vit_{size}")
    regularizers = dict(label_smoothing=0.1, mixup=0.8, cutmix=1.0, random_erasing=0.25)
    model = dict(name=f"vit_{size}", num_classes=1000, drop_path_rate=drop_path)
    model |= dict(dtype="bfloat16")
    optimizer = dict(base_learning_rate=rate, layer_decay=layer_decay)
    optimizer |= dict(min_learning_rate=1e-6)
    data = dict(randaugment=True)
    return run | regularizers | dict(model=model, data=data, optimizer=optimizer)
