"""Old recipe: linear probe of HiViT-B on ImageNet-1k, 90 epochs."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the full recipe."""
    config = ConfigDict()
    config.task = "linear_probe"
    config.seed = 0
    config.batch_size = 16384
    config.total_epochs = 90.0
    config.total_steps = 0  # a value above 0 overrides total_epochs

    config.model = ConfigDict()
    config.model.name = "hivit_base"
    config.model.num_classes = 1000
    config.model.image_size = 224
    config.model.in_channels = 3
    config.model.running_norm = True
    config.model.relative_position = False  # as in pretraining
    config.model.dtype = "bfloat16"

    config.data = ConfigDict()
    config.data.name = "imagenet2012"
    config.data.crop_scale = (0.08, 1.0)
    config.data.crop_pct = 0.875  # evaluation resizes to 256 pixels and crops 224
    config.data.flip = True
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)

    config.optimizer = ConfigDict()
    config.optimizer.base_learning_rate = 0.1  # multiplied by batch_size / 256
    config.optimizer.min_learning_rate = 0.0
    config.optimizer.warmup_epochs = 10.0
    config.optimizer.betas = (0.9, 0.0)  # LARS uses only the first number, the momentum
    config.optimizer.weight_decay = 0.0
    config.optimizer.layer_decay = 1.0
    config.optimizer.clip_norm = 0.0  # 0: no clipping
    config.optimizer.ema_decay = 0.0  # 0: no averaging
    config.optimizer.accumulate_steps = 1

    config.mesh = ConfigDict(dict(replica=1, data=-1, fsdp=1, tensor=1))
    config.log_every = 10
    config.eval_every = 782  # 10 epochs
    config.checkpoint_every = 391
    config.keep_checkpoints = 3
    config.init_from = "runs/mae_base"
    config.checkpoint = ""
    config.topology = ""
    return config
