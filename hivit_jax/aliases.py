"""Errors for unknown keys of a config or model, with a suggestion."""

import difflib
from collections.abc import Iterable, Sequence

from hivit_jax.errors import ConfigError

# Key -> names of the same setting in other programs.
_ALIASES = {
    "batch_size": "bs batch batchsize train_batch_size global_batch_size",
    "checkpoint_every": "save_every save_freq save_interval ckpt_every save_steps",
    "class_weights": "class_weight loss_weights weights_of_classes",
    "compilation_cache": "cache cache_dir",
    "early_stopping": "patience early_stop early_stopping_patience",
    "eval_every": "eval_freq eval_interval eval_steps val_every val_interval",
    "init_from": "pretrained finetune checkpoint ckpt weights load_from resume_from",
    "keep_checkpoints": "max_to_keep save_total_limit",
    "label_smoothing": "smoothing",
    "log_every": "log_freq log_interval log_steps print_freq",
    "random_erasing": "reprob erasing random_erase",
    "seed": "random_seed rng_seed",
    "total_epochs": "epochs num_epochs max_epochs n_epochs nb_epochs epoch",
    "total_steps": "steps num_steps max_steps iterations iters max_iters niter",
    "data.balance": "sampler balanced class_balanced balanced_sampling oversample",
    "wandb_project": "wandb wandb_name",
    "data.crop_pct": "crop_ratio",
    "data.crop_scale": "scale min_scale crop_min",
    "data.dir": "path root data_path data_dir data_root dataset_path dataset_dir",
    "data.eval_fraction": "val_fraction test_fraction val_ratio test_size val_size",
    "data.eval_split": "val_split test_split validation_split",
    "data.flip": "hflip horizontal_flip",
    "data.name": "dataset dataset_name data_set",
    "data.randaugment": "aa auto_augment autoaugment rand_aug randaug",
    "data.workers": "num_workers n_workers threads num_threads",
    "mesh.data": "devices gpus num_gpus n_gpus num_devices",
    "model.depths": "depth layers num_layers",
    "model.drop_path_rate": "drop_path stochastic_depth drop_path_prob",
    "model.dtype": "precision amp fp16 bf16 mixed_precision",
    "model.embed_dim": "dim width hidden_size hidden_dim",
    "model.freeze": "frozen freeze_layers frozen_stages freeze_backbone",
    "model.image_size": "img_size input_size resolution size crop_size",
    "model.in_channels": "in_chans channels num_channels",
    "model.name": "arch architecture model_name model_type model.type backbone",
    "model.num_classes": "nb_classes n_classes classes num_labels",
    "model.num_heads": "heads n_heads num_attention_heads",
    "model.remat": "checkpointing gradient_checkpointing use_checkpoint",
    "optimizer.accumulate_steps": "accum accum_iter grad_accum accumulation_steps "
    "gradient_accumulation_steps",
    "optimizer.base_learning_rate": "lr learning_rate blr base_lr max_lr peak_lr "
    "max_learning_rate peak_learning_rate",
    "optimizer.betas": "beta1 beta2 b1 b2 momentum adam_betas",
    "optimizer.clip_norm": "clip_grad grad_clip max_norm clip max_grad_norm "
    "gradient_clip_val clip_gradient",
    "optimizer.ema_decay": "ema model_ema ema_rate model_ema_decay",
    "optimizer.layer_decay": "lr_decay_rate layerwise_decay llrd",
    "optimizer.min_learning_rate": "min_lr end_lr final_lr end_learning_rate",
    "optimizer.schedule": "scheduler sched lr_schedule lr_scheduler",
    "optimizer.warmup_epochs": "warmup warmup_steps",
    "optimizer.warmup_learning_rate": "warmup_lr start_lr init_lr",
    "optimizer.weight_decay": "wd decay l2",
}
_KEY_OF = {alias: key for key, text in _ALIASES.items() for alias in text.split()}
# Flag -> names that users may try as config keys for the flag's value.
_FLAGS = {
    "--workdir=DIR": "workdir output output_dir out_dir log_dir save_dir",
    "--workdir=DIR, which resumes the run in DIR": "resume auto_resume",
    "--topology=CHIP:SHAPE of --mode compile": "topology",
}
_FLAG_OF = {name: flag for flag, text in _FLAGS.items() for name in text.split()}
# Names of a key that would select the optimizer, and the reason why no such key exists.
_OPTIMIZER_NAMES = (
    "optim opt optimizer.name optimizer.type optimizer.opt optimizer.optimizer"
)
_OPTIMIZER_HINT = (
    "the task determines the optimizer: LARS for a linear probe, AdamW otherwise"
)


def unknown_key(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """Return the error for an unknown key.

    The error suggests the first of these that exists: a key with the same last
    component in another section, a key that other programs call by this name, a
    similarly spelled key, or a command line flag. If none exists, the error lists valid
    keys. A last component that several sections have, such as ``name``, is suggested
    only if the unknown key's section does not exist.

    Args:
      kind: description of the key, such as "config key".
      name: the unknown key, with dots between its components.
      known: all valid keys.
    """
    known, normalized = list(known), name.lower().replace("-", "_")
    if normalized in _OPTIMIZER_NAMES.split() and any("optimizer." in k for k in known):
        hint = _OPTIMIZER_HINT
    elif candidates := probable_keys(normalized, known):
        hint = f"did you mean {' or '.join(map(repr, candidates))}?"
    elif flag := _FLAG_OF.get(normalized):
        hint = f"did you mean the flag {flag}?"
    else:
        hint = _list_keys(name, known)
    return ConfigError(f"unknown {kind} {name!r}; {hint}")


def _split(key: str) -> tuple[str, str]:
    """Split a key into its section, "" if it has none, and its last component."""
    section, _, leaf = key.rpartition(".")
    return section, leaf


def probable_keys(name: str, known: Sequence[str]) -> list[str]:
    """Return the valid keys that the user probably meant; may be []."""
    section, leaf = _split(name)
    same_section = [key for key in known if _split(key)[0] == section]
    same_leaf = [key for key in known if _split(key)[1] == leaf]
    if len(same_leaf) == 1 or (same_leaf and not (section and same_section)):
        return same_leaf
    if target := _KEY_OF.get(name) or _KEY_OF.get(leaf):
        return [key for key in known if key in (target, _split(target)[1])]
    elsewhere = [] if same_leaf else known
    for keys, cutoff in ((same_section, 0.8), (elsewhere, 0.9 if section else 0.8)):
        by_leaf = {_split(key)[1]: key for key in keys}
        if near := difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=cutoff):
            return [by_leaf[near[0]]]
    return []


def _list_keys(name: str, known: Sequence[str]) -> str:
    """Return text that lists valid keys.

    These are the section's keys if `name` is a section; else the keys of the unknown
    key's section, if it exists; else all top-level keys and sections.
    """
    if section_keys := [_split(key)[1] for key in known if _split(key)[0] == name]:
        return f"it is a section of the config with the keys {', '.join(section_keys)}"
    section = _split(name)[0]
    leaves = [_split(key)[1] for key in known if section and _split(key)[0] == section]
    if leaves:
        return f"keys of {section}: {', '.join(leaves)}"
    names = [f"{_split(key)[0]}.*" if "." in key else key for key in known]
    return f"known: {', '.join(dict.fromkeys(names))}"
