"""Initial state of a run, new or from a pretrained model."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path
from flax import nnx

from hivit_jax import tasks
from hivit_jax.augment.resample import MAXIMUM
from hivit_jax.checkpoints.read import has_checkpoint
from hivit_jax.distributed.sharding import shardings_of
from hivit_jax.errors import CheckpointError
from hivit_jax.flags import config_flag
from hivit_jax.models import create_arguments, create_model
from hivit_jax.reporting.console import log
from hivit_jax.training.step import State, Training
from hivit_jax.weights.adapt import (
    Pretrained,
    check_fit,
    initialize_from,
    match_arrays,
)
from hivit_jax.weights.load import locate, read_for
from hivit_jax.xla.compile import with_compilation_log

DEFAULT_CHANNELS = 3
# Values of keys for images of 8 bits.
EIGHT_BITS = {"dtype": "uint8", "scale": 255, "value_range": ()}
TOLERANCE = 1e-3  # relative; smaller differences of numbers are rounding


def read_pretrained(config: Any, workdir: Path) -> Pretrained | None:
    """Return the model at `init_from` for a new run, else None.

    A new run reads the model before the images, so that a model that does not fit the
    config is the first error.
    """
    if not config.init_from or has_checkpoint(workdir):
        return None
    return read_initial(config)


def initial_state(
    config: Any,
    task: tasks.Task,
    training: Training,
    pretrained: Pretrained | None,
) -> State:
    """Return the state of a new run, initialized from `init_from` if set.

    Args:
      pretrained: result of `read_pretrained`.
    """
    if config.init_from:
        pretrained = pretrained or read_initial(config)
    init = jax.jit(training.init, out_shardings=shardings_of(training.state))
    state = with_compilation_log(init, "the initialization of the parameters")()
    if pretrained:
        state |= initialize_from(
            pretrained,
            nnx.eval_shape(task.build_model),
            {name: state[name] for name in ("params", "model_state")},
            fresh=task.fresh,
            head_scale=task.head_scale,
        )
        if "ema" in state:
            state["ema"] = jax.tree.map(jnp.copy, state["params"])
    return state


def read_initial(config: Any) -> Pretrained:
    """Read the model at `config.init_from`, and check it; see `check_initial`.

    Raises:
      CheckpointError: there is no model. If the path does not exist, the message
        contains the flags that set `init_from`.
      ConfigError: the model does not fit the config.
    """
    path = config.init_from
    log(f"reading the pretrained model {path} ...")
    try:
        pretrained = read_for(config.model, path)
    except CheckpointError as error:
        if path.startswith("hf://") or locate(path).exists():
            raise
        raise CheckpointError(
            f"{error}\nSet --config.init_from=PATH, or --config.init_from= to start "
            "from random parameters"
        ) from error
    check_initial(pretrained, config)
    return pretrained


def check_initial(pretrained: Pretrained, config: Any) -> None:
    """Compare a pretrained model with a config, without the dataset.

    Logs a warning if the pixels differ. Does not check the model of a task that builds
    its own.

    Raises:
      ConfigError: the model does not fit the config. The message contains all flags
        that differ.
    """
    task = tasks.find(config.task)
    if task.build_model is tasks.Task.build_model:
        model = nnx.eval_shape(partial(create_model, **create_arguments(config.model)))
        _, report = match_arrays(pretrained, model, task.fresh)
        check_fit(pretrained, model, report, pixel_flags(pretrained, config))
    warn_of_pixels(pretrained, config)


def warn_of_pixels(pretrained: Pretrained, config: Any) -> None:
    """Log a warning if a pretrained model was trained with pixels of other values."""
    if flags := pixel_flags(pretrained, config):
        log(
            f"warning: {pretrained.path} was trained with other pixel values; its "
            f"flags are {' '.join(flags)}"
        )


def pixel_flags(pretrained: Pretrained, config: Any) -> list[str]:
    """Return the flags of a model's training pixels that differ from the config.

    Two differences are intended, and therefore omitted: a dtype, scale or range that
    only the config sets, because its images require them; and mean and std, if the
    config sets another number of channels than the default.
    """
    saved, data = _training_pixels(pretrained), config.data
    channels = pretrained.arguments.get("in_channels", DEFAULT_CHANNELS)
    flags, keys = [], ["dtype", "scale", "value_range", "mean", "std"]
    if channels != config.model.in_channels:
        if config.model.in_channels == DEFAULT_CHANNELS:
            flags.append(config_flag("model.in_channels", channels))
        else:
            keys = keys[:3]
    white = MAXIMUM[saved.get("dtype", "uint8")]
    saved["scale"] = saved.get("scale") or white
    for key in keys:
        value, new = saved.get(key, ()), data[key]
        if key == "scale":
            new = new or white
            value = int(value) if float(value).is_integer() else value
        usual = key in EIGHT_BITS and _equal(value, EIGHT_BITS[key])
        if key in saved and not usual and not _equal(value, new):
            flags.append(config_flag(f"data.{key}", value))
    return flags


def _training_pixels(pretrained: Pretrained) -> dict[str, Any]:
    """Return a dict with the known pixel keys of a model's training, such as "mean"."""
    if data := pretrained.recipe.get("data"):
        return dict(data)
    info = dict(pretrained.info)
    if factor := info.pop("scale", 0):
        info["scale"] = float(f"{1 / factor:.9g}")
    return info


def _equal(first: Any, second: Any) -> bool:
    """Return True for equal texts, or equal numbers up to rounding."""
    if isinstance(first, str) or isinstance(second, str):
        return first == second
    first, second = np.atleast_1d(first), np.atleast_1d(second)
    return first.shape == second.shape and np.allclose(first, second, TOLERANCE, 0)
