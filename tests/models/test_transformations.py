"""Tests of models under JAX's transformations, meshes and debug settings."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from networks import mini, random_array, unoptimized_jit
from numpy.testing import assert_allclose, assert_array_equal

from hivit_jax.errors import ConfigError
from hivit_jax.models.layers import FixedTable, PatchEmbed, PatchMerge
from hivit_jax.models.norms import layer_norm

SMALL = dict(image_size=32, embed_dim=16, depths=(1, 1, 1), num_heads=1)
DECODER = dict(decoder_embed_dim=16, decoder_num_heads=1)
IMAGES, NOISE = random_array((4, 32, 32, 3)), random_array((4, 4), "noise")


def image_losses(graphdef, state, images, noise):
    """Return one loss per image."""
    model = nnx.merge(graphdef, state)
    if hasattr(model, "image_loss"):
        return model.image_loss(images, noise=noise)
    return jnp.square(model(images)).sum(-1)


def split_mini(name, **overrides):
    """Return (graphdef, state) of a small model."""
    sizes = SMALL | (DECODER if name.startswith("mae") else {}) | overrides
    return nnx.split(mini(name, **sizes))


def assert_close(actual, expected):
    """Check that two pytrees agree, relative to each array's largest value."""
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert_allclose(a, b, rtol=2e-4, atol=2e-4 * np.abs(b).max() + 1e-7)


MODELS = "hivit_base", "mae_hivit_base"


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_manual_and_explicit_meshes_change_no_value(name):
    """Loss and gradient equal those without a mesh.

    The first mesh is manual, inside a `shard_map` that checks varying types. The second
    mesh has Explicit axes, the default of `make_mesh`, which shard the images.
    """
    graphdef, state = split_mini(name)

    def mean_loss(state, images, noise):
        return image_losses(graphdef, state, images, noise).mean()

    gradient = jax.value_and_grad(mean_loss)
    expected = unoptimized_jit(gradient)(state, IMAGES, NOISE)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))

    def global_mean(state, images, noise):
        return jax.lax.pmean(mean_loss(state, images, noise), "d")

    mapped = jax.shard_map(
        jax.value_and_grad(global_mean),
        mesh=mesh,
        in_specs=(P(), P("d"), P("d")),
        out_specs=P(),
    )
    assert_close(unoptimized_jit(mapped)(state, IMAGES, NOISE), expected)
    sharding = NamedSharding(jax.make_mesh((4,), ("d",)), P("d"))
    arrays = jax.device_put((IMAGES, NOISE), sharding)
    assert_close(unoptimized_jit(gradient)(state, *arrays), expected)


def all_outputs(model, images):
    """Return the outputs of a model and of its most important methods."""
    if hasattr(model, "decode"):
        out = model(images, noise=jnp.arange(4.0)[None].repeat(len(images), 0))
        _, mean, scale = model.targets(images)
        return out, model.to_images(out, mean, scale)
    return model(images), model.features(images), model.layers(images, attention=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spec", [P(("a", "b")), P("b"), P("a", "b"), P()])
def test_results_keep_the_batch_sharding_of_the_images(name, spec):
    """The batch is sharded over two, one or no mesh axes.

    In one case the height is sharded, too. The mesh is either set or known only from
    the images.
    """
    model = nnx.merge(*split_mini(name))
    mesh = jax.make_mesh((2, 2), ("a", "b"))
    images = jax.device_put(IMAGES, NamedSharding(mesh, spec))
    expected = jax.eval_shape(partial(all_outputs, model), IMAGES)

    def check(images):
        outputs = all_outputs(model, images)
        assert jax.tree.map(jnp.shape, outputs) == jax.tree.map(jnp.shape, expected)
        for x in jax.tree.leaves(outputs):
            first_axis = jax.typeof(x).sharding.spec[:1] if x.ndim else ()
            assert tuple(first_axis) == ((*spec, None)[:1] if x.ndim else ())
        return ()

    jax.eval_shape(check, images)
    with jax.set_mesh(mesh):
        jax.eval_shape(check, images)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [{}, dict(scan_blocks=True, remat=True)])
def test_forward_mode_agrees_with_reverse_mode(overrides):
    """`jvp` and `linearize` agree with reverse mode: <w, Jv> = <J'w, v>."""
    graphdef, state = split_mini("hivit_base", **overrides, num_classes=3)

    def model(state, images):
        return nnx.merge(graphdef, state)(images)

    @unoptimized_jit
    def products(state, images):
        arguments, tangents = (state, images), (state, images * 2)
        forward = jax.jvp(model, arguments, tangents)[1]
        linear = jax.linearize(model, *arguments)[1](*tangents)
        _, backward = jax.vjp(model, *arguments)
        weight = jnp.cos(jnp.arange(forward.size)).reshape(forward.shape)
        pairs = zip(
            jax.tree.leaves(backward(weight)), jax.tree.leaves(tangents), strict=True
        )
        return (
            forward,
            linear,
            (weight * forward).sum(),
            sum((a * b).sum() for a, b in pairs),
        )

    forward, linear, w_dot_jv, jtw_dot_v = products(state, IMAGES[:1])
    assert_close(linear, forward)
    assert np.abs(forward).max() > 0.1
    assert_allclose(w_dot_jv, jtw_dot_v, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_derivatives_of_layer_norm_equal_plain_jax(dtype):
    """First derivatives in both modes, and second derivatives, agree with plain JAX."""
    x, scale, bias = (
        random_array((3, 8)).astype(dtype),
        random_array((8,), "s"),
        random_array((8,), "b"),
    )

    def ours(x, scale, bias):
        return layer_norm(x, scale, bias, 1e-6, jnp.dtype(dtype)).astype(jnp.float32)

    def plain(x, scale, bias):
        x = x.astype(jnp.float32)
        centered = x - x.mean(-1, keepdims=True)
        var = jnp.square(centered).mean(-1, keepdims=True)
        y = centered / jnp.sqrt(var + 1e-6) * scale[None] + bias[None]
        return y.astype(dtype).astype(jnp.float32)

    tolerance = (
        dict(rtol=0.05, atol=0.05)
        if dtype == "bfloat16"
        else dict(rtol=1e-4, atol=1e-5)
    )
    for transform in (
        jax.jacfwd,
        jax.jacrev,
        lambda f, n: jax.jacfwd(jax.jacrev(f, n), n),
    ):
        for actual, expected in zip(
            *(
                unoptimized_jit(transform(f, (0, 1, 2)))(x, scale, bias)
                for f in (ours, plain)
            ),
            strict=True,
        ):
            for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
                assert_allclose(np.float32(a), np.float32(b), **tolerance)


def test_layer_norm_saves_only_its_input_and_vectors():
    x, scale, bias = jnp.ones((64, 32)), jnp.ones(32), jnp.zeros(32)
    _, backward = jax.vjp(lambda *a: layer_norm(*a, 1e-6, x.dtype), x, scale, bias)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(backward))
    # The scale (32 channels), mean and inverse deviation (64 rows), and the input.
    assert sizes == [32, 64, 64, 64 * 32]


def test_merge_and_patch_embedding_save_only_parameters_and_their_input():
    """The backward pass recomputes the LayerNorm."""
    rngs = nnx.Rngs(0)
    merge = PatchMerge(8, eps=1e-6, dtype=jnp.float32, rngs=rngs)
    embed = PatchEmbed(12, 8, eps=1e-6, dtype=jnp.float32, rngs=rngs)
    for module, x, input_shape, kernel_shape in (
        (merge, jnp.ones((64, 8)), (16, 32), (32, 16)),
        (embed, jnp.ones((64, 12)), (64, 12), (12, 8)),
    ):
        graphdef, params = nnx.split(module)
        run = partial(lambda graphdef, p, x: nnx.merge(graphdef, p)(x), graphdef)
        _, backward = jax.vjp(run, params, x)
        shapes = [leaf.shape for leaf in jax.tree.leaves(backward) if leaf.ndim > 1]
        assert sorted(shapes) == sorted([input_shape, kernel_shape])


def test_forward_mode_of_fused_kernels_is_refused():
    """Fused kernels have no forward mode; the error names the option to change."""
    from hivit_jax.kernels.target import Target

    @jax.custom_vjp
    def kernel(x, weights, plan):
        return x

    kernel.defvjp(lambda x, *_: (x, None), lambda _, g: (g, None, None))
    run = partial(Target("cpu").run, kernel, params=((),), plan=0)
    with pytest.raises(ConfigError, match="kernels='plain'"):
        jax.jvp(run, (jnp.ones((2, 3)),), (jnp.ones((2, 3)),))
    assert jax.grad(lambda x: run(x).sum())(jnp.ones(3)).tolist() == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "overrides", [{}, dict(scan_blocks=True), dict(dtype="bfloat16")]
)
def test_models_need_no_implicit_rank_promotion(name, overrides):
    """Forward and backward pass work with `jax_numpy_rank_promotion="raise"`."""
    graphdef, state = split_mini(name, **overrides)
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(
            jax.grad(lambda s: image_losses(graphdef, s, IMAGES, NOISE).mean()), state
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides", "optimizer"),
    [
        ("mae_hivit_base", {}, optax.adamw(0.1, weight_decay=0.5)),
        ("hivit_base", dict(running_norm=True), optax.lion(0.1, weight_decay=0.5)),
        ("hivit_base", dict(running_norm=True, window_size=1), optax.sgd(9.0)),
    ],
)
def test_nnx_optimizer_trains_only_parameters(name, overrides, optimizer):
    """An `nnx.Optimizer` of `nnx.Param` changes no fixed tables or running statistics.

    Tables and statistics stay bit-identical with any weight decay. An optimizer of
    every `nnx.Variable` would decay them, although their gradients are 0.
    """
    graphdef, state = split_mini(name, **overrides)

    @unoptimized_jit
    def step(state):
        model = nnx.merge(graphdef, state)
        nnx_optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
        gradients = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
        nnx_optimizer.update(model, gradients)
        return nnx.state(model)

    params, others = nnx.split_state(state, nnx.Param, ...)
    new_params, new_others = nnx.split_state(step(state), nnx.Param, ...)
    assert len(jax.tree.leaves(others)) == (1 if name.startswith("mae") else 2)
    jax.tree.map(assert_array_equal, new_others, others)
    for old, new in zip(*map(jax.tree.leaves, (params, new_params)), strict=True):
        assert (old != new).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "overrides"),
    [
        ("mae_hivit_base", FixedTable, {}),
        ("hivit_base", nnx.BatchStat, dict(running_norm=True)),
    ],
)
def test_gradients_of_untrained_variables_are_0(name, kind, overrides):
    graphdef, state = split_mini(name, **overrides)
    gradient = unoptimized_jit(
        jax.grad(lambda s: image_losses(graphdef, s, IMAGES, NOISE).sum())
    )(state)
    gradients = jax.tree.leaves(nnx.split(nnx.merge(graphdef, gradient), kind, ...)[1])
    assert gradients
    assert not any(np.asarray(x).any() for x in gradients)
