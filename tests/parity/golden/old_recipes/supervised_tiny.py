"""Supervised training of HiViT-T from scratch, ImageNet-1k, 300 epochs.

    python -m hivit_jax.main --config configs/supervised_tiny.py --workdir runs/tiny

Values: the official supervised code, for 8 GPUs with 128 images each; any mesh does
(`--config.mesh.*`). Published: 82.1 % top-1; not reproduced here. Cost: 384 M images,
27.5 GFLOP each. `--config.optimizer.official_quirks=True` follows its schedule exactly.
"""

from ml_collections import ConfigDict


def get_config(size: str = "224") -> ConfigDict:
    """The recipe; `size`: side of the images, ``configs/supervised_tiny.py:384``."""
    config = ConfigDict()
    config.task = "classify"
    config.seed = 0
    config.batch_size = 1024
    config.total_epochs = 300.0
    config.total_steps = 0  # more than 0 wins over total_epochs
    config.label_smoothing = 0.1
    config.mixup = 0.8
    config.cutmix = 1.0
    config.random_erasing = 0.25

    config.model = ConfigDict()
    config.model.name = "hivit_tiny"
    config.model.num_classes = 1000
    config.model.image_size = int(size)
    config.model.in_channels = 3
    config.model.drop_path_rate = 0.05
    config.model.dtype = "bfloat16"

    config.data = ConfigDict()
    config.data.name = "imagenet2012"
    config.data.crop_scale = (0.08, 1.0)
    config.data.crop_pct = 0.875  # evaluation: 256, of which 224
    config.data.randaugment = True  # rand-m9-mstd0.5-inc1
    config.data.flip = True
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)

    config.optimizer = ConfigDict()
    # 1e-3, from 1e-6 up and down to 1e-5, at this batch size.
    config.optimizer.base_learning_rate = 2.5e-4  # x batch_size / 256
    config.optimizer.warmup_learning_rate = 1e-6
    config.optimizer.min_learning_rate = 1e-5
    config.optimizer.warmup_epochs = 20.0
    config.optimizer.betas = (0.9, 0.999)
    config.optimizer.weight_decay = 0.05
    config.optimizer.layer_decay = 1.0
    config.optimizer.clip_norm = 0.0  # 0: no clipping
    config.optimizer.ema_decay = 0.0  # 0: no average
    config.optimizer.accumulate_steps = 1

    config.mesh = ConfigDict(dict(replica=1, data=-1, fsdp=1, tensor=1))
    config.log_every = 50
    config.eval_every = 12510  # steps; 10 epochs
    config.checkpoint_every = 1251
    config.keep_checkpoints = 3
    config.init_from = ""
    config.checkpoint = ""
    config.topology = ""
    return config
