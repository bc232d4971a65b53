"""Gradient accumulation over the microbatches of a batch."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hivit_jax.rng import Keys


def accumulate_gradients(gradient: Callable, num_microbatches: int) -> Callable:
    """Return a function like `gradient` that processes one microbatch at a time.

    Each device along the mesh axes of `_summed_axes` sums over its own examples. The
    sums are all-reduced over these axes once per step, not once per microbatch.

    Args:
      gradient: function of (params, model state, batch, keys, *rest) that returns a
        pytree of sums over the examples of the batch, and the new model state.
      num_microbatches: number of microbatches in a batch. Each microbatch starts from
        the model state that the previous microbatch returned.
    """

    def accumulated(params, model_state, batch, keys, *rest):
        def sum_microbatches(batch, sample_keys, params, model_state, step_key, *rest):
            def microbatch_gradient(model_state, batch, sample_keys):
                keys = Keys(sample_keys, step_key)
                return gradient(params, model_state, batch, keys, *rest)

            def add(carry, microbatch):
                totals, model_state = carry
                sums, model_state = microbatch_gradient(model_state, *microbatch)
                return (jax.tree.map(jnp.add, totals, sums), model_state), None

            microbatches = jax.tree.map(split_batch, (batch, sample_keys))
            first = jax.tree.map(lambda x: x[0], microbatches)
            abstract = jax.eval_shape(microbatch_gradient, model_state, *first)[0]
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
            carry = zeros, model_state
            (totals, model_state), _ = jax.lax.scan(add, carry, microbatches)
            return (jax.lax.psum(totals, axes) if axes else totals), model_state

        def split_batch(x):
            """Split [B, ...] into [num_microbatches, B / num_microbatches, ...].

            Microbatches are interleaved, so that every example stays on its device,
            even along the fsdp axis. In microbatches of even size, pairs of neighbors
            stay together, because Mixup and CutMix mix neighbors.
            """
            group_size = 2 if len(x) // num_microbatches % 2 == 0 else 1
            parts = x.reshape(-1, num_microbatches, group_size, *x.shape[1:])
            return jnp.moveaxis(parts, 1, 0).reshape(num_microbatches, -1, *x.shape[1:])

        axes = _summed_axes(len(keys.samples) // num_microbatches)
        arguments = batch, keys.samples, params, model_state, keys.step, *rest
        if not axes:
            return sum_microbatches(*arguments)
        split, replicated = PartitionSpec(axes), PartitionSpec()
        return jax.shard_map(
            sum_microbatches,
            in_specs=(split, split) + (replicated,) * (len(arguments) - 2),
            out_specs=replicated,
            axis_names=set(axes),
            check_vma=False,
        )(*arguments)

    return accumulated


def _summed_axes(microbatch_size: int) -> tuple[str, ...]:
    """Return the mesh axes along which each device sums over its own examples.

    These axes are replica and data, without axes of size 1. Returns () if splitting a
    microbatch over these axes would separate neighbors that Mixup and CutMix mix.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Axes of size 1 are left out, because XLA:CPU refuses to sum over such an axis.
    axes = tuple(a for a in ("replica", "data") if mesh.shape.get(a, 1) > 1)
    num_parts = math.prod(mesh.shape[axis] for axis in axes)
    return axes if microbatch_size // num_parts % 2 == 0 else ()
