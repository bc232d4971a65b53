"""Tests of bytes, memory and FLOPs of compiled programs."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from networks import training_macs
from numpy.testing import assert_allclose

from hivit_jax import config as configs
from hivit_jax import inputs
from hivit_jax.distributed import sharding
from hivit_jax.tools import compile_ahead
from hivit_jax.xla import cost
from hivit_jax.xla.compile import memory_of

MIB = 2**20


pytestmark = pytest.mark.usefixtures("minimal_output")


def data_mesh():
    """Return a mesh of eight devices with one axis."""
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def compile_to_hlo(function, mesh, *shapes, out=()):
    """Compile a function of float32 arrays; return the HLO text.

    Args:
      shapes: (shape, partition spec) of each argument.
      out: partition spec of the result.
    """
    arguments = [
        jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )
        for shape, spec in shapes
    ]
    jitted = jax.jit(function, out_shardings=NamedSharding(mesh, PartitionSpec(*out)))
    return jitted.lower(*arguments).compile().as_text()


ROW_SHARDED = ((1024, 512), ("data",))  # 2 MiB on eight devices
REPLICATED = ((512, 512), ())  # 1 MiB on each device


def test_all_reduce_counts_the_bytes_of_its_result():
    hlo = compile_to_hlo(lambda x, y: x.T @ y, data_mesh(), ROW_SHARDED, ROW_SHARDED)
    assert cost.collectives(hlo) == [
        {"kind": "all-reduce", "count": 1, "bytes_per_step": MIB}
    ]


def test_all_gather_counts_the_bytes_of_its_result():
    hlo = compile_to_hlo(lambda x: x + 1, data_mesh(), ROW_SHARDED)
    assert cost.collectives(hlo) == [
        {"kind": "all-gather", "count": 1, "bytes_per_step": 2 * MIB}
    ]


@pytest.mark.parametrize(
    ("operation", "kind", "mebibytes"),
    [
        (lambda x: jax.lax.psum_scatter(x, "data", tiled=True), "reduce-scatter", 2),
        (lambda x: jax.lax.ppermute(x, "data", [(0, 1)]), "collective-permute", 2),
        (
            lambda x: jax.lax.all_to_all(x, "data", 0, 0, tiled=True),
            "all-to-all",
            2,
        ),
    ],
)
def test_collective_counts_the_larger_of_operand_and_result(operation, kind, mebibytes):
    """The operand has 2 MiB, and the result is not larger."""
    mesh = data_mesh()
    function = jax.shard_map(
        operation,
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )
    hlo = compile_to_hlo(function, mesh, ((1024, 512), ()), out=("data",))
    expected = {"kind": kind, "count": 1, "bytes_per_step": mebibytes * MIB}
    assert cost.collectives(hlo) == [expected]


def test_collectives_in_loops_count_every_iteration():
    def loop(x, w):
        return jax.lax.scan(lambda w, _: (jnp.tanh((x @ w).T @ x), None), w, length=5)[
            0
        ]

    hlo = compile_to_hlo(loop, data_mesh(), ROW_SHARDED, REPLICATED)
    assert cost.collectives(hlo) == [
        {"kind": "all-reduce", "count": 5, "bytes_per_step": 5 * MIB}
    ]


def test_flops_of_a_kernel_count_devices_grid_and_inner_loops():
    """With count_iterations=False, iterations count only for loops inside kernels."""
    mesh = data_mesh()

    def kernel(x, y):
        y[...] = jax.lax.fori_loop(0, 3, lambda _, y: y @ x[...], x[...])

    def call_kernel(x):
        block = pl.BlockSpec((16, 16), lambda i: (i, 0))
        call = pl.pallas_call(kernel, x, grid=4, in_specs=[block], out_specs=block)
        with jax.named_scope("stem1"):
            return call(x)

    spec = PartitionSpec("data")
    run = jax.shard_map(
        call_kernel, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    jaxpr = jax.make_jaxpr(run)(jnp.ones((8 * 64, 16))).jaxpr
    flops = cost.matmul_flops_by_region(jaxpr, count_iterations=False)
    assert flops == {"stem1": 8 * 4 * 3 * 2 * 16**3}


def test_collective_in_several_kernels_counts_once():
    hlo = """\
%a (p: f32[32]) -> f32[256] {
  %p = f32[32]{0} parameter(0)
  ROOT %ag = f32[256]{0} all-gather(%p), channel_id=1, dimensions={0}
}

%b (q: f32[32]) -> f32[256] {
  %q = f32[32]{0} parameter(0)
  ROOT %ag.2 = f32[256]{0} all-gather(%q), channel_id=1, dimensions={0}
}

ENTRY %main (x: f32[32]) -> f32[256] {
  %x = f32[32]{0} parameter(0)
  %start = f32[256]{0} fusion(%x), kind=kCustom, calls=%a
  ROOT %done = f32[256]{0} fusion(%x), kind=kCustom, calls=%b
}
"""
    assert cost.collectives(hlo) == [
        {"kind": "all-gather", "count": 1, "bytes_per_step": 1024}
    ]


def test_flops_in_loops_count_every_iteration():
    def program(x, w):
        step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jax.lax.scan(step, x, w)[0].sum()

    x, w = jnp.ones((8, 16)), jnp.ones((5, 16, 16))
    flops_of_product = 2 * 8 * 16 * 16
    forward = jax.make_jaxpr(program)(x, w).jaxpr
    assert cost.matmul_flops(forward, count_iterations=True) == 5 * flops_of_product
    assert cost.matmul_flops(forward, count_iterations=False) == flops_of_product
    # Forward, recomputation, and one product each for the gradients of x and w.
    gradient = jax.make_jaxpr(jax.grad(program, (0, 1)))(x, w).jaxpr
    assert (
        cost.matmul_flops(gradient, count_iterations=True) == 5 * 4 * flops_of_product
    )


def test_memory_counts_aliased_outputs_once():
    sizes = SimpleNamespace(
        argument_size_in_bytes=1000,
        output_size_in_bytes=700,
        temp_size_in_bytes=30,
        generated_code_size_in_bytes=5,
        alias_size_in_bytes=600,
    )
    program = SimpleNamespace(memory_analysis=lambda: sizes)
    assert memory_of(program) == {
        "arguments": 1000,
        "outputs": 700,
        "temporaries": 30,
        "program": 5,
        "aliased": 600,
        "total": 1000 + (700 - 600) + 30 + 5,
    }


def test_arrays_updated_in_place_need_no_new_memory():
    """4,096 bytes are updated in place, and a new array of 2,048 bytes is returned."""
    update = jax.jit(lambda x, y: (x + 1, 2 * y), donate_argnums=0)
    program = update.lower(jnp.zeros(1024), jnp.zeros(512)).compile()
    memory = memory_of(program)
    assert memory["arguments"] == 4096 + 2048
    assert memory["aliased"] == 4096
    # XLA:CPU also returns a table of two pointers.
    pointer_bytes = memory["outputs"] - (4096 + 2048)
    assert 0 <= pointer_bytes <= 16
    other = memory["temporaries"] + memory["program"]
    assert memory["total"] == 4096 + 2048 + 2048 + pointer_bytes + other


@pytest.mark.extras
@pytest.mark.slow
def test_flops_of_a_step_are_three_times_the_forward_pass():
    """The ratio holds for mae_tiny with two mask ratios."""
    flops, expected = [], []
    for mask_ratio in (0.5, 0.75):
        flags = [f"--config.mask_ratio={mask_ratio}", "--config.batch_size=8"]
        config = configs.load("mae_tiny", flags)
        mesh = sharding.make_mesh(config.mesh, 8)
        training = compile_ahead.prepare_training(config, mesh)
        jaxpr = jax.make_jaxpr(training.step)(*training.arguments()).jaxpr
        flops.append(cost.matmul_flops(jaxpr, count_iterations=True) / 8)
        model = nnx.eval_shape(inputs.task_of_recipe(config).build_model)
        expected.append(6 * training_macs(model, mask_ratio))
    assert_allclose(flops, expected, rtol=0.04)  # resizing of images adds FLOPs
    assert_allclose(flops[0] - flops[1], expected[0] - expected[1], rtol=0.01)
