"""Finetuning of HiViT after masked pretraining, ImageNet-1k, 100 epochs.

    hivit_jax --config finetune:base --workdir runs/ft --config.init_from=runs/mae_base

Variants: tiny, small, base (default), large. `init_from` may be the official file.
Values: the official self_supervised code for base; none were published for the others.
Expected: base 84.6 % top-1 after mae_base, as published; not reproduced here.
Hardware: any mesh; the official run had 8 GPUs with 64 images each, twice a step.
Cost: 128 M images; tiny 27.5, small 54.3, base 94.9, large 383.4 GFLOP each.
"""


def get_config(size: str = "base") -> dict:
    """The values that differ from the defaults."""
    run = dict(task="classify", total_epochs=100.0, init_from=f"runs/mae_{size}")
    mixing = dict(label_smoothing=0.1, mixup=0.8, cutmix=1.0, random_erasing=0.25)
    model = dict(name=f"hivit_{size}", num_classes=1000, drop_path_rate=0.2)
    return run | dict(
        **mixing,
        model=model | dict(dtype="bfloat16"),
        data=dict(randaugment=True),
        optimizer=dict(min_learning_rate=1e-6, layer_decay=0.85),
    )
