"""Finetuning of HiViT after masked pretraining, ImageNet-1k, 100 epochs.

    hivit_jax --config finetune:base --workdir runs/ft --config.init_from=runs/mae_base

Variants: tiny, small, base (default), large. `init_from` may be an official weight
file. Values: as in the official self_supervised code for base. The other sizes use the
same values, because none are published for them.
Expected: base reaches 84.6 % top-1 after mae_base (published, not reproduced here).
Hardware: any mesh. The official run used 8 GPUs, each with 2 microbatches of 64 images
per step.
Cost: the run trains on 128 million images. A train step (forward and backward, counted
as three forward passes) takes, in GFLOP per image: tiny 27.5, small 54.3, base 94.9,
large 383.4.
"""


def get_config(size: str = "base") -> dict:
    """Return the keys that differ from the defaults."""
    run = dict(task="classify", total_epochs=100.0, init_from=f"runs/mae_{size}")
    regularizers = dict(label_smoothing=0.1, mixup=0.8, cutmix=1.0, random_erasing=0.25)
    model = dict(name=f"hivit_{size}", num_classes=1000, drop_path_rate=0.2)
    model |= dict(dtype="bfloat16")
    data = dict(randaugment=True)
    optimizer = dict(min_learning_rate=1e-6, layer_decay=0.85)
    return run | regularizers | dict(model=model, data=data, optimizer=optimizer)
