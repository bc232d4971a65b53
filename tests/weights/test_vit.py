"""Tests of ViT weight files with the parameter names of the official MAE code.

The files come from pretraining or finetuning, or contain only the encoder. timm uses
the same names for the encoder. test_swin.py tests conversions to the layouts of timm
and transformers, also for ViT.
"""

import numpy as np
import pytest
import state_files
import vit
from foreign import write_official
from networks import abstract_model, params_by_name
from reference import golden

import hivit_jax
from hivit_jax.models.vit import ViTClassifier, ViTMaskedAutoencoder
from hivit_jax.tree import named_leaves
from hivit_jax.weights.adapt import match_arrays
from hivit_jax.weights.load import read
from hivit_jax.weights.names.official import from_official

HEADS = dict(num_heads=2)


def test_pretraining_file_loads_bit_identically(tmp_path):
    state = vit.state_dict("mae_vit_mini")
    path = write_official(tmp_path / "checkpoint-3.pth", state)
    model = hivit_jax.load_pretrained(path, **HEADS, decoder_num_heads=2)
    assert isinstance(model, ViTMaskedAutoencoder)
    assert model.config.norm_pix_loss
    assert (model.config.depth, model.config.decoder_depth) == (2, 1)
    expected = named_leaves(from_official(state, model))
    for name, array in params_by_name(model).items():
        assert array.tobytes() == expected[name].tobytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("golden_name", ["vit_cls_mini", "vit_cls_mini_token"])
def test_finetuned_file_gives_the_official_logits(golden_name, tmp_path):
    path = write_official(tmp_path / "finetuned.pth", vit.state_dict(golden_name))
    model = hivit_jax.load_pretrained(path, **HEADS)
    assert isinstance(model, ViTClassifier)
    assert model.config.pooling == vit.arguments(golden_name)[1]["pooling"]
    logits = model(np.asarray(vit.images("vitcls64", 3, 64)))
    np.testing.assert_allclose(logits, golden(golden_name)["logits"], atol=2e-5)
    hivit_jax.save_pretrained(model, tmp_path / "saved")
    reloaded = hivit_jax.load_pretrained(tmp_path / "saved")
    assert reloaded.config == model.config
    for name, array in params_by_name(reloaded).items():
        assert array.tobytes() == params_by_name(model)[name].tobytes(), name


@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_classifier_loads_a_pretraining_file(pooling, tmp_path):
    """The position table is resized to the grid of larger images.

    Mean pooling does not use the file's `norm`.
    """
    path = write_official(tmp_path / "full.pth", vit.state_dict("mae_vit_mini"))
    pretrained = read(path, **HEADS)
    sizes = dict(image_size=96, embed_dim=64, depth=2, num_heads=2)
    model = abstract_model("vit_base", **sizes, pooling=pooling)
    arrays, report = match_arrays(pretrained, model, fresh=("head/",))
    assert report.resized == ["encoder/absolute_pos_embed"]
    table = pretrained.params["encoder/absolute_pos_embed"]
    resized = arrays["encoder/absolute_pos_embed"]
    assert resized.shape == (37, 64)
    np.testing.assert_array_equal(resized[0], table[0])
    assert not report.missing
    assert not report.shape_mismatch
    norm = {"norm/scale", "norm/bias"}
    assert norm & {*report.unused} == (norm if pooling == "mean" else set())


def test_all_arrays_of_an_encoder_file_are_used(tmp_path):
    """The file is like timm's: it contains encoder and norm, but no head."""
    state = vit.state_dict("mae_vit_mini")
    encoder = {k: v for k, v in state.items() if "decoder" not in k}
    del encoder["mask_token"]
    path = state_files.save_safetensors(tmp_path / "timm.safetensors", encoder)
    pretrained = read(path, **HEADS)
    assert pretrained.arguments["pooling"] == "token"
    assert pretrained.unused == []
    assert "parameter names: MAE and timm" in pretrained.notes
