"""AdamW with layer-wise learning rate decay."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hivit_jax.tree import leaf_name


def learning_rate_scales(
    params: Any, layer_ids: Mapping[str, int], layer_decay: float
) -> Any:
    """Return the factor of each parameter's learning rate.

    The factor is ``layer_decay ** (last - layer)``.

    Args:
      layer_ids: {parameter name: layer number}, from 0 to the last layer.
    """
    last = max(layer_ids.values())
    return jax.tree_util.tree_map_with_path(
        lambda path, _: layer_decay ** (last - layer_ids[leaf_name(path)]), params
    )


def make_optimizer(
    options: Any,
    schedule: optax.Schedule,
    is_decayed: Callable[[str], bool],
    layer_ids: Mapping[str, int],
) -> optax.GradientTransformation:
    """Return the chain [clip,] Adam, weight decay, [layer decay,] learning rate.

    Weight decay is decoupled, as in AdamW. The optional parts are stateless and do not
    change the structure of the optimizer state. A run may therefore resume with other
    settings of clipping and layer decay.

    Args:
      options: ``config.optimizer``.
      schedule: function from step to learning rate.
      is_decayed: function that returns True if weight decay applies to the parameter
        with the given name.
      layer_ids: see `learning_rate_scales`; unused if `options.layer_decay` is 1.
    """

    def decay_mask(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: is_decayed(leaf_name(path)), params
        )

    def scale_by_layer(updates, _):
        scales = learning_rate_scales(updates, layer_ids, options.layer_decay)
        return jax.tree.map(jnp.multiply, updates, scales)

    adam = optax.scale_by_adam(
        *options.betas, eps=1e-8, mu_dtype=options.first_moment_dtype
    )
    scale_by_rate = optax.scale_by_learning_rate(schedule)
    if options.clip_norm:
        clip = optax.clip_by_global_norm(options.clip_norm)
        adam = _chain_with_stateless(clip, adam)
    if options.layer_decay != 1.0:
        scale_layers = optax.stateless(scale_by_layer)
        scale_by_rate = _chain_with_stateless(scale_layers, scale_by_rate)
    decay_weights = optax.add_decayed_weights(options.weight_decay, decay_mask)
    return optax.chain(adam, decay_weights, scale_by_rate)


def _chain_with_stateless(
    stateless: optax.GradientTransformation, transform: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Chain two transformations; only `transform` has a state."""

    def update(updates, state, params=None):
        updates, _ = stateless.update(updates, optax.EmptyState(), params)
        return transform.update(updates, state, params)

    return optax.GradientTransformation(transform.init, update)
