"""Linear probe of plain ViT after masked pretraining, ImageNet-1k, 90 or 50 epochs.

    hivit_jax --config linear_vit:base --workdir runs/lp_vit

Variants: tiny, small, base (default), large, huge. Values: the official MAE guide. LARS
trains the head on the frozen class token, after BatchNorm without scale and bias.
Expected: top-1 base 67.8, large 76.0, huge 77.2 % (published, not reproduced here).
Hardware: any mesh. Cost: 115 million images; large, huge: 64 million. A train step
(counted as one forward pass) takes, in GFLOP per image: tiny 2.5, small 9.2, base 35,
large 123, huge 335.
"""


def get_config(size: str = "base") -> dict:
    """Return the keys that differ from the defaults."""
    epochs = 50.0 if size in ("large", "huge") else 90.0
    run = dict(task="linear_probe", batch_size=16384, total_epochs=epochs)
    # 782 steps are 10 epochs.
    intervals = dict(log_every=10, eval_every=782, checkpoint_every=391)
    model = dict(name=f"vit_{size}", num_classes=1000, pooling="token")
    model |= dict(running_norm=True, dtype="bfloat16")
    optimizer = dict(base_learning_rate=0.1, betas=(0.9, 0.0), weight_decay=0.0)
    optimizer |= dict(warmup_epochs=10.0)
    run |= intervals | dict(init_from=f"runs/mae_vit_{size}")
    return run | dict(model=model, optimizer=optimizer)
