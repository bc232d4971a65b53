"""Tests of Swin and SimMIM against outputs of the official code, in float32."""

import jax.numpy as jnp
import numpy as np
import pytest
import swin
from flax import nnx
from networks import abstract_model, unoptimized_jit
from reference import (
    assert_close,
    classifier_gradients,
    golden,
    official_shapes,
    pretraining_gradients,
    shrink,
)
from swin import FIXTURES

from hivit_jax.models import resize
from hivit_jax.models.masking import count_simmim_visible_units, random_masking
from hivit_jax.weights.names.official import from_official, to_state_dict

MINIS = ["swin_mini", "swin_mini_rect", "swin_mini_rect_clamp", "swin_mini_clamp"]


def run_classifier(fixture, state=None):
    """Return model, loss, logits and gradients by official name."""
    model, params = swin.build(fixture, state)
    images = swin.fixture_images(fixture)
    labels = jnp.asarray(swin.labels(*FIXTURES[fixture]["input"]["labels"]))
    return model, *classifier_gradients(model, params, images, labels, unoptimized_jit)


def check_tokens(model, images, arrays, atol):
    """Compare the tokens after the norm, each merge, and each block in `arrays`."""
    layers, compared_blocks = iter(model.layers(images)), 0
    for stage, blocks in enumerate(model.encoder.stages):
        for block in range(len(blocks)):
            x, name = next(layers).tokens, f"stage{stage}_block{block}"
            if name in arrays:
                assert_close(x, arrays[name], atol)
                compared_blocks += 1
        if stage < len(model.encoder.merges):
            x = model.encoder._merge(stage + 1, x)
            assert_close(x, arrays[f"merge{stage}"], atol)
    assert_close(model.norm(x), arrays["norm"], atol)
    assert compared_blocks >= len(model.encoder.stages)


@pytest.mark.slow
@pytest.mark.parametrize("fixture", MINIS)
def test_swin_mini_classifier_reproduces_official_outputs_and_gradients(fixture):
    model, loss, logits, gradients = run_classifier(fixture)
    arrays = golden(fixture)
    assert_close(loss, FIXTURES[fixture]["loss_f64"], 1e-6)
    assert_close(logits, arrays["logits"], 2e-5)
    swin.check_gradients(fixture, gradients, 3e-6, 2e-4)
    check_tokens(model, swin.fixture_images(fixture), arrays, 2e-5)


@pytest.mark.slow
def test_padded_windows_and_odd_grids_reproduce_official_features():
    """Padding precedes the shift, and keys of padding are attended to."""
    state, arrays = swin.state_dict("swin_mini_pad"), golden("swin_mini_pad")
    norms = {name: state.pop(name) for name in [*state] if name.startswith("norm")}
    state |= {f"norm.{x}": norms[f"norm2.{x}"] for x in ("weight", "bias")}
    model, _ = swin.build("swin_mini_pad", state)
    maps = model.features(swin.fixture_images("swin_mini_pad"))
    for stage, x in enumerate(maps):
        scale, bias = (norms[f"norm{stage}.{name}"] for name in ("weight", "bias"))
        deviation = x - x.mean(-1, keepdims=True)
        normalized = deviation / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        expected = arrays[f"pad_then_shift/norm{stage}"]
        assert_close(normalized * scale + bias, expected, 2e-5)


@pytest.mark.slow
def test_every_swin_layer_norm_has_the_official_eps():
    """With these weights, eps=1e-6 in a single norm changes logits by 0.3."""
    parts = FIXTURES["swin_lowvar_eps"]["shrunk"]
    state = shrink(swin.state_dict("swin_mini"), parts)
    model, _ = swin.build("swin_mini", state)
    logits = model(swin.fixture_images("swin_mini"))
    assert_close(logits, golden("swin_lowvar_eps")["logits"], 2e-5)


def simmim_inputs(fixture):
    """Return the images and the noise of a fixture."""
    noise = swin.noise(*FIXTURES[fixture]["input"]["noise"])
    return swin.fixture_images(fixture), jnp.asarray(noise)


def run_simmim(fixture, state=None):
    """Return model, loss computed in two ways, outputs, gradients by official name."""
    model, params = swin.build(fixture, state)
    inputs = simmim_inputs(fixture)
    return model, *pretraining_gradients(model, params, *inputs, unoptimized_jit)


@pytest.mark.slow
def test_mini_simmim_reproduces_official_outputs_and_gradients():
    model, both_losses, out, gradients = run_simmim("simmim_mini")
    arrays = golden("simmim_mini")
    assert_close(both_losses, [FIXTURES["simmim_mini"]["loss_f64"]] * 2, 1e-6)
    zeros, ones = jnp.zeros((2, 16, 1)), jnp.ones((2, 16, 1))
    pixels, _ = model.to_images(out, zeros, ones)
    assert_close(pixels, arrays["rec"], 2e-5)
    assert_close(out.latent, arrays["norm"], 2e-5)
    token_mask = out.mask.reshape(2, 4, 4).repeat(4, 1).repeat(4, 2)
    np.testing.assert_array_equal(token_mask, arrays["mask"])
    images, _ = simmim_inputs("simmim_mini")
    tokens = model.encoder._embed(images, token_mask.reshape(2, -1))
    assert_close(tokens, arrays["tokens_in"], 2e-5)
    swin.check_gradients("simmim_mini", gradients, 3e-6, 2e-4)


@pytest.mark.parametrize("case", FIXTURES["simmim_masks"]["cases"])
def test_masks_equal_the_official_ones(case):
    """The cells with the lowest noise are masked; their number is rounded up."""
    facts = FIXTURES["simmim_masks"]["cases"][case]
    size, cell, patch, ratio = map(float, case.split("_"))
    num_cells, side = facts["cells"], int(size // cell)
    masked_count = num_cells - count_simmim_visible_units(num_cells, ratio)
    assert masked_count == facts["count"]
    noise = jnp.asarray(swin.noise(*facts["noise"]))
    mask = 1 - random_masking(noise, masked_count)[2].reshape(-1, side, side)
    repeated = mask.repeat(int(cell // patch), 1).repeat(int(cell // patch), 2)
    np.testing.assert_array_equal(repeated, golden("simmim_masks")[case])


@pytest.mark.parametrize("case", ["6_to_7", "7_to_12", "12_to_14", "6_to_12", "7_to_6"])
def test_resized_relative_tables_equal_the_official_ones(case):
    side, new_side = map(int, case.split("_to_"))
    arrays = golden("swin_table_resize")
    heads = arrays[f"geometric_{case}"].shape[1]
    name = f"resize{side}_{new_side}.relative_position_bias_table"
    table = swin.weight(name, ((2 * side - 1) ** 2, heads))
    geometric = resize.resize_table_geometrically(table, side, new_side)
    assert_close(geometric, arrays[f"geometric_{case}"], 1e-5)
    bicubic = resize.resize_relative_table(table, (side,) * 2, (new_side,) * 2)
    assert_close(bicubic, arrays[f"bicubic_{case}"], 1e-5)


@pytest.mark.parametrize("fixture", ["swin_mini", "swin_mini_clamp", "simmim_mini"])
def test_official_swin_state_dict_survives_a_round_trip(fixture):
    """Names, shapes and bytes are unchanged; index and mask buffers are recomputed."""
    state = swin.state_dict(fixture)
    name, config = swin.arguments(fixture)
    model = abstract_model(name, **config)
    back = to_state_dict(from_official(state, model), model)
    shapes = FIXTURES[fixture]["state_dict"]
    assert {name: list(array.shape) for name, array in back.items()} == shapes
    for name, array in state.items():
        assert array.tobytes() == back[name].tobytes(), name
    for name, array in golden(fixture).items():
        if name.startswith("mask/"):
            np.testing.assert_array_equal(back[name.removeprefix("mask/")], array)


def shapes_of(fixture):
    """Return {official name: shape} of a full-size model."""
    name, config = swin.arguments(fixture)
    return official_shapes(abstract_model(name, **config))


@pytest.mark.extras
@pytest.mark.slow
@pytest.mark.parametrize("fixture", ["swin_tiny_cls", "swin_small_cls"])
def test_tiny_and_small_classifiers_reproduce_official_logits(fixture):
    model, _ = swin.build(fixture, swin.state_dict(fixture, shapes_of(fixture)))
    logits = nnx.jit(model)(swin.fixture_images(fixture))
    assert_close(logits, golden(fixture)["logits"], 2e-5)


@pytest.mark.extras
@pytest.mark.slow
def test_swin_base_classifier_reproduces_official_outputs_and_gradients():
    state = swin.state_dict("swin_base_cls", shapes_of("swin_base_cls"))
    _, loss, logits, gradients = run_classifier("swin_base_cls", state)
    assert_close(loss, FIXTURES["swin_base_cls"]["loss_f64"], 1e-6)
    assert_close(logits, golden("swin_base_cls")["logits"], 2e-5)
    swin.check_gradients("swin_base_cls", gradients, 0, 2e-4)


@pytest.mark.extras
@pytest.mark.slow
def test_base_simmim_reproduces_official_outputs_and_gradients():
    state = swin.state_dict("simmim_swin_base", shapes_of("simmim_swin_base"))
    model, both_losses, out, gradients = run_simmim("simmim_swin_base", state)
    assert_close(both_losses, [FIXTURES["simmim_swin_base"]["loss_f64"]] * 2, 1e-6)
    arrays, zeros = golden("simmim_swin_base"), jnp.zeros((2, 36, 1))
    pixels, mask = model.to_images(out, zeros, zeros + 1)
    assert_close(pixels[:, ::8, ::8], arrays["rec_slice"], 2e-5)
    np.testing.assert_array_equal(mask[:, ::4, ::4, 0], arrays["mask"])
    # The gradient of an absolute error is its sign, which rounding changes near 0.
    swin.check_gradients("simmim_swin_base", gradients, 0, 2e-4, norm_rtol=5e-5)
