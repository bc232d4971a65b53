"""Tests of Swin and SimMIM files of the official code, timm and transformers.

ViT files of transformers, and conversions to the layouts of timm and transformers, are
tested here too. test_vit.py tests the other ViT files.
"""

import sys
from types import SimpleNamespace

import foreign
import numpy as np
import pytest
import swin
import torch_files
import vit
from foreign import write_official
from networks import abstract_model, params_by_name
from reference import golden

import hivit_jax
from hivit_jax.errors import CheckpointError, ConfigError
from hivit_jax.models.resize import resize_relative_table
from hivit_jax.models.simmim import SimMIM
from hivit_jax.models.swin_classifier import SwinClassifier
from hivit_jax.tools import convert
from hivit_jax.tree import named_leaves
from hivit_jax.weights.adapt import match_arrays
from hivit_jax.weights.load import read
from hivit_jax.weights.names.official import from_official, to_state_dict
from hivit_jax.weights.names.transformers import from_transformers

MEAN = [0.5, 0.5, 0.5]
TABLE = "relative_position_bias_table"


def with_buffers(fixture):
    """Return the official state dict with buffers, and the parameters by our names."""
    name, config = swin.arguments(fixture)
    model = abstract_model(name, **config)
    params = from_official(swin.state_dict(fixture), model)
    return to_state_dict(params, model), named_leaves(params)


def check_params(pretrained, expected):
    """Check that the parameters are bit-identical to the expected arrays."""
    assert pretrained.params.keys() == expected.keys()
    for name, array in pretrained.params.items():
        assert array.tobytes() == expected[name].tobytes(), name


def test_official_classifier_loads_bit_identically(tmp_path):
    """The shift masks of the file determine the image size."""
    state, params = with_buffers("swin_mini")
    pretrained = read(write_official(tmp_path / "swin.pth", state))
    check_params(pretrained, params)
    sizes = dict(image_size=64, depths=(2, 2), num_heads=(2, 4), window_size=4)
    assert pretrained.arguments.items() >= sizes.items()
    assert pretrained.arguments["layer_norm_eps"] == 1e-5


@pytest.mark.slow
def test_timm_directory_gives_the_official_logits(tmp_path):
    state = foreign.timm_swin_state(swin.state_dict("swin_mini"))
    assert "layers.1.downsample.norm.weight" in state
    info = dict(input_size=[3, 64, 64], mean=MEAN, crop_pct=0.9)
    info |= dict(interpolation="bilinear")
    config = dict(architecture="swin_base_patch4_window7_224", pretrained_cfg=info)
    config |= dict(label_names=[f"class {k}" for k in range(10)])
    path = foreign.write_directory(tmp_path / "timm", state, config)
    model = hivit_jax.load_pretrained(path)
    assert isinstance(model, SwinClassifier)
    logits = model(swin.fixture_images("swin_mini"))
    np.testing.assert_allclose(logits, golden("swin_mini")["logits"], atol=2e-5)
    assert model.info.class_names[3] == "class 3"
    assert model.info.mean == (0.5, 0.5, 0.5)
    assert (model.info.crop, model.info.interpolation) == (0.9, "bilinear")


@pytest.mark.slow
def test_transformers_classifier_loads_bit_identically(tmp_path):
    state, params = with_buffers("swin_mini_clamp")
    for name in [name for name in state if name.endswith("attn_mask")]:
        del state[name]
    config = dict(model_type="swin", image_size=48, window_size=6, layer_norm_eps=1e-5)
    config |= dict(num_heads=[1, 2, 4], id2label={str(k): f"c{k}" for k in range(10)})
    processor = dict(image_mean=MEAN, image_std=MEAN, resample=3)
    state = foreign.transformers_state(state, "swin")
    path = foreign.write_directory(tmp_path / "hf", state, config, processor)
    pretrained = read(path)
    check_params(pretrained, params)
    assert pretrained.arguments["image_size"] == 48
    assert pretrained.arguments["num_heads"] == (1, 2, 4)
    assert pretrained.info["class_names"][9] == "c9"
    assert pretrained.info["mean"] == MEAN
    assert "parameter names: transformers" in pretrained.notes


@pytest.mark.slow
def test_smaller_images_resize_only_tables_that_do_not_fit(tmp_path):
    state, params = with_buffers("swin_mini")
    path = write_official(tmp_path / "swin.pth", state)
    assert read(path, image_size=(64, 48)).arguments["image_size"] == (64, 48)
    assert read(path, image_size=24).arguments["image_size"] == 64
    loaded = params_by_name(hivit_jax.load_pretrained(path, image_size=24))
    tables = [f"encoder/stages/{stage}/0/attn/{TABLE}" for stage in (0, 1)]
    np.testing.assert_array_equal(loaded[tables[0]], params[tables[0]])
    expected = resize_relative_table(params[tables[1]], (4, 4), (3, 3))
    np.testing.assert_array_equal(loaded[tables[1]], expected)
    for size in (50, "large"):
        with pytest.raises(CheckpointError, match="invalid model arguments: .*image_s"):
            read(path, image_size=size)


def test_simmim_loads_with_another_image_and_mask_size(tmp_path):
    """The default mask size does not divide 48, so both sizes are passed."""
    path = write_official(tmp_path / "simmim.pth", with_buffers("simmim_mini")[0])
    sizes = dict(image_size=48, mask_patch_size=16)
    assert read(path, **sizes).arguments.items() >= sizes.items()


def test_other_channels_of_simmim_need_a_new_decoder(tmp_path):
    pretrained = read(
        write_official(tmp_path / "x.pth", with_buffers("simmim_mini")[0])
    )
    name, config = swin.arguments("simmim_mini")
    model = abstract_model(name, **config | dict(in_channels=4))
    _, report = match_arrays(pretrained, model)
    assert report.newly_initialized == ["decoder/proj/bias", "decoder/proj/kernel"]
    assert not report.shape_mismatch


@pytest.mark.parametrize("labels", [{"cat": 0, "dog": 1}, ["cat", "dog"], 2])
def test_class_names_without_numbers_are_refused(labels, tmp_path):
    config = dict(model_type="swin", id2label=labels)
    path = foreign.write_directory(
        tmp_path / "hf", swin.state_dict("swin_mini"), config
    )
    message = r"config\.json: expected integers as keys of id2label, found .*(cat|2)"
    with pytest.raises(CheckpointError, match=message):
        read(path)


@pytest.mark.parametrize("program", ["official", "transformers"])
def test_simmim_loads_bit_identically(program, tmp_path):
    state, params = with_buffers("simmim_mini")
    if program == "official":
        path = write_official(tmp_path / "ckpt_epoch_99.pth", state)
    else:
        state = {n: a for n, a in state.items() if not n.endswith("attn_mask")}
        state = foreign.transformers_state(state, "swin")
        config = dict(model_type="swin", image_size=64, encoder_stride=8)
        path = foreign.write_directory(tmp_path / "hf", state, config)
    pretrained = read(path)
    assert pretrained.arguments["name"] == "simmim_swin_base"
    assert pretrained.arguments["image_size"] == 64
    check_params(pretrained, params)
    model = hivit_jax.load_pretrained(path)
    assert isinstance(model, SimMIM)


def test_classifier_loads_a_simmim_file(tmp_path):
    """The tables are resized geometrically to larger windows.

    Mask token and decoder are not used.
    """
    state, params = with_buffers("simmim_mini")
    pretrained = read(write_official(tmp_path / "ckpt_epoch_99.pth", state))
    sizes = dict(image_size=96, embed_dim=24, depths=(2, 2), num_heads=(2, 4))
    model = abstract_model("swin_base", **sizes, window_size=6)
    arrays, report = match_arrays(pretrained, model, fresh=("head/",))
    tables = [n for n in params if n.endswith("relative_position_bias_table")]
    assert sorted(report.resized) == sorted(tables)
    assert not report.missing
    assert not report.shape_mismatch
    assert report.newly_initialized == ["head/bias", "head/kernel"]
    unused = {"encoder/mask_token", "decoder/proj/bias", "decoder/proj/kernel"}
    assert {*report.unused} - {*tables} == unused
    assert "norm/scale" in arrays
    table = arrays[tables[0]]
    assert table.shape == (121, 2)
    # The center is the bias of a token with itself, which resizing keeps.
    np.testing.assert_allclose(table[60], params[tables[0]][24], atol=1e-6)


def test_transformers_vit_mae_loads_bit_identically(tmp_path):
    """config.json determines heads, LayerNorm eps and norm_pix_loss."""
    state = vit.state_dict("mae_vit_mini")
    config = dict(model_type="vit_mae", num_attention_heads=2, layer_norm_eps=1e-12)
    config |= dict(decoder_num_attention_heads=2, norm_pix_loss=False)
    named = foreign.transformers_state(state, "vit")
    path = foreign.write_directory(tmp_path / "hf", named, config)
    pretrained = read(path)
    expected = dict(num_heads=2, decoder_num_heads=2, norm_pix_loss=False)
    assert pretrained.arguments.items() >= expected.items()
    assert pretrained.arguments["layer_norm_eps"] == 1e-12
    name, config = vit.arguments("mae_vit_mini")
    model = abstract_model(name, **config)
    check_params(pretrained, named_leaves(from_official(state, model)))


def test_inspect_prints_the_guessed_image_size(tmp_path, capsys):
    state, _ = with_buffers("swin_mini")
    path = str(write_official(tmp_path / "swin.pth", state))
    assert convert.main(["--inspect", path]) == 0
    out = capsys.readouterr().out
    assert "parameter names: official code or timm" in out
    assert "guessed: image_size 64, from the number of tokens in the shift masks" in out


def test_transformers_file_without_a_key_projection_is_refused(tmp_path):
    named = foreign.transformers_state(swin.state_dict("swin_mini"), "swin")
    del named["swin.encoder.layers.0.blocks.0.attention.self.key.weight"]
    path = foreign.write_directory(tmp_path / "hf", named, {"model_type": "swin"})
    with pytest.raises(CheckpointError, match="has no key"):
        read(path)


@pytest.mark.slow
def test_saved_simmim_loads_bit_identically(tmp_path):
    model, _ = swin.build("simmim_mini")
    hivit_jax.save_pretrained(model, tmp_path / "saved")
    loaded = hivit_jax.load_pretrained(tmp_path / "saved")
    assert loaded.config == model.config
    for name, array in params_by_name(loaded).items():
        assert array.tobytes() == params_by_name(model)[name].tobytes(), name


@pytest.mark.parametrize("layout", ["official", "timm", "transformers"])
@pytest.mark.parametrize("fixture", ["swin_mini", "simmim_mini"])
def test_parameters_in_each_layout_read_back_bit_identically(fixture, layout):
    """The written parameters have the names of the layout."""
    name, config = swin.arguments(fixture)
    model = abstract_model(name, **config)
    state = swin.state_dict(fixture)
    params = from_official(state, model)
    if layout == "timm" and fixture == "simmim_mini":
        with pytest.raises(ConfigError, match="timm does not have"):
            to_state_dict(params, model, layout)
        return
    written = to_state_dict(params, model, layout)
    if layout == "timm":
        assert written.keys() == foreign.timm_swin_state(state).keys()
    if layout == "transformers":
        official = {
            n: a for n, a in with_buffers(fixture)[0].items() if "mask" not in n
        }
        if fixture == "simmim_mini":
            official["encoder.mask_token"] = state["encoder.mask_token"]
        assert written.keys() == foreign.transformers_state(official, "swin").keys()
        written = from_transformers(written)
    back = named_leaves(from_official(written, model))
    for name, array in named_leaves(params).items():
        assert array.tobytes() == back[name].tobytes(), name


def test_layouts_of_vit_read_back_bit_identically():
    state = vit.state_dict("mae_vit_mini")
    name, config = vit.arguments("mae_vit_mini")
    model = abstract_model(name, **config)
    params = from_official(state, model)
    written = to_state_dict(params, model, "transformers")
    assert written.keys() == foreign.transformers_state(state, "vit").keys()
    back = from_transformers(written)
    assert {name: array.tobytes() for name, array in back.items()} == {
        name: array.tobytes() for name, array in state.items()
    }
    timm_state = to_state_dict(params, model, "timm")
    assert not any("decoder" in name or "mask" in name for name in timm_state)
    with pytest.raises(
        ConfigError, match=r"layout='mmpretrain' \(--format=mmpretrain\) with mae"
    ):
        to_state_dict(params, model, "mmpretrain")


def test_hub_repository_without_safetensors_loads_pytorch_file(tmp_path, monkeypatch):
    state, requested = vit.state_dict("mae_vit_mini"), []
    named = foreign.transformers_state(state, "vit")
    config = dict(model_type="vit_mae", num_attention_heads=2)
    config |= dict(decoder_num_attention_heads=2, norm_pix_loss=True)
    foreign.write_directory(tmp_path / "hf", named, config)
    (tmp_path / "hf" / "model.safetensors").unlink()

    def snapshot_download(name, revision, allow_patterns):
        requested.append(allow_patterns)
        if allow_patterns == ["pytorch_model.bin"]:
            content = torch_files.with_tensors(named)
            torch_files.save(content, tmp_path / "hf" / "pytorch_model.bin")
        return str(tmp_path / "hf")

    fake = SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    pretrained = read("hf://facebook/vit-mae-mini")
    assert len(requested) == 2
    assert pretrained.arguments["num_heads"] == 2
    name, config = vit.arguments("mae_vit_mini")
    model = abstract_model(name, **config)
    check_params(pretrained, named_leaves(from_official(state, model)))
