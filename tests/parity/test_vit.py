"""Tests of plain ViT against outputs of the official MAE code, in float32."""

import jax.numpy as jnp
import numpy as np
import pytest
import vit
from flax import nnx
from networks import abstract_model
from reference import (
    assert_close,
    classifier_gradients,
    golden,
    official_shapes,
    pretraining_gradients,
    shrink,
)
from vit import FIXTURES

from hivit_jax.models.masking import random_masking
from hivit_jax.models.resize import resize_grid_table
from hivit_jax.weights.names.official import from_official, to_state_dict

CLASSIFIERS = ["vit_cls_mini", "vit_cls_mini_token"]


def mae_inputs(fixture):
    """Return the images and the noise of a fixture."""
    tag, batch, size = FIXTURES[fixture]["input"]["images"]
    images = jnp.asarray(vit.images(tag, batch, size))
    return images, jnp.asarray(vit.noise(*FIXTURES[fixture]["input"]["noise"]))


def run_mae(fixture):
    """Return model, loss computed in two ways, outputs, gradients by official name."""
    model, params = vit.build(fixture)
    inputs = mae_inputs(fixture)
    both_losses, out, gradients = pretraining_gradients(model, params, *inputs)
    assert not gradients.pop("pos_embed").any()
    assert not gradients.pop("decoder_pos_embed").any()
    return model, both_losses, out, gradients


@pytest.mark.slow
def test_vit_mini_mae_reproduces_official_outputs_and_gradients():
    model, both_losses, out, gradients = run_mae("mae_vit_mini")
    arrays = golden("mae_vit_mini")
    assert_close(both_losses, [FIXTURES["mae_vit_mini"]["loss_f64"]] * 2, 1e-6)
    assert_close(out.pred, arrays["pred"], 2e-5)
    assert_close(out.latent, arrays["latent"], 2e-5)
    np.testing.assert_array_equal(out.mask, arrays["mask"])
    images, noise = mae_inputs("mae_vit_mini")
    ids_shuffle, ids_restore, _ = random_masking(noise, 4)
    np.testing.assert_array_equal(ids_shuffle[:, :4], arrays["ids_keep"])
    np.testing.assert_array_equal(ids_restore, arrays["ids_restore"])
    assert_close(model.targets(images)[0][0], arrays["target0_norm"], 2e-5)
    x = model.encoder._stem(images, ids_shuffle[:, :4])[0]
    assert_close(x, arrays["tokens_in"], 2e-5)
    for block_index, block in enumerate(model.encoder.stages[-1]):
        x = block(x)
        assert_close(x, arrays[f"block{block_index}"], 2e-5)
    vit.check_gradients("mae_vit_mini", gradients, 3e-6, 2e-4)


@pytest.mark.slow
def test_mini_mae_of_raw_pixels_reproduces_official_outputs_and_gradients():
    model, both_losses, out, gradients = run_mae("mae_vit_mini_pix")
    assert_close(both_losses, [FIXTURES["mae_vit_mini_pix"]["loss_f64"]] * 2, 1e-6)
    assert_close(out.pred, golden("mae_vit_mini")["pred"], 2e-5)
    images, _ = mae_inputs("mae_vit_mini")
    raw = golden("mae_vit_mini")["target0_raw"]
    assert_close(model.targets(images)[0][0], raw, 0)
    vit.check_gradients("mae_vit_mini_pix", gradients, 3e-6, 2e-4)


def classifier_inputs(fixture):
    """Return the images and the labels of a fixture."""
    inputs = FIXTURES[fixture]["input"]
    images = jnp.asarray(vit.images(*inputs["images"]))
    return images, jnp.asarray(vit.labels(*inputs["labels"]))


def run_classifier(fixture, state=None):
    """Return model, loss, logits and gradients by official name."""
    model, params = vit.build(fixture, state)
    inputs = classifier_inputs(fixture)
    return model, *classifier_gradients(model, params, *inputs)


@pytest.mark.slow
@pytest.mark.parametrize("fixture", CLASSIFIERS)
def test_vit_mini_classifier_reproduces_official_outputs_and_gradients(fixture):
    model, loss, logits, gradients = run_classifier(fixture)
    arrays = golden(fixture)
    assert_close(loss, FIXTURES[fixture]["loss_f64"], 1e-6)
    assert_close(logits, arrays["logits"], 2e-5)
    vit.check_gradients(fixture, gradients, 3e-6, 2e-4)
    if "pooled" in arrays:
        images, _ = classifier_inputs(fixture)
        assert_close(model.mean_token(images), arrays["pooled"], 2e-5)
        assert_close(model.pooled(images), arrays["fc_norm"], 2e-5)
        layers = model.layers(images)
        assert_close(layers[0].tokens, arrays["block0"], 2e-5)
        assert_close(layers[1].tokens, arrays["block1"], 2e-5)


@pytest.mark.slow
def test_every_vit_layer_norm_has_the_official_eps():
    """With these weights, eps=1e-5 in a single norm changes outputs by more than 1."""
    arrays, parts = golden("vit_lowvar_eps"), FIXTURES["vit_lowvar_eps"]["shrunk"]
    state = shrink(vit.state_dict("vit_cls_mini"), parts)
    model, _ = vit.build("vit_cls_mini", state)
    assert_close(
        model(classifier_inputs("vit_cls_mini")[0]), arrays["cls_logits"], 2e-5
    )
    state = shrink(vit.state_dict("mae_vit_mini"), parts)
    model, _ = vit.build("mae_vit_mini", state)
    images, noise = mae_inputs("mae_vit_mini")
    out = model(images, noise=noise)
    assert_close(out.loss, arrays["mae_loss"], 1e-6)
    assert_close(out.pred[..., :64], arrays["mae_pred"], 2e-5)
    assert_close(out.latent, arrays["mae_latent"], 2e-5)


@pytest.mark.parametrize(("side", "new_side"), [(4, 6), (4, 3), (14, 12), (14, 24)])
def test_resized_position_tables_equal_the_official_ones(side, new_side):
    """The official code resizes all rows except that of the class token."""
    table = vit.weight(f"resize{side}.pos_embed", (1, 1 + side * side, 6))[0]
    expected = golden("vit_pos_resize")[f"pos_{side}_to_{new_side}"][0]
    np.testing.assert_array_equal(table[0], expected[0])
    resized = resize_grid_table(table[1:], (side, side), (new_side, new_side))
    assert_close(resized, expected[1:], 1e-5)


def shapes_of(name, **overrides):
    """Return {official name: shape} of a full-size model."""
    return official_shapes(abstract_model(name, **overrides), to_state_dict)


@pytest.mark.extras
@pytest.mark.slow
@pytest.mark.parametrize("fixture", ["vit_base_cls", "vit_base_token"])
def test_vit_base_classifier_reproduces_official_outputs(fixture):
    name, config = vit.arguments(fixture)
    state = vit.state_dict(fixture, shapes_of(name, **config))
    if fixture == "vit_base_token":
        model, _ = vit.build(fixture, state)
        images = vit.images(*FIXTURES[fixture]["input"]["images"])
        logits = nnx.jit(model)(jnp.asarray(images))
    else:
        _, loss, logits, gradients = run_classifier(fixture, state)
        assert_close(loss, FIXTURES[fixture]["loss_f64"], 1e-6)
        vit.check_gradients(fixture, gradients, 0, 2e-4)
    assert_close(logits, golden(fixture)["logits"], 2e-5)


@pytest.mark.extras
@pytest.mark.slow
def test_vit_base_mae_reproduces_official_outputs_and_gradients(monkeypatch):
    shapes = shapes_of("mae_vit_base")
    monkeypatch.setitem(FIXTURES["mae_vit_base"], "state_dict", shapes)
    _, both_losses, out, gradients = run_mae("mae_vit_base")
    arrays = golden("mae_vit_base")
    assert_close(both_losses, [FIXTURES["mae_vit_base"]["loss_f64"]] * 2, 1e-6)
    np.testing.assert_array_equal(out.mask, arrays["mask"])
    assert_close(out.pred[:, [0, 1, 97, 195], ::16], arrays["pred_slice"], 2e-5)
    assert_close(out.pred.mean(-1), arrays["pred_mean_per_token"], 2e-5)
    vit.check_gradients("mae_vit_base", gradients, 0, 2e-4)


@pytest.mark.parametrize("fixture", ["mae_vit_mini", *CLASSIFIERS])
def test_official_vit_state_dict_survives_a_round_trip(fixture):
    """Names, shapes and bytes are unchanged."""
    state = vit.state_dict(fixture)
    name, config = vit.arguments(fixture)
    model = abstract_model(name, **config)
    back = to_state_dict(from_official(state, model), model)
    assert back.keys() == state.keys()
    for name, array in state.items():
        assert array.shape == back[name].shape, name
        assert array.tobytes() == back[name].tobytes(), name
