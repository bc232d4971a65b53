"""Classification of your own class folders, from a pretrained model or from scratch.

    hivit_jax --config folder_finetune --workdir runs/own --config.data.dir=DIR

Variants: tiny (default), small, base. The recipe suits hundreds to tens of thousands of
images in DIR/CLASS; a tenth is held out. `--config.init_from=runs/mae` starts from a
pretrained model. For tens of thousands of images, add
`--config.total_epochs=30 --config.eval_every=1000`.
Values: as in finetune with weaker augmentation and regularization. The peak learning
rate is lower, roughly in proportion to the square root of the batch size.
Expected: docs/small_data.md. Hardware: any mesh.
Cost: 100 epochs. A train step (forward and backward, counted as three forward passes)
takes 27.5 GFLOP per image for tiny.
"""


def get_config(size: str = "tiny") -> dict:
    """Return the keys that differ from the defaults."""
    run = dict(task="classify", batch_size=32, total_epochs=100.0)
    intervals = dict(log_every=50, eval_every=200, checkpoint_every=200)
    model = dict(name=f"hivit_{size}", num_classes=0, drop_path_rate=0.1)
    data = dict(name="folder", eval_fraction=0.1, crop_scale=(0.35, 1.0))
    optimizer = dict(base_learning_rate=4e-3, layer_decay=0.85, warmup_epochs=10.0)
    run |= intervals | dict(model=model | dict(dtype="bfloat16"))
    return run | dict(data=data, optimizer=optimizer)
