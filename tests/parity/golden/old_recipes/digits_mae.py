"""Old recipe: masked pretraining of a very small HiViT on digits."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return the full recipe."""
    config = ConfigDict()
    config.task = "mae"
    config.seed = 0
    config.batch_size = 64
    config.total_epochs = 0.0
    config.total_steps = 1500

    config.model = ConfigDict()
    config.model.name = "mae_hivit_tiny"
    config.model.image_size = 16
    config.model.patch_size = 4  # a unit is 2x2 scanned pixels
    config.model.in_channels = 1
    config.model.embed_dim = 64
    config.model.depths = (1, 1, 4)
    config.model.num_heads = 2
    config.model.decoder_embed_dim = 64
    config.model.decoder_depth = 2
    config.model.decoder_num_heads = 2
    config.model.norm_pix_loss = False
    config.model.dtype = "float32"
    config.mask_ratio = 0.625

    config.data = ConfigDict()
    config.data.name = "digits"
    config.data.train_examples = 0  # 0: all 1,437
    config.data.subset = 0
    config.data.crop_scale = (1.0, 1.0)
    config.data.crop_pct = 1.0
    config.data.canvas = 0  # 0: the host resizes the images
    config.data.flip = False
    config.data.mean = (0.31,)
    config.data.std = (0.35,)

    config.optimizer = ConfigDict()
    config.optimizer.base_learning_rate = 1.6e-2  # multiplied by batch_size / 256
    config.optimizer.min_learning_rate = 0.0
    config.optimizer.warmup_epochs = 9.0
    config.optimizer.betas = (0.9, 0.95)
    config.optimizer.weight_decay = 0.05
    config.optimizer.layer_decay = 1.0
    config.optimizer.clip_norm = 0.0  # 0: no clipping
    config.optimizer.ema_decay = 0.0  # 0: no averaging
    config.optimizer.accumulate_steps = 1

    config.mesh = ConfigDict(dict(replica=1, data=-1, fsdp=1, tensor=1))
    config.log_every = 50
    config.eval_every = 500
    config.checkpoint_every = 250
    config.keep_checkpoints = 3
    config.init_from = ""
    config.checkpoint = ""
    config.topology = ""
    return config
