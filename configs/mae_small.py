"""Masked autoencoder pretraining of HiViT-S on ImageNet-1k, 1600 epochs.

    hivit_jax --config mae_small --workdir runs/mae_small

Values: as mae_base except for the encoder; none are published for S.
Expected: unknown, because no result is published.
Hardware: any mesh. GiB per device: 1.4 on v5e:16x16, 23.9 on h100:8.
Cost: 2.05 G images, 37.4 GFLOP per image.
"""


def get_config() -> dict:
    """Return the keys that differ from the defaults."""
    return dict(
        task="mae",
        batch_size=4096,
        total_epochs=1600.0,
        eval_every=6255,  # 20 epochs
        model=dict(name="mae_hivit_small", dtype="bfloat16"),
        data=dict(crop_scale=(0.2, 1.0)),
        optimizer=dict(base_learning_rate=1e-4, warmup_epochs=40.0, betas=(0.9, 0.95)),
    )
