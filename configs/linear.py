"""Linear probe of HiViT after masked pretraining, ImageNet-1k, 90 epochs.

    hivit_jax --config linear:base --workdir runs/lp --config.init_from=runs/mae_base

Variants: tiny, small, base (default), large.
Values: as in MAE's linear probe. LARS without weight decay trains a linear layer on
the mean-pooled, frozen features, after BatchNorm without scale and bias.
Expected: unknown, because the HiViT paper reports no linear probe. Hardware: any mesh.
Cost: the run trains on 115 million images. A train step (counted as one forward pass)
takes, in GFLOP per image: tiny 9.2, small 18.1, base 31.6, large 127.8.
"""


def get_config(size: str = "base") -> dict:
    """Return the keys that differ from the defaults."""
    run = dict(task="linear_probe", batch_size=16384, total_epochs=90.0)
    # 782 steps are 10 epochs.
    intervals = dict(log_every=10, eval_every=782, checkpoint_every=391)
    # Pretraining uses no relative positions, so the probe uses none.
    probe = dict(num_classes=1000, running_norm=True, relative_position=False)
    model = dict(name=f"hivit_{size}", dtype="bfloat16") | probe
    optimizer = dict(base_learning_rate=0.1, betas=(0.9, 0.0), weight_decay=0.0)
    optimizer |= dict(warmup_epochs=10.0)
    run |= intervals | dict(init_from=f"runs/mae_{size}")
    return run | dict(model=model, optimizer=optimizer)
