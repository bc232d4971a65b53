"""Tests of frozen parameters: names, exact equality, optimizer state, averages."""

import shutil

import jax
import jax.numpy as jnp
import mini_runs
import networks
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from hivit_jax.errors import ConfigError
from hivit_jax.train import train
from hivit_jax.training.freezing import freeze_updates, frozen_parameters
from hivit_jax.training.optimizer import make_optimizer
from hivit_jax.training.step import make_init, make_train_step
from hivit_jax.tree import named_leaves, split_params


@pytest.fixture(scope="module")
def names():
    """Return the names of the parameters of HiViT-T."""
    return [*named_leaves(split_params(networks.abstract_model("hivit_tiny"))[1])]


def first_three_components(frozen):
    """Return the first three components of each name, without duplicates."""
    return {"/".join(name.split("/")[:3]) for name in frozen}


def test_prefix_selects_whole_components_of_names(names):
    assert frozen_parameters("", names) == frozenset()
    assert frozen_parameters("head", names) == {"head/kernel", "head/bias"}
    block = frozen_parameters("encoder/stages/2/1", names)  # not encoder/stages/2/10
    assert len(block) == 13
    assert all(name.startswith("encoder/stages/2/1/") for name in block)
    selected = frozen_parameters(" encoder/stages/2/1/ , head/bias", names)
    assert selected == block | {"head/bias"}


def test_stages_selects_the_encoder_up_to_a_stage(names):
    expected = {"encoder/absolute_pos_embed"}
    expected |= {f"encoder/patch_embed/{part}" for part in ("proj", "norm")}
    expected |= {"encoder/stages/0", "encoder/merges/0"}
    assert first_three_components(frozen_parameters("stages:1", names)) == expected
    expected |= {"encoder/stages/1", "encoder/merges/1"}
    assert first_three_components(frozen_parameters("stages:2", names)) == expected
    everything = frozen_parameters("stages:3", names)
    assert everything == {name for name in names if name.startswith("encoder/")}


@pytest.mark.parametrize("item", ["stage", "stages:4", "stages:0", "encoder/stages/3"])
def test_prefix_that_selects_nothing_is_refused(item, names):
    with pytest.raises(ConfigError) as error:
        frozen_parameters(f"head,{item}", names)
    assert str(error.value) == (
        f"model.freeze: no parameter is selected by {item!r}; expected stages:1 to "
        "stages:3, encoder, encoder/absolute_pos_embed, encoder/merges, "
        "encoder/patch_embed, encoder/stages, fc_norm, head, or a longer prefix of a "
        "parameter's name"
    )


def test_freezing_all_parameters_is_refused(names):
    with pytest.raises(ConfigError, match="selects all parameters"):
        frozen_parameters("encoder,fc_norm,head", names)


PARAMS = {"a": jnp.arange(3.0), "b": {"bias": jnp.ones(2), "kernel": jnp.ones(2)}}
LAYERS = {"a": 0, "b/bias": 1, "b/kernel": 2}


@pytest.mark.slow
def test_freezing_does_not_change_the_updates_of_other_parameters():
    """Updates with weight decay and layer decay stay bit-identical."""
    options = mini_runs.mae().optimizer.copy_and_resolve_references()
    options.unlock()
    options.layer_decay = 0.5
    full_optimizer = make_optimizer(
        options, lambda step: 0.1, lambda name: name != "b/bias", LAYERS
    )
    freezing_optimizer = freeze_updates(full_optimizer, {"b/kernel"})
    states = full_optimizer.init(PARAMS), freezing_optimizer.init(PARAMS)
    omitted = named_leaves(states[0]).keys() - named_leaves(states[1]).keys()
    assert omitted == {"0/mu/b/kernel", "0/nu/b/kernel"}
    for number in range(3):
        gradient = jax.tree.map(lambda x, n=number: x * n - 1, PARAMS)
        expected, full_state = full_optimizer.update(gradient, states[0], PARAMS)
        found, freezing_state = freezing_optimizer.update(gradient, states[1], PARAMS)
        states = full_state, freezing_state
        assert (expected["b"].pop("kernel") != 0).all()
        assert not found["b"].pop("kernel").any()
        mini_runs.assert_identical(found, expected)


@pytest.mark.slow
def test_frozen_parameters_keep_every_bit():
    """Averages of frozen parameters keep every bit too.

    One value is -0.0, another is denormal.
    """
    task, frozen = networks.SquareTask(), {"kernel"}
    optimizer = freeze_updates(optax.adamw(0.1, weight_decay=0.5), frozen)
    graphdef = split_params(task.build_model())[0]
    options = dict(seed=0, ema_decay=0.9, frozen_names=frozen)
    step = jax.jit(make_train_step(task, graphdef, optimizer, lambda _: 0.1, **options))
    state = make_init(task, optimizer, 0.9)()
    kernel = jnp.array([[-0.0], [0.1], [1e-40]])
    state["params"]["kernel"] = state["ema"]["kernel"] = kernel
    ones = np.ones(2, np.float32)
    batch = {"x": np.ones((2, 3), np.float32), "weight": ones, "unreadable": 0 * ones}
    norms, expected_norms = [], []
    for number in range(3):
        bias = float(state["params"]["bias"][0])
        state, values = step(state, {}, batch, np.int32(number))
        norms.append(values["gradient_norm"])
        # The loss is output ** 2, and output = 0.1 + bias. The norm does not include
        # the gradient of the frozen kernel.
        expected_norms.append(2 * abs(0.1 + bias))
    for item in ("params", "ema"):
        found = np.asarray(state[item]["kernel"])
        assert_array_equal(found.view(np.int32), np.asarray(kernel).view(np.int32))
        assert state[item]["bias"] != 0
    assert_allclose(norms, expected_norms, rtol=1e-5, atol=1e-7)


@pytest.mark.extras
@pytest.mark.slow
@pytest.mark.usefixtures("minimal_output", "single_device")
def test_run_with_frozen_stages_resumes_bit_identically(tmp_path, capsys):
    """All parameters change, except the frozen ones, which have no moments."""
    config = mini_runs.classifier(
        total_steps=2,
        checkpoint_every=1,
        eval_every=2,
        model__freeze="stages:2,head/bias",
        optimizer__ema_decay=0.9,
        optimizer__layer_decay=0.7,
    )
    train(config, tmp_path / "run")
    before, after = (mini_runs.saved_arrays(tmp_path / "run", step) for step in (1, 2))
    frozen = frozen_parameters(config.model.freeze, before["params"])
    assert len(frozen) > 20
    for item in ("params", "ema"):
        for name, array in before[item].items():
            same = np.array_equal(array, after[item][name])
            assert same == (name in frozen), (item, name)
    moments = {n.partition("/mu/")[2] for n in after["optimizer"] if "/mu/" in n}
    assert moments == before["params"].keys() - frozen

    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "2")
    capsys.readouterr()
    train(config, tmp_path / "resumed")
    assert "resuming at step 1" in capsys.readouterr().out
    mini_runs.assert_identical(mini_runs.saved_arrays(tmp_path / "resumed", 2), after)
