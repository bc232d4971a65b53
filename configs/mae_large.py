"""Masked autoencoder pretraining of HiViT-L on ImageNet-1k, 1600 epochs.

    hivit_jax --config mae_large --workdir runs/mae_large

Values: as in mae_base, because no values are published for HiViT-L. The models
differ only in the encoder.
Expected: unknown, because no result is published.
Hardware: any mesh. With the default mesh (no fsdp), a device needs 5.4 GiB on v5e:16x16
and 51.1 GiB on h100:8.
Cost: the run trains on 2.05 billion images. A train step (forward and backward, counted
as three forward passes) takes 118 GFLOP per image.
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
