"""Old recipe: training of HiViT-T from scratch, ImageNet-1k, 300 epochs."""

from ml_collections import ConfigDict


def get_config(size: str = "224") -> ConfigDict:
    """Return the full recipe for images of `size` x `size` pixels."""
    config = ConfigDict()
    config.task = "classify"
    config.seed = 0
    config.batch_size = 1024
    config.total_epochs = 300.0
    config.total_steps = 0  # a value above 0 overrides total_epochs
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
    config.data.crop_pct = 0.875  # evaluation resizes to 256 pixels and crops 224
    config.data.randaugment = True  # rand-m9-mstd0.5-inc1
    config.data.flip = True
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)

    config.optimizer = ConfigDict()
    # The peak is 1e-3 with this batch size.
    config.optimizer.base_learning_rate = 2.5e-4  # multiplied by batch_size / 256
    config.optimizer.warmup_learning_rate = 1e-6
    config.optimizer.min_learning_rate = 1e-5
    config.optimizer.warmup_epochs = 20.0
    config.optimizer.betas = (0.9, 0.999)
    config.optimizer.weight_decay = 0.05
    config.optimizer.layer_decay = 1.0
    config.optimizer.clip_norm = 0.0  # 0: no clipping
    config.optimizer.ema_decay = 0.0  # 0: no averaging
    config.optimizer.accumulate_steps = 1

    config.mesh = ConfigDict(dict(replica=1, data=-1, fsdp=1, tensor=1))
    config.log_every = 50
    config.eval_every = 12510  # 10 epochs
    config.checkpoint_every = 1251
    config.keep_checkpoints = 3
    config.init_from = ""
    config.checkpoint = ""
    config.topology = ""
    return config
