"""Tests of kernel dispatch: kernels that each backend runs, and their results."""

from functools import partial

import jax
import jax.numpy as jnp
import mini_runs
import numpy as np
import pytest
from flax import nnx
from kernel_blocks import (
    SPECIAL,
    assert_fused_equals_unfused,
    main_stage_block,
    plain_block,
)
from kernel_cases import (
    kernels_in,
    library_attention,
    mesh_of,
    output_and_gradients,
    random_arrays,
    tpu_info,
)
from networks import random_array, unoptimized_jit
from numpy.testing import assert_allclose

from hivit_jax import evaluate, inputs
from hivit_jax.data.prefetch import prefetch_to_device
from hivit_jax.distributed import sharding
from hivit_jax.errors import ConfigError
from hivit_jax.kernels import dispatch, numerics, target
from hivit_jax.models import create_model
from hivit_jax.training.schedule import make_schedule
from hivit_jax.tree import named_leaves, split, split_params
from hivit_jax.xla.compile import compile_step

# Widths that kernels accept: stem 128 and 256, main stage 512, decoder 128.
WIDE = dict(
    image_size=64,
    embed_dim=512,
    depths=(1, 1, 1),
    num_heads=8,
    decoder_embed_dim=128,
    decoder_depth=1,
    decoder_num_heads=4,
    relative_position=False,
)


@pytest.fixture
def one_device():
    """Set a mesh of one device.

    Without a mesh, dispatch uses no kernels, because the tests run on eight devices.
    """
    with mesh_of(data=1):
        yield


def loss_of(choice, **overrides):
    """Return (loss function, parameters) of a masked autoencoder."""
    model = create_model("mae_hivit_base", kernels=choice, **WIDE | overrides)
    graphdef, params = split(model)
    images, noise = (
        random_array((16, 64, 64, 3), "images"),
        random_array((16, 16), "noise"),
    )
    keys = jax.random.split(jax.random.key(0), 16)

    def loss(params):
        model = nnx.merge(graphdef, params)
        return model(images, noise=noise, drop_path_keys=keys).loss

    return loss, params


@pytest.mark.extras
@pytest.mark.slow
def test_fused_network_equals_plain(one_device):
    """Loss and gradients agree with all branches fused: 6 MLPs and 2 attentions."""
    options = dict(drop_path_rate=0.5, remat=True)
    (plain, params), (fused, _) = (loss_of(c, **options) for c in ("plain", "fused"))
    names = kernels_in(jax.make_jaxpr(fused)(params).jaxpr)
    assert sorted(names) == 2 * ["attention_block"] + 6 * ["mlp_block"]
    assert kernels_in(jax.make_jaxpr(plain)(params).jaxpr) == []
    (loss, gradients), (expected_loss, expected_gradients) = (
        unoptimized_jit(jax.value_and_grad(f))(params) for f in (fused, plain)
    )
    assert_allclose(loss, expected_loss, rtol=1e-6)
    expected = named_leaves(expected_gradients)
    for name, gradient in named_leaves(gradients).items():
        atol = 1e-5 * float(jnp.abs(expected[name]).max()) + 1e-9
        assert_allclose(gradient, expected[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.extras
@pytest.mark.slow
@mini_runs.visible_devices(2)
def test_train_step_with_kernels_on_a_mesh_equals_plain():
    """Each of two devices has half of the batch; gradients are accumulated."""
    results, accumulate_steps = {}, 2
    for choice in ("plain", "fused"):
        config = mini_runs.mae(batch_size=32 * accumulate_steps, data__name="synthetic")
        config.optimizer.accumulate_steps = accumulate_steps
        config.model.kernels = choice
        for name, value in WIDE.items():
            config.model[name] = value
        config.mesh.data, config.mesh.fsdp = 1, 2
        mesh = sharding.make_mesh(config.mesh, config.batch_size, accumulate_steps)
        schedule = make_schedule(config.optimizer, config.batch_size, 2, 8)
        training = mini_runs.make_training(config, mesh, schedule)
        options = {"xla_backend_optimization_level": 0}
        step = compile_step(training, options=options)
        batch = {
            name: jax.device_put(
                np.full(s.shape, name == "weight", s.dtype)
                if s.ndim == 1
                else (100 + 50 * random_array(s.shape, name)).astype(s.dtype),
                s.sharding,
            )
            for name, s in training.batches[0].items()
        }
        shardings = sharding.shardings_of(training.state)
        state = jax.jit(training.init, out_shardings=shardings)()
        state, values = step(state, {}, batch, np.int32(0))
        results[choice] = values["loss"], values["gradient_norm"]
    assert_allclose(results["fused"], results["plain"], rtol=1e-5)


@pytest.mark.slow
def test_evaluation_runs_kernels_on_a_mesh(monkeypatch):
    """Each of two devices runs the kernels; sums and rows equal those of plain JAX.

    Each kernel is traced once, because the stem is too narrow for kernels and all main
    blocks call one function.
    """
    calls, target_run = [], target.Target.run

    def run(self, kernel, *arguments):
        calls.append((kernel, self.shards))
        return target_run(self, kernel, *arguments)

    monkeypatch.setattr(target.Target, "run", run)
    results = {}
    for choice in ("plain", "fused"):
        config = mini_runs.classifier("digits", batch_size=16)
        config.model.kernels, config.model.embed_dim = choice, 128
        config.mesh.data, config.mesh.fsdp = 1, 2
        mesh = sharding.make_mesh(config.mesh, 16, devices=jax.devices()[:2])
        task = inputs.make_task(config)
        graphdef, *state = split_params(task.build_model())
        variables = dict(zip(("params", "model_state"), state, strict=True))
        variables |= {"frozen": {}}
        variables = jax.device_put(variables, sharding.state_shardings(mesh, variables))
        eval_step = evaluate.make_eval_step(config, task, graphdef, mesh)
        batch = next(prefetch_to_device(inputs.eval_batches(config), mesh))
        first_index = sharding.replicate(mesh, np.uint32(0))
        results[choice] = jax.device_get(eval_step(variables, batch, first_index))
        assert bool(calls) == (choice == "fused")
    kernels = dispatch.attention_block, dispatch.mlp_block
    assert calls == [(kernel, 2) for kernel in kernels]
    plain, fused = map(jax.tree.leaves, (results["plain"], results["fused"]))
    for a, b in zip(fused, plain, strict=True):
        assert_allclose(a, b, rtol=1e-5)


@pytest.mark.slow
def test_unsupported_shapes_and_backends_use_no_kernels(one_device):
    """Plain JAX runs for widths that do not fit tiles, and with "auto" on a CPU.

    Unknown values of `kernels` are an error.
    """
    loss, params = loss_of("auto")
    assert kernels_in(jax.make_jaxpr(loss)(params).jaxpr) == []
    narrow = dict(embed_dim=256, decoder_embed_dim=64, decoder_num_heads=2)
    loss, params = loss_of("fused", **narrow)
    # Widths are 64, 128, 256 and 64. Kernels run the two MLPs of width 128, and both
    # the MLP and the attention of width 256.
    names = kernels_in(jax.make_jaxpr(loss)(params).jaxpr)
    assert sorted(names) == ["attention_block"] + 3 * ["mlp_block"]
    with pytest.raises(ConfigError, match="'auto' or 'fused' or 'plain'"):
        create_model("hivit_tiny", kernels="fast")


@pytest.mark.slow
def test_gpus_run_layer_norms_as_kernels(one_device, monkeypatch):
    """The LayerNorms of all 8 branches are kernels in bfloat16, except with "plain"."""
    monkeypatch.setattr(target, "platform", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **_: v)
    for choice, dtype, count in (
        *(("fused", "bfloat16", 8), ("auto", "bfloat16", 8)),
        *(("plain", "bfloat16", 0), ("fused", "float32", 0)),
    ):
        loss, params = loss_of(choice, dtype=dtype)
        names = kernels_in(jax.make_jaxpr(loss)(params).jaxpr)
        assert names == count * [NORM], (choice, dtype)


# Dispatch by backend


@pytest.fixture
def on_platform(monkeypatch):
    """Return a function that sets the backend.

    The function returns a list that records (implementation, tokens) of cuDNN calls.
    """

    def patch(name):
        def attend(*qkv, implementation=None, **others):
            if implementation:
                calls.append((implementation, qkv[0].shape[1]))
            return library_attention(*qkv, **others)

        calls = []
        monkeypatch.setattr(target.pltpu, "get_tpu_info", tpu_info)
        monkeypatch.setattr(target, "platform", lambda: name)
        if name == "gpu":  # the test interprets the GPU kernel on the CPU
            monkeypatch.setattr(
                dispatch, "Plan", partial(numerics.Plan, interpret=True)
            )
        monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
        return calls

    return patch


ATTENTION, MLP = "attention_block", "mlp_block"
NORM = "layer_norm"
CUDNN_16_TOKENS = ("cudnn", 16)  # 15 tokens are padded to 16

# (platform, choice, dtype) -> cuDNN calls of a block, followed by its kernels.
KERNELS = {
    ("cpu", "fused", "float32"): [ATTENTION, MLP],
    ("cpu", "fused", "bfloat16"): [ATTENTION, MLP],
    ("tpu", "auto", "bfloat16"): [ATTENTION, MLP],
    ("tpu", "fused", "bfloat16"): [ATTENTION, MLP],
    ("gpu", "auto", "bfloat16"): [CUDNN_16_TOKENS, NORM, NORM],
    ("gpu", "fused", "bfloat16"): [CUDNN_16_TOKENS, NORM, NORM],
}


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_backend_runs_its_kernels(platform, dtype, on_platform):
    """A block runs the kernels in `KERNELS`, for even and odd numbers of tokens.

    With a key mask or padded windows, the block runs neither an attention kernel nor
    cuDNN. With tensor parallelism or without a mesh, the block runs only cuDNN.
    """
    calls, batch = on_platform(platform), 64

    def kernels_of_block(special, choice, tokens=15):
        # Complete 2x2 windows fill a grid of 2x8 units.
        sizes = {"grid": (2, 8)} if tokens == 16 else {}
        graphdef, params, inputs = main_stage_block(
            special, batch, dtype=dtype, **sizes
        )
        x = jnp.zeros((batch, tokens, 128), dtype)

        def run(params, x):
            return nnx.merge(graphdef, params)(x, kernels=choice, **inputs)

        calls.clear()
        names = kernels_in(jax.make_jaxpr(run)(params, x).jaxpr)
        return calls + names

    for choice in ("auto", "fused", "plain"):
        expected = KERNELS.get((platform, choice, dtype), [])
        without_attention = [x for x in expected if x in (MLP, NORM)]
        with mesh_of(data=1):
            for tokens in (15, 16):
                assert kernels_of_block("ordinary", choice, tokens) == expected, (
                    choice,
                    tokens,
                )
            assert kernels_of_block("relative bias", choice) == expected, choice
            for special in ("key mask", "windows"):
                names = kernels_of_block(special, choice)
                assert names == without_attention, (choice, special)
            four_windows = [
                ("cudnn", 4) if kernel == CUDNN_16_TOKENS else kernel
                for kernel in expected
            ]
            assert kernels_of_block("windows", choice, 16) == four_windows, choice
        with mesh_of(data=1, tensor=2):
            only_cudnn = [kernel for kernel in expected if kernel == CUDNN_16_TOKENS]
            assert kernels_of_block("ordinary", choice) == only_cudnn, choice
        # Without a mesh, shardings on these eight devices are unknown.
        assert kernels_of_block("ordinary", choice) == only_cudnn, choice


@pytest.mark.slow
@pytest.mark.parametrize(
    ("special", "platform", "dtype", "tolerance"),
    [
        *((special, "cpu", "float32", 1e-5) for special in SPECIAL),
        ("ordinary", "gpu", "bfloat16", 0.03),
        ("relative bias", "gpu", "bfloat16", 0.03),
    ],
)
def test_block_equals_plain_jax(
    special, platform, dtype, tolerance, on_platform, one_device
):
    """Output and gradients of a block with kernels equal those of plain JAX.

    The MLP is too narrow for a kernel. On CPUs, attention runs as a kernel, except with
    a key mask or padded windows. On GPUs, both LayerNorms run as kernels.
    """
    calls = on_platform(platform)
    options = {"mlp_ratio": 0.5, "dtype": dtype}
    graphdef, params, inputs = main_stage_block(special, 8, **options)
    x, cotangent = random_arrays((8, 15, 128), (8, 15, 128))
    names = tuple(named_leaves(params))

    def run(x, *params):
        block = nnx.merge(graphdef, jax.tree.unflatten(tree, params))
        return block(x.astype(dtype), kernels="fused", **inputs)

    def plain(x, *params):
        return plain_block(special, dict(zip(names, params, strict=True)), x)

    leaves, tree = jax.tree.flatten(params)
    actual, expected = (
        unoptimized_jit(partial(output_and_gradients, function))(
            [3 * x, *leaves], cotangent
        )
        for function in (run, plain)
    )
    for name, a, b in zip(("out", "x", *names), actual, expected, strict=True):
        a, b = np.float32(a), np.float32(b)
        assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=name)
    assert bool(calls) == (platform == "gpu")


@pytest.mark.slow
def test_gradients_of_parameters_are_summed_over_devices():
    """Each of two devices runs the kernels of a block on half of the images."""
    *block, inputs = main_stage_block("relative bias", 16)
    x, cotangent = random_arrays((16, 15, 128), (16, 15, 128))
    with mesh_of(data=2):
        assert_fused_equals_unfused(block, x, cotangent, [ATTENTION, MLP], **inputs)


@pytest.mark.slow
def test_kernels_on_full_windows_equal_plain_jax(one_device):
    """Output and gradients are equal, with relative positions and drop path.

    Drop path drops all windows of an image together.
    """
    options = dict(grid=(4, 4), relative_position=True, mlp_ratio=0.5)
    *block, _ = main_stage_block("windows", 8, **options)
    x, cotangent = random_arrays((8, 16, 128), (8, 16, 128))
    drop = dict(
        drop_path_rate=0.5, drop_path_keys=jax.random.split(jax.random.key(0), 8)
    )
    assert_fused_equals_unfused(block, 3 * x, cotangent, [ATTENTION], **drop)
