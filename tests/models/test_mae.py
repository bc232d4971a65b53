"""The masked autoencoder: visible units, loss of masked units, targets."""

import re
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from networks import (
    compiled,
    mae_run,
    mini,
    pictures,
)
from numpy.testing import assert_allclose, assert_array_equal

from hivit_jax.errors import ConfigError
from hivit_jax.models import positions
from hivit_jax.models.masking import random_masking, visible_units

# Masking


@pytest.mark.parametrize(
    ("units", "ratio", "kept"),
    [(196, 0.75, 49), (196, 0.6, 78), (16, 0.6, 6), (16, 0.9375, 1), (4, 0.5, 2)],
)
def test_visible_units(units, ratio, kept):
    assert visible_units(units, ratio) == kept


@pytest.mark.parametrize("ratio", [0, 1, 1.5, -0.1, 0.0, 1.0])
def test_mask_ratio_out_of_range(ratio):
    message = re.escape(f"mask_ratio={ratio}; expected 0 < mask_ratio < 1")
    with pytest.raises(ConfigError, match=message):
        visible_units(196, ratio)


def test_mask_ratio_that_keeps_nothing():
    with pytest.raises(ConfigError, match="keeps none of 16 .* at most 0.9375"):
        visible_units(16, 0.95)


def test_random_masking():
    noise = np.random.RandomState(0).rand(5, 16)
    ids_shuffle, ids_restore, mask = map(
        np.asarray, random_masking(jnp.asarray(noise), 6)
    )
    for sample in range(5):
        order = sorted(range(16), key=lambda unit: noise[sample, unit])
        assert ids_shuffle[sample].tolist() == order
        assert ids_restore[sample].tolist() == [order.index(unit) for unit in range(16)]
        removed = [float(unit in order[6:]) for unit in range(16)]
        assert mask[sample].tolist() == removed
    assert mask.dtype == np.float32
    assert mask.sum() == 5 * 10


def test_equal_noise_goes_by_unit_number():
    noise = jnp.asarray([[0.5] * 6, [0.5, 0.1, 0.5, 0.1, 0.5, 0.1]])
    ids_shuffle, ids_restore, _ = random_masking(noise, 4)
    assert ids_shuffle.tolist() == [[0, 1, 2, 3, 4, 5], [1, 3, 5, 0, 2, 4]]
    assert ids_restore.tolist() == [[0, 1, 2, 3, 4, 5], [3, 0, 4, 1, 5, 2]]


def kept_units(batch, units, kept):
    rows = [np.random.RandomState(s).permutation(units)[:kept] for s in range(batch)]
    return jnp.asarray(np.stack(rows))


@pytest.mark.slow
def test_stem_processes_units_independently():
    model, images, ids_keep = mini(), pictures((3, 64, 64, 3)), kept_units(3, 16, 5)

    def run(model, images):
        return model.encoder(images), model.encoder(images, ids_keep=ids_keep)

    full, kept = compiled(model, run)(images)
    for stage in range(2):
        cells = (16, 4)[stage]
        every = np.asarray(full[stage]).reshape(3, 16, cells, -1)
        some = np.asarray(kept[stage]).reshape(3, 5, cells, -1)
        expected = np.take_along_axis(every, np.asarray(ids_keep)[:, :, None, None], 1)
        assert_allclose(some, expected, atol=5e-6, rtol=0)
    assert kept[2].shape == (3, 5, 64)
    # Units interact in the main stage.
    main = np.take_along_axis(np.asarray(full[2]), np.asarray(ids_keep)[..., None], 1)
    assert np.abs(main - kept[2]).max() > 0.1


@pytest.mark.parametrize("relative_position", [True, False])
def test_units_kept_in_another_order(relative_position):
    """Keeping every unit in another order permutes the output."""
    model = mini(relative_position=relative_position)
    images, order = pictures((2, 64, 64, 3)), kept_units(2, 16, 16)

    def run(model, images):
        full = model.encoder(images)[-1]
        every = model.encoder(images, ids_keep=order)[-1]
        return every, jnp.take_along_axis(full, order[..., None], 1)

    assert_allclose(*compiled(model, run)(images), atol=2e-5)


@pytest.mark.slow
def test_prediction_does_not_see_removed_units():
    images, noise = pictures((2, 64, 64, 3)), jnp.asarray(reference.noise("x", 2, 16))
    run = compiled(
        mini("mae_hivit_base"), lambda model, images: model(images, noise=noise)
    )
    out = run(images)
    removed = positions.unpatchify(jnp.repeat(out.mask[..., None], 768, -1), (4, 4), 16)
    changed = run(images + removed)
    assert_array_equal(out.pred, changed.pred)
    assert_array_equal(out.latent, changed.latent)
    other = run(images + (1 - removed))
    assert np.abs(out.pred - other.pred).max() > 0.01


@pytest.mark.slow
def test_loss_is_the_mean_over_removed_units():
    images, noise = pictures((3, 64, 64, 3)), jnp.asarray(reference.noise("x", 3, 16))
    options = {"noise": noise, "mask_ratio": 0.6}
    out, image_loss = compiled(
        mini("mae_hivit_base", norm_pix_loss=False),
        lambda model, images: (
            model(images, **options),
            model.image_loss(images, **options),
        ),
    )(images)
    errors = np.square(np.asarray(out.pred) - positions.patchify(images, 16)).mean(-1)
    assert_allclose(out.unit_loss, errors, rtol=1e-5)
    removed = np.asarray(out.mask) == 1
    assert removed.sum() == 3 * 10
    assert_allclose(out.loss, errors[removed].mean(), rtol=1e-5)
    of_each = errors[removed].reshape(3, 10).mean(1)  # all images have equally many
    assert_allclose(image_loss, of_each, rtol=1e-5)


@cache
def masked_runs():
    """Return the key mask and outputs of images before and after changing masked
    pixels.
    """
    images = pictures((3, 64, 64, 3))
    mask = np.ones((3, 16), np.int32)
    mask[0, [2, 7, 15]] = 0
    mask[1, 1:] = 0
    mask[2] = 0
    hidden = jnp.repeat(jnp.asarray(1 - mask, jnp.float32)[..., None], 768, -1)
    changed = images + 3 * positions.unpatchify(hidden, (4, 4), 16)
    run = compiled(
        mini(), lambda model, images: model.encoder(images, key_mask=mask)[-1]
    )
    return mask, np.asarray(run(images)), np.asarray(run(changed))


def test_key_mask_hides_units():
    mask, out, changed = masked_runs()
    for sample in range(2):
        seen = mask[sample] == 1
        assert_array_equal(out[sample, seen], changed[sample, seen])
        assert (out[sample, ~seen] != changed[sample, ~seen]).any(-1).all()


@pytest.mark.slow
def test_wholly_masked_sample():
    """Without any key the softmax is uniform, not NaN."""
    assert np.isfinite(masked_runs()[1]).all()
    attention = mini().encoder.stages[-1][0].attn
    x = pictures((2, 16, 64), "tokens")
    index = positions.relative_position_index(jnp.arange(16), (4, 4))
    out = attention(x, index, key_mask=jnp.asarray([[0] * 16, [1] * 16]))
    values = attention.qkv(x)[:, :, 2].reshape(2, 16, 64)
    uniform = attention.proj(jnp.broadcast_to(values.mean(1, keepdims=True), x.shape))
    assert_allclose(out[0], uniform[0], atol=2e-6)
    assert_array_equal(out[1], attention(x, index)[1])


@pytest.mark.slow
def test_targets_give_the_pixels_back():
    images = pictures((2, 64, 64, 3)) * 0.3 + 0.5
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
def test_only_the_decoder_table_is_fixed():
    gradients = mae_run("float32")[2]
    assert not gradients.pop("decoder_pos_embed").any()
    for name, gradient in gradients.items():
        assert gradient.any(), name
