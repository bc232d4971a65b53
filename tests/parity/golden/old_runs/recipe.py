"""Full recipes of hivit_jax before 0.1 for very small models on scikit-learn's digits.

Variants: ``mae``, ``classify`` and ``linear_probe``, the values of ``config.task``.
"""

from ml_collections import ConfigDict


def get_config(task: str) -> ConfigDict:
    """Return the recipe of a task, with all keys that recipes had to contain."""
    pretraining = task == "mae"
    config = ConfigDict()
    config.task = task
    config.seed = 3
    config.batch_size = 24
    config.total_epochs = 0.0
    config.total_steps = 8

    config.model = ConfigDict()
    config.model.name = "mae_hivit_tiny" if pretraining else "hivit_tiny"
    config.model.image_size = 16
    config.model.patch_size = 4
    config.model.in_channels = 1
    config.model.embed_dim = 16
    config.model.depths = (1, 1, 2)
    config.model.num_heads = 2
    config.model.dtype = "float32"

    config.data = ConfigDict()
    config.data.name = "digits"
    config.data.train_examples = 100
    config.data.subset = 0
    config.data.crop_scale = (0.8, 1.0)
    config.data.crop_pct = 1.0
    config.data.canvas = 0
    config.data.flip = False
    config.data.mean = (0.31,)
    config.data.std = (0.35,)

    config.optimizer = ConfigDict()
    config.optimizer.base_learning_rate = 0.02
    config.optimizer.min_learning_rate = 0.0
    config.optimizer.warmup_epochs = 0.5
    config.optimizer.betas = (0.9, 0.95)
    config.optimizer.weight_decay = 0.05
    config.optimizer.layer_decay = 1.0
    config.optimizer.clip_norm = 0.0
    config.optimizer.ema_decay = 0.0
    config.optimizer.accumulate_steps = 1

    config.mesh = ConfigDict(dict(replica=1, data=-1, fsdp=1, tensor=1))
    config.log_every = 1
    config.eval_every = 4
    config.checkpoint_every = 1000
    config.keep_checkpoints = 1
    config.init_from = ""
    config.checkpoint = ""
    config.topology = ""

    if task == "mae":
        config.mask_ratio = 0.625
        config.model.decoder_embed_dim = 16
        config.model.decoder_depth = 1
        config.model.decoder_num_heads = 2
        config.model.norm_pix_loss = False
        config.optimizer.ema_decay = 0.8
    elif task == "classify":
        config.label_smoothing, config.mixup, config.cutmix = 0.1, 0.8, 1.0
        config.random_erasing = 0.25
        config.model.num_classes = 10
        config.model.drop_path_rate = 0.1
        config.optimizer.layer_decay = 0.75
        config.optimizer.clip_norm = 5.0
        config.optimizer.base_learning_rate = 0.2
    elif task == "linear_probe":
        config.model.num_classes = 10
        config.model.running_norm = True
        config.model.relative_position = False
        config.optimizer.base_learning_rate = 80.0
        config.optimizer.betas = (0.9, 0.0)
        config.optimizer.weight_decay = 0.0
    return config
