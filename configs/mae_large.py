"""Masked autoencoder pretraining of HiViT-L on ImageNet-1k, 1600 epochs.

    hivit_jax --config mae_large --workdir runs/mae_large

Values: as mae_base except for the encoder; none are published for L.
Expected: unknown, because no result is published.
Hardware: mesh.fsdp > 1. GiB per device: 5.4 on v5e:16x16, 51.1 on h100:8.
Cost: 2.05 G images, 118 GFLOP per image.
"""


def get_config() -> dict:
    """Return the keys that differ from the defaults."""
    return dict(
        task="mae",
        batch_size=4096,
        total_epochs=1600.0,
        eval_every=6255,  # 20 epochs
        model=dict(name="mae_hivit_large", dtype="bfloat16"),
        data=dict(crop_scale=(0.2, 1.0)),
        optimizer=dict(base_learning_rate=1e-4, warmup_epochs=40.0, betas=(0.9, 0.95)),
    )
