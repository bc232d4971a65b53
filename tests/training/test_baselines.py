"""Tests that ViT and Swin train like the official code: optimizers and schedules."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import mini_runs
import numpy as np
import optax
import pytest
import reference
import swin
import vit
from flax import nnx
from networks import unoptimized_jit

from hivit_jax import inputs
from hivit_jax.training.optimizer import make_optimizer
from hivit_jax.training.schedule import make_schedule
from hivit_jax.tree import split, split_params
from hivit_jax.weights.names.official import to_official

# Recipe -> (golden file, prefix of its arrays, helper, keys of `config.optimizer` that
# select the official schedule).
TRAJECTORIES = {
    "mae_vit": ("vit_trajectories", "mae", vit, dict(schedule="cosine")),
    "finetune_vit": ("vit_trajectories", "ft", vit, dict(schedule="cosine")),
    "simmim_swin:base_100": (
        "swin_trajectories",
        "simmim",
        swin,
        dict(schedule="cosine_from_start"),
    ),
}
# Prefix of the arrays -> section of the golden facts, where the names differ.
SECTIONS = {"ft": "finetune"}


def options_of(facts, **keys):
    """Return `config.optimizer` of a trajectory, with unscaled learning rates."""
    return SimpleNamespace(
        base_learning_rate=facts["lr"],
        lr_batch=0,
        min_learning_rate=facts["min_lr"],
        warmup_learning_rate=facts.get("warmup_lr", 0.0),
        warmup_epochs=facts["warmup_epochs"],
        first_epoch=0,
        betas=facts["betas"],
        weight_decay=facts["weight_decay"],
        layer_decay=facts.get("layer_decay", 1.0),
        clip_norm=facts.get("clip", 0.0),
        first_moment_dtype="float32",
        **keys,
    )


def training_setup(fixture_name, helper):
    """Return model, loss function, parameters, and converter to official names."""
    model, _ = helper.build(fixture_name)
    graphdef, params, tables = split_params(model)
    input_facts = helper.FIXTURES[fixture_name]["input"]
    if helper is swin:
        images = swin.fixture_images(fixture_name)
    else:
        images = jnp.asarray(vit.images(*input_facts["images"]))
    noise = (
        jnp.asarray(helper.noise(*input_facts["noise"]))
        if "noise" in input_facts
        else None
    )
    labels = helper.labels(*input_facts["labels"]) if "labels" in input_facts else None

    def loss(params):
        model = nnx.merge(graphdef, params, tables)
        if noise is not None:
            return model.image_loss(images, noise=noise).mean()
        logits = model(images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    def official(params):
        merged = nnx.merge(graphdef, params, tables)
        return to_official(split(merged)[1], model)

    return model, loss, params, official


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TRAJECTORIES)
def test_eight_steps_equal_the_official_ones(recipe):
    """Losses, gradient norms, learning rates and final parameters are equal."""
    name, prefix, helper, keys = TRAJECTORIES[recipe]
    arrays = reference.golden(name)
    facts = helper.FIXTURES[name][SECTIONS.get(prefix, prefix)]
    model, loss_fn, params, official = training_setup(facts["fixture"], helper)
    options, task = (
        options_of(facts, **keys),
        inputs.task_of_recipe(mini_runs.recipe(recipe)),
    )
    schedule = make_schedule(options, 1, 2, 2 * facts["epochs"])
    layers = model.layer_ids() if options.layer_decay != 1 else {}
    transform = make_optimizer(options, schedule, task.is_decayed, layers)

    @unoptimized_jit
    def step(params, opt_state):
        loss, gradient = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = transform.update(gradient, opt_state, params)
        norm = optax.tree.norm(gradient)
        return optax.apply_updates(params, updates), opt_state, loss, norm

    opt_state, losses, norms = transform.init(params), [], []
    for _ in range(9):  # of the ninth step only the loss counts
        previous_params = params
        params, opt_state, loss, norm = step(params, opt_state)
        losses.append(loss)
        norms.append(norm)
    final = official(previous_params)  # after eight steps
    # In float32, 1 - 0.999 ** step of Adam's bias correction has an error of 3e-5.
    atol = 5e-6 if options.betas[1] == 0.95 else 3e-5
    np.testing.assert_allclose(losses, arrays[f"{prefix}_losses"], atol=atol)
    rates = [schedule(number) for number in range(8)]
    np.testing.assert_allclose(rates, arrays[f"{prefix}_lrs"], rtol=1e-5, atol=1e-9)
    if f"{prefix}_grad_norms" in arrays:
        expected = arrays[f"{prefix}_grad_norms"]
        np.testing.assert_allclose(norms[:8], expected, rtol=2e-5)
    for key in [key for key in arrays if key.startswith(f"{prefix}_final/")]:
        array = final[key.removeprefix(f"{prefix}_final/")]
        np.testing.assert_allclose(array, arrays[key], atol=3e-5, err_msg=key)


@pytest.mark.parametrize(
    ("recipe", "title", "steps_late"),
    [
        ("simmim_swin:base_100", "simmim pretrain swin_base 100 (cosine)", 0),
        ("simmim_swin", "simmim pretrain swin_base 800 (multistep)", 1),
        ("finetune_swin", "simmim finetune swin_base 224 100", 0),
    ],
)
def test_schedules_equal_the_official_ones(recipe, title, steps_late):
    """The learning rates at the first step of each epoch are equal.

    The whole official multistep schedule is one step late, including its warmup.
    """
    facts, config = swin.FACTS["lr_schedules"][title], mini_runs.recipe(recipe)
    per_epoch = facts["iterations_per_epoch"]
    epochs = config.total_epochs
    assert epochs == facts["epochs"]
    total_steps = int(epochs) * per_epoch
    schedule = make_schedule(
        config.optimizer, config.batch_size, per_epoch, total_steps
    )
    for epoch, rate in facts["lr_first_iteration_of_epoch"].items():
        step = max(int(epoch) * per_epoch - steps_late, 0)
        assert float(schedule(step)) == pytest.approx(rate, rel=1e-5), epoch
