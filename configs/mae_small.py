"""Masked autoencoder pretraining of HiViT-S on ImageNet-1k, 1600 epochs.

    hivit_jax --config mae_small --workdir runs/mae_small

Values: those of mae_base with another encoder; none were published for S.
Expected: no result is known.
Hardware: any mesh; a chip of v5e:16x16 needs 1.4 GiB, a GPU of h100:8 23.9.
Cost: 2.05 G images, 37.4 GFLOP each.
"""


def get_config() -> dict:
    """The values that differ from the defaults."""
    return dict(
        task="mae",
        batch_size=4096,
        total_epochs=1600.0,
        eval_every=6255,  # 20 epochs
        model=dict(name="mae_hivit_small", dtype="bfloat16"),
        data=dict(crop_scale=(0.2, 1.0)),
        optimizer=dict(base_learning_rate=1e-4, warmup_epochs=40.0, betas=(0.9, 0.95)),
    )
