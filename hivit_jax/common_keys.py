"""Config keys of every recipe, with default, comment and range."""

from dataclasses import replace

from hivit_jax.augment.resample import FILTER_RADIUS
from hivit_jax.keys import Key, field_keys
from hivit_jax.models.config import HiViTConfig

SCHEDULES = ("cosine", "cosine_from_start", "multistep", "polynomial", "constant")
# Tasks (`Task.keys`) and models (`config.model_keys`) add their own keys.
KEYS = {
    "task": Key("", "name of a task, or `module:Class` for your own task"),
    "seed": Key(
        0, "seed of parameters, image order, augmentation and masks", 0, 2**63 - 1
    ),
    "batch_size": Key(1024, "global batch size in images", 1),
    "total_epochs": Key(0.0, "length of the run in epochs", 0, 10**6),
    "total_steps": Key(0, "length of the run in steps; 0: use `total_epochs`", 0),
    "init_from": Key(
        "", "pretrained model to start from: any path that `load_pretrained` accepts"
    ),
    "log_every": Key(50, "steps between log lines", 1),
    "eval_every": Key(1251, "steps between evaluations; 1251: an ImageNet epoch", 1),
    "checkpoint_every": Key(
        1251, "steps between checkpoints; a new best evaluation also saves one", 1
    ),
    "keep_checkpoints": Key(3, "newest checkpoints to keep in addition to the best", 1),
    "early_stopping": Key(
        0, "end the run after this many evaluations without improvement; 0: never", 0
    ),
    "compilation_cache": Key(
        "", "directory for compiled programs; empty: `compiled` in the workdir"
    ),
    "wandb_project": Key(
        "", "Weights & Biases project that also receives the metrics; empty: none"
    ),
    "stall_timeout": Key(
        1800.0,
        "end the run after this many seconds without progress; 0: never",
        0,
        10**9,
    ),
    "peer_timeout": Key(
        60.0,
        "seconds without a heartbeat after which a process counts as lost",
        1,
        10**6,
    ),
    "model": {
        "name": Key("", "a model name from `hivit_jax.list_models`"),
        "image_size": replace(
            field_keys(HiViTConfig)["image_size"],
            default=224,
            comment="side or (height, width) in pixels, multiples of `patch_size`",
        ),
        "in_channels": replace(field_keys(HiViTConfig)["in_channels"], default=3),
        "freeze": Key(
            "",
            "parameters that are not trained: prefixes of parameter names, separated "
            "by commas; `stages:N`: the encoder up to the Nth stage",
        ),
    },
    "data": {
        "name": Key(
            "imagenet2012",
            "TFDS name, `folder`, `csv`, `webdataset`, `zip`, `digits`, `synthetic`, "
            "or your own `module:Class`",
        ),
        "dir": Key(
            "",
            "dataset directory or CSV file, or a directory's address in a bucket "
            "(`gs://`, `s3://`); empty: TFDS's default directory",
        ),
        "cache": Key(
            "",
            "directory for local copies of a bucket's files, which are copied in the "
            "background; empty: no copies",
        ),
        "train_split": Key("", "training split; empty: the dataset's default"),
        "eval_split": Key(
            "",
            "evaluation split; empty: the dataset's default; `none`: no evaluation",
        ),
        "eval_fraction": Key(
            0.0,
            "fraction of the training images to hold out for evaluation; only for "
            "datasets of files or archives",
            0,
            below=1,
        ),
        "eval_group": Key(
            "",
            "regular expression with a group; images whose paths have the same text in "
            "the first group stay in the same split",
        ),
        "exclude": Key(
            "", "text file that lists the images to leave out, one path per line"
        ),
        "multi_label": Key(
            False,
            "an image may have any number of labels; CSV files and archives separate "
            "labels by `;`, and TFDS stores a sequence",
        ),
        "class_level": Key(
            "top",
            "classes of `folder`; `top`: the topmost directories; `leaf`: all "
            "directories that contain images; `none`: no classes and no labels",
            choices=("top", "leaf", "none"),
        ),
        "balance": Key(
            0.0,
            "training uses a class of k images in proportion to `k ** (1 - balance)`; "
            "0: all images equally often; 1: all classes equally often",
            0,
            1,
        ),
        "train_examples": Key(
            0, "training images of `digits` (0: all) or `synthetic` (0: 1,024)", 0
        ),
        "subset": Key(
            0,
            "random seed, not a size; selects the `train_examples` images of `digits`",
            0,
        ),
        "crop_scale": Key(
            (0.08, 1.0),
            "smallest and largest area of training crops, as fractions of the image",
            above=0,
            high=1,
            length=2,
            increasing=True,
        ),
        "crop_pct": Key(
            0.875,
            "side of the evaluation's center crop, relative to the resized image; "
            "0.875: 224 of 256",
            1e-3,
            1,
        ),
        "flip": Key(
            True, "flip each training image left to right with probability 1/2"
        ),
        "randaugment": Key(False, "RandAugment in training (rand-m9-mstd0.5-inc1)"),
        "dtype": Key(
            "uint8",
            "dtype of pixels; `uint8`: images with more bits are reduced to 8; "
            "`uint16`, `float32`: images keep all bits",
            choices=("uint8", "uint16", "float32"),
        ),
        "scale": Key(
            0.0,
            "divisor of the pixels; 0: 255 for `uint8` and 65535 for `uint16`; must be "
            "set for `float32`",
            0,
        ),
        "mean": Key(
            (0.485, 0.456, 0.406), "mean per channel of the pixels divided by `scale`"
        ),
        "std": Key(
            (0.229, 0.224, 0.225),
            "standard deviation per channel of the pixels divided by `scale`",
            above=0,
        ),
        "value_range": Key(
            (),
            "values of black and white in images of more than 8 bits; (): 0 and the "
            "largest possible value, only for unsigned integers of up to 16 bits",
            item=float,
        ),
        "interpolation": Key("bicubic", "resize filter", choices=tuple(FILTER_RADIUS)),
        "antialias": Key(True, "true: resize like PIL; false: like `tf.image.resize`"),
        "canvas": Key(
            512,
            "largest crop side that the device resizes; 0: the host resizes all crops",
            0,
            2**16,
        ),
        "reader": Key(
            "threads",
            "reader of the batches: threads of this package, or tensorflow with "
            "byte-identical batches",
            choices=("threads", "tf.data"),
        ),
        "workers": Key(0, "reader threads per process; 0: one per core", 0, 1024),
        "max_unreadable": Key(0.001, "tolerated fraction of unreadable images", 0, 1),
    },
    "optimizer": {
        "base_learning_rate": Key(
            5e-4, "peak learning rate at a batch size of `lr_batch`", 0
        ),
        "lr_batch": Key(
            256,
            "`base_learning_rate` is multiplied by `batch_size / lr_batch`; "
            "0: no factor is applied",
            choices=(256, 512, 0),
        ),
        "schedule": Key(
            "cosine",
            "learning rate curve after the warmup; `cosine_from_start`: the cosine "
            "starts at step 0 instead of the end of the warmup, and each step uses the "
            "learning rate of the step before it",
            choices=SCHEDULES,
        ),
        "first_epoch": Key(
            0,
            "number of the first epoch; 1: the learning rate is one epoch ahead, and "
            "a resume omits one epoch of training (official self-supervised code)",
            choices=(0, 1),
        ),
        "warmup_epochs": Key(
            5.0, "epochs from `warmup_learning_rate` to the peak", 0, 10**6
        ),
        "warmup_learning_rate": Key(
            0.0, "initial learning rate, not scaled by the batch size", 0
        ),
        "min_learning_rate": Key(
            0.0, "final learning rate, not scaled by the batch size", 0
        ),
        "milestones": Key(
            (),
            "multistep: epochs at which the learning rate changes",
            above=0,
            high=10**6,
            increasing=True,
        ),
        "gamma": Key(
            0.1, "multistep: factor on the learning rate at a milestone", 0, 1
        ),
        "power": Key(1.0, "polynomial: exponent of the decay", 0, 100),
        "betas": Key(
            (0.9, 0.999),
            "Adam's betas; LARS uses the first as its momentum",
            0,
            below=1,
            length=2,
        ),
        "weight_decay": Key(
            0.05,
            "weight decay: decoupled in Adam, added to the gradient in LARS",
            0,
            100,
        ),
        "layer_decay": Key(
            1.0,
            "factor on the learning rate for each layer below the last",
            0,
            1,
        ),
        "clip_norm": Key(0.0, "maximum gradient norm; 0: no clipping", 0),
        "ema_decay": Key(
            0.0, "decay of the parameter average (EMA); 0: none", 0, below=1
        ),
        "accumulate_steps": Key(
            1, "microbatches whose gradients are accumulated in each step", 1
        ),
        "first_moment_dtype": Key(
            "float32", "dtype of Adam's first moment", choices=("float32", "bfloat16")
        ),
    },
    "mesh": {
        "replica": Key(
            1,
            "size of a second axis like `data`, for the links between slices or nodes",
            1,
            also=(-1,),
        ),
        "data": Key(
            -1,
            "size of an axis that shards only the batch; one axis may be -1, for all "
            "remaining devices",
            1,
            also=(-1,),
        ),
        "fsdp": Key(
            1,
            "size of the axis that shards the batch, parameters and optimizer state",
            1,
            also=(-1,),
        ),
        "tensor": Key(
            1,
            "size of the axis that shards attention heads and MLP hidden units",
            1,
            also=(-1,),
        ),
        "zero": Key(
            3,
            "ZeRO stage; 3: `fsdp` shards parameters and optimizer state; 1: only the "
            "optimizer state",
            choices=(1, 3),
        ),
    },
}
# Key of the section `optimizer` -> the schedules that use it.
SCHEDULES_OF_KEY = {
    "min_learning_rate": ("cosine", "cosine_from_start", "polynomial"),
    "milestones": ("multistep",),
    "gamma": ("multistep",),
    "power": ("polynomial",),
}
