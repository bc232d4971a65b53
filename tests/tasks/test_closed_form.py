"""Tests of the closed-form probe: solution, choice of the penalty, command."""

import mini_runs
import numpy as np
import pytest
from networks import jit_model, mini
from numpy.testing import assert_allclose

import hivit_jax
from hivit_jax import inputs
from hivit_jax.main import main
from hivit_jax.tasks import closed_form
from hivit_jax.tasks.closed_form import fit, held_out_images, select_penalty


def random_features(count=60, classes=4, dim=7):
    """Return features of different scales, one of them constant, and labels."""
    random = np.random.RandomState(3)
    labels = random.randint(0, classes, count)
    features = random.normal(size=(count, dim)) + 0.7 * np.eye(classes, dim)[labels]
    features = features * np.logspace(-2, 2, dim) + np.linspace(-50, 50, dim)
    features[:, 2] = 5
    return features.astype(np.float32), labels


@pytest.mark.parametrize("penalty", [1e-6, 0.1, 100.0])
def test_weights_solve_the_normal_equations(penalty, monkeypatch):
    """The images are processed in chunks of 13."""
    monkeypatch.setattr(closed_form, "CHUNK_SIZE", 13)
    features, labels = random_features()
    x = np.float64(features)
    scale = x.std(0)
    scale[2] = 1
    x = (x - x.mean(0)) / scale
    y = np.eye(4)[labels]
    matrix = x.T @ x / 60 + penalty * np.eye(7)
    expected = np.linalg.solve(matrix, x.T @ (y - y.mean(0)) / 60)
    ridge = fit(features, labels, 4)
    assert_allclose(ridge.weights(penalty), expected, rtol=1e-6, atol=1e-9)
    is_correct = (x @ expected + y.mean(0)).argmax(1) == labels
    assert ridge.accuracy(features, labels, penalty) == (is_correct.mean(), 1.0)


def test_every_fifth_image_of_a_class_is_held_out():
    """If no class has five images, every second image of a class is held out."""
    labels = np.array([1, 0, 1, 1, 0, 1, 1, 1, 2, 1, 1, 1])
    assert np.flatnonzero(held_out_images(labels)).tolist() == [6]
    assert held_out_images(np.zeros(11, int)).nonzero()[0].tolist() == [4, 9]
    assert held_out_images(np.array([0, 1, 0, 1, 1])).nonzero()[0].tolist() == [2, 3]
    assert not held_out_images(np.arange(3)).any()


def test_selected_penalty_has_the_best_held_out_accuracy():
    """Of several best penalties, `select_penalty` returns the largest.

    Without held-out images, `select_penalty` returns the default.
    """
    features, labels = random_features()
    is_held_out = held_out_images(labels)
    ridge = fit(features[~is_held_out], labels[~is_held_out], 4)
    accuracies = [
        ridge.accuracy(features[is_held_out], labels[is_held_out], penalty)[0]
        for penalty in closed_form.PENALTIES
    ]
    penalty, top1 = select_penalty(features, labels, 4)
    assert top1 == max(accuracies) > min(accuracies)
    index = closed_form.PENALTIES.index(penalty)
    accuracies_of_larger_penalties = accuracies[index + 1 :]
    assert max(accuracies_of_larger_penalties, default=0) < top1
    penalty, top1 = select_penalty(features[:3], np.arange(3), 4)
    assert penalty == closed_form.DEFAULT_PENALTY
    assert np.isnan(top1)


@pytest.mark.slow
def test_probe_command_evaluates_all_test_digits(tmp_path, minimal_output, capsys):
    """The metrics equal those of `fit` on features that the test computes itself."""
    sizes = dict(image_size=16, in_channels=1, patch_size=4, depths=(1, 1, 1))
    model = mini(relative_position=False, **sizes)
    hivit_jax.save_pretrained(model, tmp_path)
    config = mini_runs.without_decoder(
        "digits",
        task="linear_probe",
        init_from=str(tmp_path),
        model__depths="(1,1,1)",
        data__train_examples=100,
        batch_size=56,  # divides neither 100 training nor 360 test images
        mesh__data=-1,
    )
    metrics = closed_form.closed_form_probe(config)
    encode = jit_model(model, lambda model, images: model.encoder(images)[-1])
    splits = []
    mean, std = config.data.mean, config.data.std
    for split in ("train", "test"):
        source = inputs.open_source(config.data, split)
        parts = []
        for batch in inputs.eval_batches(config, split):
            images = (np.float32(batch["image"]) / 255 - mean) / np.float32(std)
            tokens = np.float64(encode(np.float32(images))).mean(1)
            parts.append(tokens[batch["weight"] > 0])
        splits.append((np.float32(np.concatenate(parts)), source.labels))
    penalty = select_penalty(*splits[0], 10)[0]
    assert metrics["probe/penalty"] == penalty
    top1, top5 = fit(*splits[0], 10).accuracy(*splits[1], penalty)
    assert (metrics["eval/count"], metrics["eval/unreadable"]) == (360, 0)
    assert abs(metrics["eval/top1"] - top1) <= 1 / 360
    assert abs(metrics["eval/top5"] - top5) <= 1 / 360
    assert f"penalty {penalty:g}  eval  top1 " in capsys.readouterr().out
    recipe = mini_runs.ROOT / "configs" / "digits_linear.py"
    flags = [f"--config={recipe}", f"--config.init_from={tmp_path / 'absent'}"]
    # The absent model gives exit code 5. The recipe's batch size of 50 gives no error,
    # although eight devices do not divide it.
    assert main([*flags, "--mode=probe"]) == 5
