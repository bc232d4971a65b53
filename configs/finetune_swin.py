"""Finetuning of Swin after SimMIM pretraining, ImageNet-1k, 224x224, 100 epochs.

    hivit_jax --config finetune_swin:base --workdir runs/ft_swin

Variants: tiny, small, base (default), large. `init_from` may be an official weight
file. Values: as in the official SimMIM code for models pretrained for 800 epochs; tiny,
small: as base. Hardware: any mesh. Expected: top-1 base 84.0, large 85.4 % (published,
not reproduced here). Cost: 128 million images. A train step (counted as three forward
passes) takes, in GFLOP per image: tiny 26.9, small 52.4, base 92.6, large 215.
"""


def get_config(size: str = "base") -> dict:
    """Return the keys that differ from the defaults."""
    layer_decay, drop_path, window = dict(large=(0.7, 0.2, 14)).get(size, (0.8, 0.1, 7))
    run = dict(task="classify", batch_size=2048, total_epochs=100.0)
    run |= dict(init_from=f"runs/simmim_swin_{size}")
    regularizers = dict(label_smoothing=0.1, mixup=0.8, cutmix=1.0, random_erasing=0.25)
    model = dict(name=f"swin_{size}", num_classes=1000, drop_path_rate=drop_path)
    model |= dict(window_size=window, dtype="bfloat16")
    optimizer = dict(base_learning_rate=1.25e-3, lr_batch=512, warmup_epochs=20.0)
    optimizer |= dict(warmup_learning_rate=1e-6, min_learning_rate=1e-6, clip_norm=5.0)
    optimizer |= dict(layer_decay=layer_decay, schedule="cosine_from_start")
    sections = dict(model=model, data=dict(randaugment=True), optimizer=optimizer)
    return run | regularizers | sections
