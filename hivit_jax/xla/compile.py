"""Compiling, and keeping what was compiled; keeping memory."""

import ctypes
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import jax

from hivit_jax.distributed.sharding import shardings_of
from hivit_jax.reporting.console import log
from hivit_jax.training.step import Training

CACHE_HIT = "/jax/compilation_cache/cache_hits"
_hits: list[str] = []


def keep_compiled(directory: str) -> None:
    """From here on programs that took a second to compile are kept for the next start;
    where JAX's own settings name no other place, and not at all in "".
    """
    if directory and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", directory)
    jax.monitoring.register_event_listener(
        lambda event, **_: _hits.append(event) if event == CACHE_HIT else None
    )


def keep_memory() -> None:
    """From here on this process keeps the memory that it frees, if it has glibc.

    For CPUs: there a train step takes its temporaries from the system and gives them
    back at its end, and the system clears every page of them again for the next.
    """
    max_mapped, trim_threshold, max_arenas = -4, -1, -8  # malloc.h
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((max_mapped, 0), (trim_threshold, -1), (max_arenas, 1)):
            mallopt(option, value)


def compile_steps(training: Training) -> Callable:
    """Compile a train step for every bucket ahead of its first call."""

    def signature(batch):
        return tuple((name, *batch[name].shape) for name in sorted(batch))

    compiled = {
        signature(batch): compile_step(training, bucket)
        for bucket, batch in enumerate(training.batches)
    }
    return lambda state, frozen, batch, step: compiled[signature(batch)](
        state, frozen, batch, step
    )


def compile_step(
    training: Training, bucket: int = 0, options: dict[str, Any] | None = None
) -> jax.stages.Compiled:
    """Compile the train step for one bucket, and log how long that took.

    Args:
      options: of the compiler.
    """
    count = len(training.batches)
    which = f" for bucket {bucket + 1} of {count}" if count > 1 else ""
    log(f"compiling the train step{which} ...")
    began, hits = time.perf_counter(), len(_hits)
    shardings = shardings_of(training.state)
    jitted = jax.jit(training.step, donate_argnums=0, out_shardings=(shardings, None))
    with jax.set_mesh(jax.tree.leaves(shardings)[0].mesh):  # kernels look at it
        lowered = jitted.lower(*training.arguments(bucket))
    compiled = lowered.compile(options)
    how = "read from the cache" if len(_hits) > hits else "compiled"
    log(f"{how} in {time.perf_counter() - began:.1f} s")
    return compiled
