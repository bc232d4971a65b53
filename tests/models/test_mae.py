"""Tests of the masked autoencoder: visible units, loss of masked units, targets."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from networks import (
    jit_model,
    mini,
    random_array,
    run_small_mae,
)
from numpy.testing import assert_allclose, assert_array_equal

from hivit_jax.models import positions


def random_units(batch, units, count):
    """Return `count` random units of each image, int [batch, count]."""
    rows = [np.random.RandomState(s).permutation(units)[:count] for s in range(batch)]
    return jnp.asarray(np.stack(rows))


@pytest.mark.slow
def test_stem_processes_units_independently():
    model, images = mini(), random_array((3, 64, 64, 3))
    ids_keep = random_units(3, 16, 5)

    def run(model, images):
        return model.encoder(images), model.encoder(images, ids_keep=ids_keep)

    all_outputs, kept_outputs = jit_model(model, run)(images)
    for stage in range(2):
        cells_per_unit = (16, 4)[stage]
        all_cells = np.asarray(all_outputs[stage]).reshape(3, 16, cells_per_unit, -1)
        kept_cells = np.asarray(kept_outputs[stage]).reshape(3, 5, cells_per_unit, -1)
        expected = np.take_along_axis(
            all_cells, np.asarray(ids_keep)[:, :, None, None], 1
        )
        assert_allclose(kept_cells, expected, atol=5e-6, rtol=0)
    assert kept_outputs[2].shape == (3, 5, 64)
    # Units interact in the main stage.
    tokens = np.asarray(all_outputs[2])
    tokens = np.take_along_axis(tokens, np.asarray(ids_keep)[..., None], 1)
    assert np.abs(tokens - kept_outputs[2]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("relative_position", [True, False])
def test_tokens_have_the_order_of_ids_keep(relative_position):
    """If `ids_keep` lists all units in another order, the output has this order."""
    model = mini(relative_position=relative_position)
    images, order = random_array((2, 64, 64, 3)), random_units(2, 16, 16)

    def run(model, images):
        tokens = model.encoder(images)[-1]
        reordered = model.encoder(images, ids_keep=order)[-1]
        return reordered, jnp.take_along_axis(tokens, order[..., None], 1)

    assert_allclose(*jit_model(model, run)(images), atol=2e-5)


@pytest.mark.slow
def test_prediction_ignores_masked_pixels():
    images, noise = (
        random_array((2, 64, 64, 3)),
        jnp.asarray(reference.noise("x", 2, 16)),
    )
    run = jit_model(
        mini("mae_hivit_base"), lambda model, images: model(images, noise=noise)
    )
    out = run(images)
    unit_masks = jnp.repeat(out.mask[..., None], 768, -1)
    pixel_mask = positions.unpatchify(unit_masks, (4, 4), 16)
    changed = run(images + pixel_mask)
    assert_array_equal(out.pred, changed.pred)
    assert_array_equal(out.latent, changed.latent)
    changed_visible = run(images + (1 - pixel_mask))
    assert np.abs(out.pred - changed_visible.pred).max() > 0.01


@pytest.mark.slow
def test_loss_is_the_mean_over_masked_units():
    images, noise = (
        random_array((3, 64, 64, 3)),
        jnp.asarray(reference.noise("x", 3, 16)),
    )
    options = {"noise": noise, "mask_ratio": 0.6}
    out, image_loss = jit_model(
        mini("mae_hivit_base", norm_pix_loss=False),
        lambda model, images: (
            model(images, **options),
            model.image_loss(images, **options),
        ),
    )(images)
    errors = np.square(np.asarray(out.pred) - positions.patchify(images, 16)).mean(-1)
    assert_allclose(out.unit_loss, errors, rtol=1e-5)
    masked = np.asarray(out.mask) == 1
    assert masked.sum() == 3 * 10
    assert_allclose(out.loss, errors[masked].mean(), rtol=1e-5)
    expected = errors[masked].reshape(3, 10).mean(1)  # 10 masked units per image
    assert_allclose(image_loss, expected, rtol=1e-5)


@cache
def outputs_with_key_mask():
    """Return a key mask [3, 16], and outputs before and after hidden pixels change."""
    images = random_array((3, 64, 64, 3))
    mask = np.ones((3, 16), np.int32)
    mask[0, [2, 7, 15]] = 0
    mask[1, 1:] = 0
    mask[2] = 0
    hidden = jnp.repeat(jnp.asarray(1 - mask, jnp.float32)[..., None], 768, -1)
    changed = images + 3 * positions.unpatchify(hidden, (4, 4), 16)
    run = jit_model(
        mini(), lambda model, images: model.encoder(images, key_mask=mask)[-1]
    )
    return mask, np.asarray(run(images)), np.asarray(run(changed))


@pytest.mark.slow
def test_key_mask_hides_units():
    mask, out, changed = outputs_with_key_mask()
    for sample in range(2):
        visible = mask[sample] == 1
        assert_array_equal(out[sample, visible], changed[sample, visible])
        assert (out[sample, ~visible] != changed[sample, ~visible]).any(-1).all()


@pytest.mark.slow
def test_sample_without_visible_units_has_uniform_attention():
    """The attention of a sample whose units are all hidden is uniform, not NaN."""
    assert np.isfinite(outputs_with_key_mask()[1]).all()
    attention = mini().encoder.stages[-1][0].attn
    x = random_array((2, 16, 64), "tokens")
    index = positions.relative_position_index(jnp.arange(16), (4, 4))
    out = attention(x, index, key_mask=jnp.asarray([[0] * 16, [1] * 16]))
    values = attention.qkv(x)[:, :, 2].reshape(2, 16, 64)
    uniform = attention.proj(jnp.broadcast_to(values.mean(1, keepdims=True), x.shape))
    assert_allclose(out[0], uniform[0], atol=2e-6)
    assert_array_equal(out[1], attention(x, index)[1])


@pytest.mark.slow
def test_mean_and_scale_convert_targets_to_pixels():
    images = random_array((2, 64, 64, 3)) * 0.3 + 0.5
    units = np.asarray(positions.patchify(images, 16), np.float64)
    model = mini("mae_hivit_base")
    target, mean, scale = model.targets(images)
    assert_allclose(target * scale + mean, units, atol=1e-6)
    assert_allclose(mean[..., 0], units.mean(-1), atol=1e-6)
    assert_allclose(scale[..., 0], np.sqrt(units.var(-1, ddof=1) + 1e-6), rtol=1e-5)
    assert_allclose(np.asarray(target).var(-1, ddof=1), 1, rtol=1e-3)
    model = mini("mae_hivit_base", norm_pix_loss=False)
    target, mean, scale = model.targets(images)
    assert_array_equal(target, positions.patchify(images, 16))
    assert not mean.any()
    assert (scale == 1).all()


@pytest.mark.slow
def test_all_parameters_except_decoder_positions_have_gradients():
    gradients = run_small_mae("float32")[2]
    assert not gradients.pop("decoder_pos_embed").any()
    for name, gradient in gradients.items():
        assert gradient.any(), name
