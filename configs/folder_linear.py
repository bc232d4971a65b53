"""Linear probe of a pretrained encoder on your own class folders.

    hivit_jax --config folder_linear --workdir runs/lp --config.data.dir=DIR

Variants: tiny (default), small, base. The recipe suits hundreds to tens of thousands of
images in DIR/CLASS; a tenth is held out. `--mode probe` has the same purpose and is
faster.
Values: as in MAE's linear probe with small batches and larger crops. The learning
rate is high, because a run has few steps.
Expected: docs/small_data.md. Hardware: any mesh. Cost: 100 epochs. A train step
(counted as one forward pass) takes 9.2 GFLOP per image for tiny.
"""


def get_config(size: str = "tiny") -> dict:
    """Return the keys that differ from the defaults."""
    run = dict(task="linear_probe", batch_size=64, total_epochs=100.0)
    intervals = dict(log_every=50, eval_every=200, checkpoint_every=200)
    # Pretraining uses no relative positions, so the probe uses none.
    probe = dict(num_classes=0, running_norm=True, relative_position=False)
    model = dict(name=f"hivit_{size}", dtype="bfloat16") | probe
    data = dict(name="folder", eval_fraction=0.1, crop_scale=(0.35, 1.0))
    optimizer = dict(base_learning_rate=80.0, betas=(0.9, 0.0), weight_decay=0.0)
    run |= intervals | dict(init_from="runs/mae")
    return run | dict(model=model, data=data, optimizer=optimizer)
