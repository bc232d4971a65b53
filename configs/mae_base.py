"""Masked autoencoder pretraining of HiViT-B on ImageNet-1k, 1600 epochs.

    hivit_jax --config mae_base --workdir runs/mae_base

Values: as in the official self_supervised code, which trains in fp16 and splits a
batch into 2 microbatches of 2048 images.
Expected: 84.6 % top-1 after finetuning (published, not reproduced here).
Hardware: any mesh. A device needs 1.8 GiB on v5e:16x16 and 27.9 GiB on h100:8.
Cost: the run trains on 2.05 billion images. A train step (forward and backward, counted
as three forward passes) takes 47.5 GFLOP per image.
"""


def get_config() -> dict:
    """Return the keys that differ from the defaults."""
    return dict(
        task="mae",
        batch_size=4096,
        total_epochs=1600.0,
        eval_every=6255,  # 20 epochs
        model=dict(name="mae_hivit_base", dtype="bfloat16"),
        data=dict(crop_scale=(0.2, 1.0)),
        optimizer=dict(base_learning_rate=1e-4, warmup_epochs=40.0, betas=(0.9, 0.95)),
    )
