"""Masked autoencoder pretraining on your own images, with or without classes.

    hivit_jax --config folder_mae --workdir runs/mae --config.data.dir=DIR

Variants: tiny (default), small, base. The recipe suits hundreds to tens of thousands of
images in DIR; a tenth is held out. For tens of thousands, add
`--config.total_epochs=100`.
Values: a short schedule for small batches. Expected: docs/small_data.md. Hardware: any
mesh. Cost: 400 epochs. A train step (forward and backward, counted as three forward
passes) takes 31.1 GFLOP per image for tiny.
"""


def get_config(size: str = "tiny") -> dict:
    """Return the keys that differ from the defaults."""
    run = dict(task="mae", batch_size=64, total_epochs=400.0)
    intervals = dict(log_every=50, eval_every=500, checkpoint_every=500)
    model = dict(name=f"mae_hivit_{size}", dtype="bfloat16")
    data = dict(name="folder", eval_fraction=0.1, crop_scale=(0.2, 1.0))
    optimizer = dict(base_learning_rate=2e-3, warmup_epochs=20.0, betas=(0.9, 0.95))
    return run | intervals | dict(model=model, data=data, optimizer=optimizer)
