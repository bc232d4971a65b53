"""Tests of weights adapted to another image size, task or number of channels."""

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from networks import bicubic_like_torch, jit_model, mini, params_by_name, random_array
from numpy.testing import assert_allclose, assert_array_equal

import hivit_jax
from hivit_jax.weights.adapt import check_fit, match_arrays
from hivit_jax.weights.load import read


def resize_table(table, grid, new_grid):
    """Resize a table [rows * columns, D] from one grid to another."""
    maps = table.reshape(*grid, -1).astype(np.float64)
    return bicubic_like_torch(maps, new_grid).reshape(new_grid[0] * new_grid[1], -1)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 96), (32, 160), (96, 64)])
def test_tables_are_resized_to_another_image_size(size, tmp_path, capsys):
    """Tables of 4 x 6 units are resized to any other grid; nothing else changes.

    A grid of 6 x 4 units counts as another grid, although its number of units is equal.
    """
    model = mini("hivit_base", image_size=(64, 96))
    hivit_jax.save_pretrained(model, tmp_path)
    capsys.readouterr()
    loaded = hivit_jax.load_pretrained(tmp_path, image_size=size)
    saved_params, loaded_params = params_by_name(model), params_by_name(loaded)
    grid = size[0] // 16, size[1] // 16
    is_same_grid = grid == (4, 6)
    table_sizes = (7, 11), (2 * grid[0] - 1, 2 * grid[1] - 1)
    for name, array in loaded_params.items():
        if name.endswith("absolute_pos_embed") and not is_same_grid:
            expected = resize_table(saved_params[name], (4, 6), grid)
        elif name.endswith("bias_table") and not is_same_grid:
            expected = resize_table(saved_params[name], *table_sizes)
        else:
            assert_array_equal(array, saved_params[name], name)
            continue
        assert array.dtype == np.float32
        assert_allclose(array, expected, atol=1e-6, err_msg=name)
    out = capsys.readouterr().out
    assert ("resized" in out) == (not is_same_grid)
    if not is_same_grid:
        assert " 3  encoder/absolute_pos_embed 1, encoder/stages 2" in out
        logits = jit_model(loaded, lambda m, x: m(x))(random_array((2, *size, 3)))
        assert np.isfinite(logits).all()


@pytest.mark.slow
def test_pretraining_continues_at_another_image_size(tmp_path):
    hivit_jax.save_pretrained(mini("mae_hivit_base"), tmp_path)
    loaded = hivit_jax.load_pretrained(tmp_path, image_size=(64, 128))
    run = jit_model(loaded, lambda m, images, noise: m(images, noise=noise))
    out = run(random_array((2, 64, 128, 3)), jnp.asarray(reference.noise("x", 2, 32)))
    assert out.pred.shape == (2, 32, 768)
    assert np.isfinite(out.loss)


@pytest.mark.slow
def test_tables_of_a_small_image_fit_windows_of_a_larger_image(tmp_path):
    model = mini("hivit_base")
    hivit_jax.save_pretrained(model, tmp_path)
    loaded = hivit_jax.load_pretrained(
        tmp_path, image_size=128, window_size=4, global_blocks=(1,), num_classes=7
    )
    saved_params, loaded_params = params_by_name(model), params_by_name(loaded)
    name = "encoder/stages/2/{}/attn/relative_position_bias_table"
    assert_array_equal(loaded_params[name.format(0)], saved_params[name.format(0)])
    assert loaded_params[name.format(1)].shape == (15 * 15, 2)
    # With another number of classes, only the head is new.
    assert loaded_params["head/kernel"].shape == (64, 7)
    assert loaded_params["head/kernel"].std() == pytest.approx(2e-5, rel=0.15)
    assert not loaded_params["head/bias"].any()
    assert_array_equal(loaded_params["fc_norm/scale"], saved_params["fc_norm/scale"])


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "new_channels"), [(3, 1), (3, 4), (1, 3), (2, 5)])
def test_gray_images_give_equal_logits_with_other_channels(
    channels, new_channels, tmp_path
):
    model = mini("hivit_base", in_channels=channels)
    hivit_jax.save_pretrained(model, tmp_path)
    loaded = hivit_jax.load_pretrained(tmp_path, in_channels=new_channels)
    gray = random_array((2, 64, 64, 1))
    logits = [
        jit_model(network, lambda m, x: m(x))(jnp.repeat(gray, count, -1))
        for network, count in ((model, channels), (loaded, new_channels))
    ]
    assert_allclose(logits[0], logits[1], atol=1e-5)


@pytest.mark.slow
def test_other_channels_of_pretraining_need_a_new_prediction_layer(tmp_path):
    hivit_jax.save_pretrained(mini("mae_hivit_base"), tmp_path)
    loaded = hivit_jax.load_pretrained(tmp_path, in_channels=4)
    kernel = params_by_name(loaded)["decoder_pred/kernel"]
    assert kernel.shape == (32, 16 * 16 * 4)
    assert kernel.std() == pytest.approx(0.02, rel=0.05)


@pytest.mark.slow
def test_classifier_loads_a_pretrained_encoder(tmp_path, capsys):
    model = mini("mae_hivit_base")
    hivit_jax.save_pretrained(model, tmp_path)
    loaded = hivit_jax.load_pretrained(tmp_path, name="hivit_base", num_classes=7)
    saved_params, loaded_params = params_by_name(model), params_by_name(loaded)
    for name, array in loaded_params.items():
        if name.endswith("relative_position_bias_table"):
            assert not array.any()
        elif name.startswith("encoder/"):
            assert_array_equal(array, saved_params[name])
    assert loaded_params["head/kernel"].shape == (64, 7)
    assert loaded_params["head/kernel"].std() == pytest.approx(2e-5, rel=0.15)
    assert (loaded_params["fc_norm/scale"] == 1).all()
    out = capsys.readouterr().out
    assert "encoder/stages 2 (relative position tables)\n" in out
    for outcome in ("matched", "unused", "zero_init", "newly_initialized"):
        assert f"  {outcome} " in out


def test_fresh_parameters_are_newly_initialized(tmp_path):
    """The prefixes of a task may name any parameters, not only those of the head."""
    model, name = mini("hivit_base"), "encoder/absolute_pos_embed"
    hivit_jax.save_pretrained(model, tmp_path)
    pretrained = read(tmp_path)
    arrays, report = match_arrays(pretrained, model, fresh=(name, "encoder/merges/"))
    assert all(n == name or "/merges/" in n for n in report.newly_initialized)
    assert len(report.newly_initialized) == 7
    assert {*report.newly_initialized}.isdisjoint(arrays)
    check_fit(pretrained, model, report)
