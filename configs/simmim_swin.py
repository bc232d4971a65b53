"""SimMIM pretraining of Swin (task mae) on ImageNet-1k, 192x192, 800 or 100 epochs.

    hivit_jax --config simmim_swin:base --workdir runs/simmim_swin_base

Variants: tiny, small, base (default), large; base_100: base for 100 epochs. Values: the
official SimMIM code. Hardware: any mesh. Expected: top-1 after finetune_swin: base
84.0, large 85.4, base_100 83.5 % (published, not reproduced here). Cost: 1.02 billion
images; base_100: 0.13 billion. A train step (forward and backward, counted as three
forward passes) takes, in GFLOP per image: tiny 20.1, small 38.8, base 68.3, large 157.
"""


def get_config(variant: str = "base") -> dict:
    """Return the keys that differ from the defaults."""
    size, short = variant.removesuffix("_100"), variant.endswith("_100")
    run = dict(task="mae", total_epochs=100.0 if short else 800.0, mask_ratio=0.6)
    run |= dict(batch_size=2048, eval_every=12511)  # every 20 epochs
    model = dict(name=f"simmim_swin_{size}", image_size=192, dtype="bfloat16")
    data = dict(crop_scale=(0.67, 1.0), interpolation="bilinear")
    rates = (2e-4, 4e-6) if short else (1e-4, 2e-6)
    optimizer = dict(base_learning_rate=rates[0], warmup_learning_rate=rates[1])
    optimizer |= dict(lr_batch=512, warmup_epochs=10.0, clip_norm=5.0)
    cosine = dict(schedule="cosine_from_start", min_learning_rate=4e-5)
    optimizer |= cosine if short else dict(schedule="multistep", milestones=(700.0,))
    return run | dict(model=model, data=data, optimizer=optimizer)
