"""Old recipe: masked pretraining of HiViT-B on ImageNet-1k, 1600 epochs."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the full recipe."""
    config = ConfigDict()
    config.task = "mae"
    config.seed = 0
    config.batch_size = 4096
    config.total_epochs = 1600
    config.total_steps = 0  # a value above 0 overrides total_epochs

    config.model = ConfigDict()
    config.model.name = "mae_hivit_base"
    config.model.image_size = 224
    config.model.in_channels = 3
    config.model.dtype = "bfloat16"
    config.mask_ratio = 0.75

    config.data = ConfigDict()
    config.data.name = "imagenet2012"
    config.data.crop_scale = (0.2, 1.0)
    config.data.crop_pct = 0.875  # evaluation resizes to 256 pixels and crops 224
    config.data.flip = True
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)

    config.optimizer = ConfigDict()
    config.optimizer.base_learning_rate = 1e-4  # multiplied by batch_size / 256
    config.optimizer.min_learning_rate = 0.0
    config.optimizer.warmup_epochs = 40.0
    config.optimizer.betas = (0.9, 0.95)
    config.optimizer.weight_decay = 0.05
    config.optimizer.layer_decay = 1.0
    config.optimizer.clip_norm = 0.0  # 0: no clipping
    config.optimizer.ema_decay = 0.0  # 0: no averaging
    config.optimizer.accumulate_steps = 1

    config.mesh = ConfigDict(dict(replica=1, data=-1, fsdp=1, tensor=1))
    config.log_every = 50
    config.eval_every = 6255  # 20 epochs
    config.checkpoint_every = 1251
    config.keep_checkpoints = 3
    config.init_from = ""
    config.checkpoint = ""
    config.topology = ""
    return config
