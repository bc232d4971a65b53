"""Tests of AdamW, weight decay and layer decay against the official code."""

import json

import jax
import jax.numpy as jnp
import mini_runs
import networks
import numpy as np
import optax
import pytest
import reference
from flax import nnx

from hivit_jax import inputs
from hivit_jax.training import optimizer
from hivit_jax.tree import leaf_name, named_leaves, split, split_params
from hivit_jax.weights.names.official import to_official

pytestmark = pytest.mark.usefixtures("minimal_output")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first_moment", "loss_tolerance", "parameter_tolerance"),
    [("float32", 5e-6, 3e-4), ("bfloat16", 1e-3, 5e-3)],
)
def test_ten_steps_equal_the_official_adamw(
    first_moment, loss_tolerance, parameter_tolerance
):
    """Losses and parameters equal the official ones, for both first-moment dtypes."""
    arrays, facts = (
        reference.golden("adamw_traj"),
        reference.FIXTURES["adamw_traj"],
    )
    overrides = {
        reference.OUR_NAMES.get(key, key): (
            tuple(value) if isinstance(value, list) else value
        )
        for key, value in reference.FIXTURES["mae_mini"]["config"].items()
    }
    state = reference.state_dict("mae_mini")
    model, params = reference.build("mae_hivit_base", state, **overrides)
    images = jnp.asarray(reference.images("traj64", 4, 64))
    config = mini_runs.mae(optimizer__first_moment_dtype=first_moment)
    assert (config.optimizer.betas, config.optimizer.weight_decay) == (
        (0.9, 0.95),
        0.05,
    )
    transform = inputs.task_of_recipe(config).optimizer(model, lambda step: 1e-3)
    graphdef, params, tables = split_params(model)

    def loss_fn(params, noise):
        return nnx.merge(graphdef, params, tables)(images, noise=noise).loss

    @jax.jit
    def step(params, opt_state, noise):
        loss, gradient = jax.value_and_grad(loss_fn)(params, noise)
        updates, opt_state = transform.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, losses = transform.init(params), []
    moments = optax.tree.get(opt_state, "mu"), optax.tree.get(opt_state, "nu")
    dtypes = [{x.dtype.name for x in jax.tree.leaves(tree)} for tree in moments]
    assert dtypes == [{first_moment}, {"float32"}]
    for number in range(11):
        noise = jnp.asarray(reference.noise(f"traj{number}", 4, 16))
        previous_params = params
        params, opt_state, loss = step(params, opt_state, noise)
        losses.append(loss)  # of the eleventh step only the loss counts
    np.testing.assert_allclose(losses, facts["loss_f64"], atol=loss_tolerance, rtol=0)

    final = to_official(previous_params | tables, model)  # after ten steps
    assert {f"final/{name}" for name in final} == {k for k in arrays if "final/" in k}
    for name, array in final.items():
        difference = np.abs(array - arrays[f"final/{name}"])
        # The middle third of qkv.bias, the bias of k, does not affect attention. Its
        # gradients are rounding errors, which Adam scales up to full steps.
        if name.endswith("qkv.bias"):
            difference = difference.reshape(3, -1)[[0, 2]]
        assert difference.max() < parameter_tolerance, name
    np.testing.assert_array_equal(
        final["decoder_pos_embed"], state["decoder_pos_embed"]
    )


def golden_facts(name):
    """Return the content of a golden JSON file."""
    return json.loads((reference.GOLDEN / f"{name}.json").read_text())


def by_official_name(model, values):
    """Return {official name: number} from a pytree with a number per parameter."""
    filled = jax.tree.map(
        lambda leaf, value: np.broadcast_to(np.float64(value), leaf.shape),
        split_params(model)[1],
        values,
    )
    return {name: a.flat[0] for name, a in to_official(filled, model).items()}


def weight_decays(model, task):
    """Return {official name: weight decay}."""
    decays = jax.tree_util.tree_map_with_path(
        lambda path, _: 0.05 * task.is_decayed(leaf_name(path)), split_params(model)[1]
    )
    return by_official_name(model, decays)


@pytest.mark.slow
def test_hivit_pretraining_has_the_official_weight_decay():
    expected = golden_facts("weight_decay_groups")["mae_pretrain_base"]
    actual = weight_decays(
        networks.abstract_model("mae_hivit_base"), inputs.make_task(mini_runs.mae())
    )
    assert not actual.keys() & set(expected["frozen"])
    assert actual == expected["wd"]


def test_parameter_without_a_layer_is_refused():
    model = networks.mini()
    model.encoder.gamma = nnx.Param(jnp.ones(1))
    with pytest.raises(ValueError, match="parameter 'encoder/gamma' has no layer"):
        model.layer_ids()


@pytest.mark.slow
@pytest.mark.parametrize("size", ["mini", "hivit_base"])
def test_finetuning_has_the_official_layer_and_weight_decay(size):
    expected = golden_facts(f"layer_decay_{size}")
    mini = {
        reference.OUR_NAMES.get(key, key): (
            tuple(value) if isinstance(value, list) else value
        )
        for key, value in reference.MINI_CLASSIFIER.items()
    }
    model = networks.abstract_model("hivit_base", **mini if size == "mini" else {})
    scales = optimizer.learning_rate_scales(
        split(model)[1], model.layer_ids(), expected["layer_decay"]
    )
    scales, decays = (
        by_official_name(model, scales),
        weight_decays(model, inputs.make_task(mini_runs.classifier())),
    )
    assert scales.keys() == expected["params"].keys()
    for name, fact in expected["params"].items():
        assert scales[name] == pytest.approx(fact["lr_scale"], rel=1e-12), name
        assert decays[name] == fact["weight_decay"], name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "name", "drop_path_rate"),
    [
        ("supervised_tiny", "hivit_tiny", 0.05),
        ("supervised_small", "hivit_small", 0.3),
        ("supervised_base", "hivit_base", 0.5),
        ("finetune_base_0.2", "hivit_base", 0.2),
    ],
)
def test_drop_path_rates_equal_the_official_ones(key, name, drop_path_rate):
    model = networks.abstract_model(name, drop_path_rate=drop_path_rate)
    expected = [x for x in golden_facts("drop_path")[key] if x is not None]
    np.testing.assert_allclose(model.config.drop_path_rates, expected, rtol=1e-6)


PARAMS = {"a": jnp.arange(3.0), "b": {"bias": jnp.ones(2)}}


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 100.0])
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_clipping_and_layer_decay_equal_optax_and_add_no_state(clip_norm, layer_decay):
    """Updates equal an optax chain's bit for bit; the state has only AdamW's arrays."""
    options = mini_runs.mae().optimizer.copy_and_resolve_references()
    options.unlock()
    options.clip_norm, options.layer_decay = clip_norm, layer_decay
    layers = {"a": 0, "b/bias": 2}
    ours = optimizer.make_optimizer(
        options, lambda step: 0.1, lambda name: name == "a", layers
    )
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    scales = {"a": layer_decay**2, "b": {"bias": 1.0}}
    scale_layers = optax.stateless(lambda u, _: jax.tree.map(jnp.multiply, u, scales))
    chain = optax.chain(
        *clip,
        optax.scale_by_adam(*options.betas, eps=1e-8),
        optax.add_decayed_weights(options.weight_decay, {"a": True, "b": False}),
        scale_layers,
        optax.scale_by_learning_rate(lambda step: 0.1),
    )
    names = ["0/count", "0/mu/a", "0/mu/b/bias", "0/nu/a", "0/nu/b/bias", "2/count"]
    states = ours.init(PARAMS), chain.init(PARAMS)
    assert [*named_leaves(states[0])] == names
    for number in range(3):
        gradient = jax.tree.map(lambda x, n=number: x * n - 1, PARAMS)
        updates, our_state = ours.update(gradient, states[0], PARAMS)
        expected, expected_state = chain.update(gradient, states[1], PARAMS)
        states = our_state, expected_state
        jax.tree.map(np.testing.assert_array_equal, updates, expected)
