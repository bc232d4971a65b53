"""Tests of the linear probe: LARS, running statistics, frozen features, as in MAE."""

import jax
import jax.numpy as jnp
import mini_runs
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from hivit_jax import inputs
from hivit_jax.errors import ConfigError
from hivit_jax.models.norms import BatchNorm
from hivit_jax.train import train
from hivit_jax.tree import leaf_name, split_params

MOMENTUM, TRUST = 0.9, 0.001


pytestmark = pytest.mark.usefixtures("minimal_output", "single_device")


def probe(source="synthetic", **overrides):
    """Return the config of a small linear probe."""
    settings = {
        "task": "linear_probe",
        "model__name": "hivit_base",
        "model__num_classes": 10,
        "model__relative_position": False,
        "model__running_norm": True,
        "optimizer__base_learning_rate": 0.1,
        "optimizer__weight_decay": 0.0,
        "data__flip": False,
    }
    return mini_runs.without_decoder(source, **settings | overrides)


class ProbeModel(nnx.Module):
    """Model with an encoder, statistics and a head."""

    def __init__(self):
        self.encoder = nnx.Param(jnp.ones((3, 3)))
        self.fc_norm = BatchNorm(3, affine=False)
        self.head = nnx.Linear(3, 4, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_ten_steps_equal_the_official_lars():
    """MAE's LARS scales the gradient of a kernel, and then applies momentum."""
    model = ProbeModel()
    params = split_params(model)[1]
    task = inputs.make_task(probe())
    optimizer = task.optimizer(model, lambda step: 0.1 * (step + 1))
    state, random = optimizer.init(params), np.random.RandomState(0)
    kernel, bias = (np.array(params["head"][name]) for name in ("kernel", "bias"))
    momentum = [np.zeros((3, 4)), np.zeros(4)]
    for step in range(10):
        grads = jax.tree.map(lambda x: random.randn(*x.shape), params)
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        scaled = grads["head"]["kernel"]
        scaled = scaled * TRUST * np.linalg.norm(kernel) / np.linalg.norm(scaled)
        for i, gradient in enumerate((scaled, grads["head"]["bias"])):
            momentum[i] = MOMENTUM * momentum[i] + gradient
        kernel = kernel - 0.1 * (step + 1) * momentum[0]
        bias = bias - 0.1 * (step + 1) * momentum[1]
    assert_allclose(params["head"]["kernel"], kernel, rtol=1e-5)
    assert_allclose(params["head"]["bias"], bias, rtol=1e-5, atol=1e-6)
    assert (params["encoder"] == 1).all()
    assert params.keys() == {"encoder", "head"}  # statistics are not trained


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Return the workdir of a short pretraining."""
    workdir = tmp_path_factory.mktemp("pretrained")
    train(mini_runs.mae(total_steps=2, log_every=2), workdir)
    return workdir


@pytest.mark.extras
@pytest.mark.slow
def test_probe_changes_only_statistics_and_head(pretrained, tmp_path, capsys):
    """The encoder keeps its values; the running statistics match its features."""
    config = probe(init_from=str(pretrained), total_steps=3, checkpoint_every=1)
    config.keep_checkpoints = 5
    values = train(config, tmp_path)
    assert values["eval/count"] == 64
    assert 0 <= values["eval/top1"] <= values["eval/top5"] <= 1
    out = capsys.readouterr().out
    assert "matched" in out
    assert "encoder/stages" in out

    saved = [mini_runs.saved_arrays(tmp_path, step) for step in (1, 2, 3)]
    original = mini_runs.saved_arrays(pretrained, 2)["params"]
    params = [items["params"] for items in saved]
    frozen = [name for name in params[0] if name.startswith("encoder/")]
    assert len(frozen) > 30
    for params_of_step in params:
        for name in frozen:
            np.testing.assert_array_equal(params_of_step[name], original[name])
    assert (params[0]["head/kernel"] != params[2]["head/kernel"]).any()

    task = inputs.make_task(config)
    graphdef, *states = split_params(task.build_model())
    model = nnx.merge(
        graphdef,
        *(
            jax.tree_util.tree_map_with_path(
                lambda path, _, item=item: jnp.array(saved[0][item][leaf_name(path)]),
                tree,
            )
            for item, tree in zip(("params", "model_state"), states, strict=True)
        ),
    )
    mean, var = np.zeros(64), np.ones(64)
    for items, batch in zip(saved, inputs.train_batches(config, 0, 3), strict=True):
        features = np.asarray(model.mean_token(task.preprocess(batch)))
        mean += 0.1 * (features.mean(0) - mean)
        var += 0.1 * (features.var(0, ddof=1) - var)
        statistics = items["model_state"]
        assert_allclose(statistics["fc_norm/mean"], mean, rtol=1e-4, atol=1e-5)
        assert_allclose(statistics["fc_norm/var"], var, rtol=1e-4, atol=1e-5)


def test_probe_without_running_norm_is_refused():
    with pytest.raises(ConfigError, match="requires model.running_norm=True"):
        probe(model__running_norm=False)
