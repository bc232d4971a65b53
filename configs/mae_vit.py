"""Masked autoencoder pretraining of plain ViT on ImageNet-1k, 1600 epochs.

    hivit_jax --config mae_vit:base --workdir runs/mae_vit_base

Variants: tiny, small, base (default), large, huge. Values: as in the official MAE
code for base, large and huge; tiny and small use the same values, because none are
published for these sizes.
Expected: top-1 after finetune_vit: base 83.6, large 85.9, huge 86.9 % (published, not
reproduced here).
Hardware: any mesh for tiny to large; mesh.fsdp > 1 for huge.
Cost: the run trains on 2.05 billion images. A train step (forward and backward, counted
as three forward passes) takes, in GFLOP per image: tiny 34, small 39, base 59, large
125, huge 291.
"""


def get_config(size: str = "base") -> dict:
    """Return the keys that differ from the defaults."""
    run = dict(task="mae", batch_size=4096, total_epochs=1600.0)
    run |= dict(eval_every=6255)  # 20 epochs
    model = dict(name=f"mae_vit_{size}", dtype="bfloat16")
    data = dict(crop_scale=(0.2, 1.0))
    optimizer = dict(base_learning_rate=1.5e-4, warmup_epochs=40.0, betas=(0.9, 0.95))
    return run | dict(model=model, data=data, optimizer=optimizer)
