"""Tests of HiViT against outputs of the official code and MMPretrain, in float32."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from reference import (
    FIXTURES,
    assert_close,
    check_gradients,
    classifier_gradients,
    golden,
    pretraining_gradients,
    shrink,
)

from hivit_jax.models.masking import random_masking
from hivit_jax.models.positions import (
    merge_order,
    patchify,
    relative_position_index,
    tokens_to_map,
    units_to_cells,
    unpatchify,
)
from hivit_jax.tree import split
from hivit_jax.weights.names.official import latent_order

MINI_MAES = ["mae_mini", "mae_mini_rpe", "mae_mini_nohifeat", "mae_mini_nohifeat_rpe"]


def intermediate_arrays(model, images, ids_keep=None):
    """Run our model; return its intermediate arrays with golden names and shapes."""
    encoder, recorded = model.encoder, {}
    batch_size, inner = images.shape[0], encoder.config.inner_patches
    num_kept = (
        encoder.absolute_pos_embed.shape[0] if ids_keep is None else ids_keep.shape[1]
    )

    def record(name, x, inner):
        count = len(x) // (batch_size * inner * inner)
        cells = tokens_to_map(x, (count, 1), inner)  # units stacked in one column
        recorded[name] = cells.reshape(batch_size, count, inner, inner, -1)

    patches = patchify(images, encoder.config.patch_size)
    # The official code embeds all units and drops the masked ones after that.
    all_units = encoder.patch_embed(
        units_to_cells(patches, encoder.config.patch_size, inner)
    )
    record("patch_embed", all_units, inner)
    position = encoder.absolute_pos_embed[...]
    if ids_keep is not None:
        patches = jnp.take_along_axis(patches, ids_keep[:, :, None], 1)
        position = position[ids_keep]
    x = encoder.patch_embed(units_to_cells(patches, encoder.config.patch_size, inner))
    for stage, (blocks, merge) in enumerate(
        zip(encoder.stages, encoder.merges, strict=False), 1
    ):
        for block in blocks:
            x = block(x)
        record(f"stage{stage}", x, inner)
        x, inner = merge(x), inner // 2
        record(f"merge{stage}", x, inner)
    x = x.reshape(batch_size, num_kept, -1) + position
    recorded["pos_added"] = x
    ids = jnp.arange(num_kept) if ids_keep is None else ids_keep
    index = relative_position_index(ids, encoder.grid)
    depth = len(encoder.stages[-1])
    names = {
        0: "main_first",
        depth // 2 - 1: "main_mid",
        depth - 1: "main_last",
    }
    for block_index, block in enumerate(encoder.stages[-1]):
        x = block(x, relative_index=index)
        if block_index in names:
            recorded[names[block_index]] = x
    if hasattr(model, "fc_norm"):
        recorded["pooled"] = x.mean(1)
        recorded["fc_norm"] = model.fc_norm(recorded["pooled"])
    return recorded


def check_intermediate_arrays(recorded, arrays):
    """Check means, deviations and slices of recorded arrays against golden values."""
    assert set(arrays["stage_names"]) == set(recorded)
    for index, name in enumerate(arrays["stage_names"]):
        x = np.asarray(recorded[name])
        assert_close(x.mean(), arrays["stage_mean"][index], 2e-5)
        assert_close(x.std(), arrays["stage_std"][index], 2e-5)
        assert_close(x.mean(tuple(range(x.ndim - 1))), arrays[f"chanmean/{name}"], 2e-5)
        selection = x if x.ndim == 2 else x[:, [0, 1, 17, -1]]
        selection = selection[..., : {2: None, 3: 16, 5: 8}[x.ndim]]
        assert_close(selection, arrays[f"slice/{name}"], 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "size",
    ["tiny", *(pytest.param(s, marks=pytest.mark.extras) for s in ("small", "base"))],
)
def test_classifier_reproduces_official_logits_and_stages(size):
    model, _ = reference.build_fixture(f"cls_{size}")
    arrays = golden(f"cls_{size}")
    images = jnp.asarray(reference.images("cls224", 2, 224))
    graphdef, params = split(model)

    @jax.jit
    def run(params, images):
        model = nnx.merge(graphdef, params)
        return model(images), intermediate_arrays(model, images)

    logits, recorded = run(params, images)
    assert_close(logits, arrays["logits"], 2e-5)
    check_intermediate_arrays(recorded, arrays)


@pytest.mark.extras
@pytest.mark.slow
def test_classifier_reproduces_the_logits_of_mmpretrain():
    state = reference.state_dict("mmpretrain_tiny")
    model, _ = reference.build("hivit_tiny", state, fc_norm=False, layer_norm_eps=1e-5)
    logits = nnx.jit(model)(jnp.asarray(reference.images("cls224", 2, 224)))
    assert_close(logits, golden("mmpretrain_tiny")["logits"], 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fixture", MINI_MAES)
def test_hivit_mini_mae_reproduces_official_outputs_and_gradients(fixture):
    model, params = reference.build_fixture(fixture)
    arrays, facts = golden(fixture), FIXTURES[fixture]
    images = jnp.asarray(reference.images("mini64", 3, 64))
    noise = jnp.asarray(reference.noise("mini64", 3, 16))
    both_losses, out, gradients = pretraining_gradients(model, params, images, noise)

    assert_close(both_losses, [facts["loss_f64"]] * 2, 2e-6)
    assert_close(out.pred, arrays["pred"], 2e-5)
    np.testing.assert_array_equal(out.mask, arrays["mask"])
    latent = np.asarray(out.latent)
    if model.config.multi_scale:
        latent = latent[..., np.argsort(latent_order(model.config))]
    assert_close(latent, arrays["latent"], 2e-5)

    ids_shuffle, ids_restore, _ = random_masking(noise, 4)
    np.testing.assert_array_equal(ids_shuffle[:, :4], arrays["ids_keep"])
    np.testing.assert_array_equal(ids_restore, arrays["ids_restore"])

    assert not gradients.pop("decoder_pos_embed").any()
    check_gradients(FIXTURES, fixture, gradients, 2e-6, 1e-5, norm_rtol=1e-4)


@pytest.mark.extras
@pytest.mark.slow
def test_hivit_base_mae_reproduces_official_outputs_and_gradients():
    model, params = reference.build_fixture("mae_base")
    arrays, facts = golden("mae_base"), FIXTURES["mae_base"]
    images = jnp.asarray(reference.images("mae224", 2, 224))
    noise = jnp.asarray(reference.noise("mae224", 2, 196))
    both_losses, out, gradients = pretraining_gradients(model, params, images, noise)

    assert_close(both_losses, [facts["loss_f64"]] * 2, 2e-6)
    np.testing.assert_array_equal(out.mask, arrays["mask"])
    pred, latent = np.asarray(out.pred), np.asarray(out.latent)
    latent = latent[..., np.argsort(latent_order(model.config))]
    assert_close(pred[0, ::4], arrays["pred_sample0_every4"], 2e-5)
    assert_close(pred.mean(-1), arrays["pred_tokmean"], 2e-5)
    assert_close(pred.std(-1), arrays["pred_tokstd"], 2e-5)
    assert_close(pred.mean((0, 1)), arrays["pred_chanmean"], 2e-5)
    assert_close(latent[:, :4], arrays["latent_first4"], 2e-5)
    assert_close(latent.mean(-1), arrays["latent_tokmean"], 2e-5)
    assert_close(latent.std(-1), arrays["latent_tokstd"], 2e-5)
    assert_close(latent.mean((0, 1)), arrays["latent_chanmean"], 2e-5)
    ids_keep = random_masking(noise, 49)[0][:, :49]
    np.testing.assert_array_equal(ids_keep, arrays["ids_keep"])
    run = jax.jit(lambda images: intermediate_arrays(model, images, ids_keep))
    check_intermediate_arrays(run(images), arrays)

    assert not gradients.pop("decoder_pos_embed").any()
    check_gradients(FIXTURES, "mae_base", gradients, 0, 1e-4, norm_rtol=1e-4)


@pytest.mark.slow
def test_every_hivit_layer_norm_has_the_official_eps():
    """For inputs of low variance, eps=1e-5 in a single norm changes outputs by 1e-3."""
    arrays, parts = golden("lowvar_eps"), FIXTURES["lowvar_eps"]["shrunk_suffixes"]
    images = jnp.asarray(reference.images("mini64", 3, 64))
    config = {
        reference.OUR_NAMES.get(k, k): v
        for k, v in FIXTURES["mae_mini"]["config"].items()
    }
    state = shrink(reference.state_dict("mae_mini"), parts)
    model, _ = reference.build("mae_hivit_base", state, **config)
    noise = jnp.asarray(reference.noise("mini64", 3, 16))
    out = nnx.jit(model)(images, noise=noise)
    assert_close(out.loss, FIXTURES["lowvar_eps"]["loss_f64"], 2e-6)
    assert_close(out.pred, arrays["pred"], 2e-5)
    latent = np.asarray(out.latent)[..., np.argsort(latent_order(model.config))]
    assert_close(latent, arrays["latent"], 2e-5)

    config = {
        reference.OUR_NAMES.get(k, k): v for k, v in reference.MINI_CLASSIFIER.items()
    }
    state = shrink(reference.state_dict("features_mini_rpe"), parts)
    model, _ = reference.build("hivit_base", state, **config)
    assert_close(nnx.jit(model)(images), arrays["cls_logits"], 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_of_a_given_prediction_equals_the_official_loss(norm_pix_loss):
    model, _ = reference.build_fixture("mae_mini")
    model.encoder.config = replace(model.config, norm_pix_loss=norm_pix_loss)
    images = jnp.asarray(reference.images("mini64", 3, 64))
    pred = jnp.asarray(reference.normal("loss/pred", (3, 16, 768)))
    mask = golden("mae_mini")["mask"]
    loss = (model.unit_loss(images, pred) * mask).sum() / mask.sum()
    arrays = golden("mae_loss_only")
    assert_close(loss, arrays[f"loss_norm_pix_{norm_pix_loss}"], 2e-6)
    image = unpatchify(pred[:1], (4, 4), 16)[0]
    np.testing.assert_array_equal(
        image.transpose(2, 0, 1), arrays["unpatchify_pred_sample0"]
    )


@pytest.mark.slow
def test_features_with_relative_positions_equal_the_official_ones():
    model, _ = reference.build_fixture("features_mini_rpe")
    arrays = golden("features_mini_rpe")
    images = jnp.asarray(reference.images("mini64", 3, 64))
    ids_keep = jnp.asarray(arrays["ids_keep"])
    grid = model.encoder.grid
    np.testing.assert_array_equal(
        relative_position_index(jnp.arange(16), grid), arrays["relative_position_index"]
    )
    np.testing.assert_array_equal(
        relative_position_index(ids_keep, grid), arrays["gathered_index"]
    )
    stage1, stage2, main = model.encoder(images, ids_keep=ids_keep)
    assert_close(main, arrays["feat"], 2e-5)
    for x, name in ((stage1, "hifeat_stage1"), (stage2, "hifeat_stage2")):
        expected = arrays[name]
        x = x.reshape(*expected.shape[:2], -1, expected.shape[-1])
        raster = x[:, :, np.argsort(merge_order(expected.shape[2]))]
        assert_close(raster.reshape(expected.shape), expected, 2e-5)
    key_mask = jnp.asarray(arrays["key_mask"])
    masked = model.encoder(images, ids_keep=ids_keep, key_mask=key_mask)[-1]
    assert_close(masked, arrays["feat_masked"], 2e-5)
    assert_close(model.encoder(images)[-1], arrays["feat_full"], 2e-5)
    assert_close(model(images), arrays["logits"], 2e-5)


@pytest.mark.slow
def test_mini_classifier_reproduces_official_gradients():
    model, params = reference.build_fixture("features_mini_rpe")
    arrays = golden("cls_mini_grad")
    images = jnp.asarray(reference.images("mini64", 3, 64))
    labels = jnp.asarray(reference.labels("mini64", 3, 10))
    np.testing.assert_array_equal(labels, arrays["labels"])
    loss, _, gradients = classifier_gradients(model, params, images, labels)
    assert_close(loss, FIXTURES["cls_mini_grad"]["loss_f64"], 2e-6)
    assert {f"grad/{name}" for name in gradients} == {k for k in arrays if "grad/" in k}
    for name, gradient in gradients.items():
        assert_close(gradient, arrays[f"grad/{name}"], 2e-6)
