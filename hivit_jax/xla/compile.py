"""Compilation of train steps: cache, memory and log lines; malloc settings."""

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any

import jax
import numpy as np

from hivit_jax.distributed.sharding import shardings_of
from hivit_jax.paths import expand
from hivit_jax.reporting.console import log
from hivit_jax.resources import check_memory
from hivit_jax.training.step import Training

CACHE_HIT = "/jax/compilation_cache/cache_hits"
_cache_hits: list[str] = []  # one entry per program that was read from the cache


def enable_compilation_cache(directory: str) -> None:
    """Cache compiled programs in a directory, so that later runs read them.

    Only programs that take at least a second to compile are cached. A cache directory
    in JAX's own settings takes precedence. An empty `directory` enables no cache.
    """
    if directory and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", expand(directory))
    jax.monitoring.register_event_listener(
        lambda event, **_: _cache_hits.append(event) if event == CACHE_HIT else None
    )


def keep_freed_memory() -> None:
    """Make malloc keep the memory that this process frees.

    By default, XLA:CPU allocates the temporaries of each train step from the operating
    system and returns the memory at the end of the step. The system then clears every
    page again for the next step. tf.data allocates batches in this way too. Does
    nothing without glibc.
    """
    # Option numbers of malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD and M_ARENA_MAX.
    max_mapped, trim_threshold, max_arenas = -4, -1, -8
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((max_mapped, 0), (trim_threshold, -1), (max_arenas, 1)):
            mallopt(option, value)


def compile_steps(training: Training) -> Callable:
    """Compile the train step for every bucket, before the first step runs.

    Returns:
      A function (state, frozen, batch, number of steps done) -> (state, metrics) that
      selects the program by the shapes of the batch.

    Raises:
      ResourceError: the devices have less memory than a program needs.
    """

    def signature(batch):
        return tuple((name, *batch[name].shape) for name in sorted(batch))

    compiled = {
        signature(batch): compile_step(training, bucket)
        for bucket, batch in enumerate(training.batches)
    }
    for program in compiled.values():
        check_memory(memory_of(program)["total"])
    return lambda state, frozen, batch, step: compiled[signature(batch)](
        state, frozen, batch, step
    )


def memory_of(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Return the bytes that a program needs on each device, by kind and in total.

    Aliased bytes are outputs in the memory of donated arguments. These bytes count once
    in the total.
    """
    analysis = compiled.memory_analysis()
    parts = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "program": analysis.generated_code_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes,
    }
    return parts | {"total": sum(parts.values()) - 2 * parts["aliased"]}


def compile_step(
    training: Training, bucket: int = 0, options: dict[str, Any] | None = None
) -> jax.stages.Compiled:
    """Compile the train step for one bucket, and log the time.

    Args:
      bucket: index of the bucket in `training.batches`.
      options: compiler options; None: the defaults.
    """
    count = len(training.batches)
    suffix = f" for bucket {bucket + 1} of {count}" if count > 1 else ""
    shardings = shardings_of(training.state)
    jitted = jax.jit(training.step, donate_argnums=0, out_shardings=(shardings, None))
    with log_compilation(f"the train step{suffix}"):
        # Kernels and sharding constraints read the mesh while the step is traced.
        with jax.set_mesh(jax.tree.leaves(shardings)[0].mesh):
            lowered = jitted.lower(*training.arguments(bucket))
        return lowered.compile(options)


@contextmanager
def log_compilation(program: str) -> Iterator[None]:
    """Context manager that logs the start and the duration of a compilation."""
    log(f"compiling {program}, which may take minutes ...")
    start, hits = time.perf_counter(), len(_cache_hits)
    yield
    action = "read from the cache" if len(_cache_hits) > hits else "compiled"
    log(f"{action} in {time.perf_counter() - start:.1f} s")


def with_compilation_log(jitted: Callable, program: str) -> Callable:
    """Return a wrapper of a jitted function that logs the compilations.

    JAX compiles in the first call with each combination of shapes, so only these calls
    are logged.
    """
    seen = set()

    @wraps(jitted)
    def call(*args):
        shapes = tuple(map(np.shape, jax.tree.leaves(args)))
        if shapes in seen:
            return jitted(*args)
        seen.add(shapes)
        with log_compilation(program):
            return jitted(*args)

    return call
