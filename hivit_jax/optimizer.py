"""AdamW with layer-wise decay, and gradient accumulation."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from hivit_jax.models import leaf_name, named_leaves


def layer_id(name: str, stage_blocks: list[int]) -> int:
    """Number of the layer a classifier's parameter belongs to, for layer-wise decay.

    Official ``lr_decay.py``: the patch embedding and absolute positions are 0, residual
    blocks count from 1, a merge takes the number of the block before it, and the norm
    and head after the last block come one after that.

    Args:
      stage_blocks: residual blocks per stage, (4, 4, 20) for base.
    """
    if match := re.match(r"encoder/stages/(\d+)/(\d+)/", name):
        stage, block = map(int, match.groups())
        return sum(stage_blocks[:stage]) + block + 1
    if match := re.match(r"encoder/merges/(\d+)/", name):
        return sum(stage_blocks[: int(match[1]) + 1])
    if name.startswith(("encoder/patch_embed/", "encoder/absolute_pos_embed")):
        return 0
    if name.startswith(("fc_norm/", "head/")):
        return sum(stage_blocks) + 1
    raise ValueError(f"no layer is known for parameter {name!r}")


def learning_rate_scales(params: Any, layer_decay: float) -> Any:
    """Factor on every parameter's learning rate, ``layer_decay ** (last - id)``."""
    names = list(named_leaves(params))
    found = [re.match(r"encoder/stages/(\d+)/(\d+)/", name) for name in names]
    blocks = {(int(m[1]), int(m[2])) for m in found if m}
    stages = sorted({stage for stage, _ in blocks})
    stage_blocks = [sum(s == stage for s, _ in blocks) for stage in stages]
    last = sum(stage_blocks) + 1
    return jax.tree_util.tree_map_with_path(
        lambda path, _: layer_decay ** (last - layer_id(leaf_name(path), stage_blocks)),
        params,
    )


def make_optimizer(
    o: Any,
    schedule: optax.Schedule,
    params: Any,
    is_decayed: Callable[[str], bool],
) -> optax.GradientTransformation:
    """One optax chain: [clip,] Adam, decoupled decay, [layer decay,] learning rate.

    Args:
      o: ``config.optimizer``.
      schedule: learning rate by step.
      params: parameters or their shapes; only names are read.
      is_decayed: whether weight decay applies to the parameter of a name.
    """
    mask = jax.tree_util.tree_map_with_path(
        lambda path, _: is_decayed(leaf_name(path)), params
    )
    chain = [optax.clip_by_global_norm(o.clip_norm)] if o.clip_norm else []
    chain += [
        optax.scale_by_adam(*o.betas, eps=1e-8, mu_dtype=o.first_moment_dtype),
        optax.add_decayed_weights(o.weight_decay, mask),
    ]
    if o.layer_decay != 1.0:
        scales = learning_rate_scales(params, o.layer_decay)
        chain.append(
            optax.stateless(
                lambda updates, _: jax.tree.map(jnp.multiply, updates, scales)
            )
        )
    return optax.chain(*chain, optax.scale_by_learning_rate(schedule))


def accumulated(gradient: Callable, micro: int) -> Callable:
    """`gradient` of a batch, summed over `micro` parts of it one after another.

    Of the mesh that is set, devices along replica and data each keep a sum of their
    own, so that they exchange gradients once a step and not for every part. (Where
    their part would be an odd number of images, which cannot be mixed in pairs, they
    take the parts together.)

    Args:
      gradient: (params, batch, keys, total weight) -> pytree of sums over the batch.
    """

    def divided(x):
        """[B, ...] -> [micro, B/micro, ...]: every device's samples stay there, along
        fsdp too, and neighbours together, for one may be mixed into the other.
        """
        pair = 2 if len(x) // micro % 2 == 0 else 1
        parts = x.reshape(-1, micro, pair, *x.shape[1:])
        return jnp.moveaxis(parts, 1, 0).reshape(micro, -1, *x.shape[1:])

    def whole(params, batch, keys, total_weight):
        def of_part(batch, samples, params, step_key, total_weight):
            keys_of = keys._replace(samples=samples, step=step_key)
            return gradient(params, batch, keys_of, total_weight)

        def summed(batch, samples, *rest):
            def add(sums, part):
                return jax.tree.map(jnp.add, sums, of_part(*part, *rest)), None

            parts = jax.tree.map(divided, (batch, samples))
            shapes = jax.eval_shape(
                of_part, *jax.tree.map(lambda x: x[0], parts), *rest
            )
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            return jax.lax.scan(add, zeros, parts)[0]

        arguments = batch, keys.samples, params, keys.step, total_weight
        mesh = jax.sharding.get_abstract_mesh()
        # Axes of one device are left out, because XLA:CPU refuses to sum over them.
        axes = tuple(a for a in ("replica", "data") if mesh.shape.get(a, 1) > 1)
        groups = math.prod(mesh.shape[axis] for axis in axes)
        if not axes or len(keys.samples) // groups // micro % 2:
            return summed(*arguments)
        return jax.shard_map(
            lambda *args: jax.lax.psum(summed(*args), axes),
            in_specs=(PartitionSpec(axes),) * 2 + (PartitionSpec(),) * 3,
            out_specs=PartitionSpec(),
            axis_names=set(axes),
            check_vma=False,
        )(*arguments)

    return whole
