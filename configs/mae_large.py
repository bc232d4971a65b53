"""Masked autoencoder pretraining of HiViT-L on ImageNet-1k, 1600 epochs.

    hivit_jax --config mae_large --workdir runs/mae_large

Values: those of mae_base with another encoder; none were published for L.
Expected: no result is known.
Hardware: mesh.fsdp > 1; a chip of v5e:16x16 needs 5.4 GiB, a GPU of h100:8 51.1.
Cost: 2.05 G images, 118 GFLOP each.
"""


def get_config() -> dict:
    """The values that differ from the defaults."""
    return dict(
        task="mae",
        batch_size=4096,
        total_epochs=1600.0,
        eval_every=6255,  # 20 epochs
        model=dict(name="mae_hivit_large", dtype="bfloat16"),
        data=dict(crop_scale=(0.2, 1.0)),
        optimizer=dict(base_learning_rate=1e-4, warmup_epochs=40.0, betas=(0.9, 0.95)),
    )
