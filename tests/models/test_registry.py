"""Tests of `create_model`: names, arguments, errors and seeds."""

import copy
import json
from dataclasses import FrozenInstanceError, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import (
    DECODER,
    MINI,
    abstract_model,
    initial_params,
    unoptimized_jit,
)
from numpy.testing import assert_array_equal

from hivit_jax.errors import ConfigError
from hivit_jax.models import (
    VARIANTS,
    arguments_of,
    configure,
    create_model,
    list_models,
)
from hivit_jax.models.classifier import Classifier
from hivit_jax.models.config import RunOptions
from hivit_jax.models.layers import ParameterKeys
from hivit_jax.models.mae import MaskedAutoencoder
from hivit_jax.tree import split

# Size -> width, depths and heads of the encoder.
ENCODERS = {
    "tiny": (384, (1, 1, 10), 6),
    "small": (384, (2, 2, 20), 6),
    "base": (512, (2, 2, 20), 8),
    "base_24": (512, (2, 2, 24), 8),
    "large": (768, (2, 2, 40), 12),
}


def test_list_models_returns_all_names():
    names = {f"hivit_{size}" for size in ENCODERS}
    names |= {f"vit_{size}" for size in ("tiny", "small", "base", "large", "huge")}
    names |= {f"mae_{name}" for name in names}
    swins = {f"swin_{size}" for size in ("tiny", "small", "base", "large")}
    names |= swins | {f"simmim_{name}" for name in swins}
    assert {*list_models()} == {*VARIANTS} == names
    assert list_models("mae_h*_base*") == ["mae_hivit_base", "mae_hivit_base_24"]


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models("*hivit_*"))
def test_every_hivit_can_be_built(name):
    width, depths, heads = ENCODERS[name.split("hivit_")[1]]
    if name.startswith("mae_"):
        # A shallow encoder suffices; the depth is tested with the classifier.
        model = abstract_model(name, depths=(1, 1, 1), decoder_depth=1)
        depths = (1, 1, 1)
        assert isinstance(model, MaskedAutoencoder)
        assert model.config.multi_scale
        assert model.encoder.stages[-1][0].attn.relative_position_bias_table is None
    else:
        model = abstract_model(name)
        assert isinstance(model, Classifier)
        assert model.head.out_features == 1000
        table = model.encoder.stages[-1][0].attn.relative_position_bias_table
        assert table.shape == (27 * 27, heads)
        assert (model.fc_norm is None) == (name == "hivit_base_24")
        eps = 1e-5 if name == "hivit_base_24" else 1e-6
        assert model.encoder.patch_embed.norm.epsilon == eps
    encoder = model.encoder
    assert encoder.config.embed_dim == width
    block_counts = [len(stage) for stage in encoder.stages]
    assert block_counts == [2 * depths[0], 2 * depths[1], depths[2]]
    kernel = encoder.stages[-1][0].attn.qkv.kernel
    assert kernel.shape == (width, 3, heads, width // heads)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "hivit_bsae",
            {},
            "unknown model name 'hivit_bsae'; did you mean 'hivit_base'",
        ),
        ("mae_hivit_tinny", {}, "did you mean 'mae_hivit_tiny'"),
        ("resnet", {}, "unknown model name 'resnet'; known: hivit_tiny, .*large"),
        (
            "hivit_base",
            {"drop_path": 0.1},
            "'drop_path'; did you mean 'drop_path_rate'",
        ),
        ("hivit_base", {"decoder_depth": 8}, "override of hivit_base 'decoder_depth'"),
        ("mae_hivit_base", {"num_classes": 8}, "override of mae_hivit_base 'num_cl"),
        ("hivit_base", {"sincos_position": True}, "override of hivit_base 'sincos_"),
    ],
)
def test_unknown_models_and_arguments_are_refused(name, overrides, message):
    with pytest.raises(ConfigError, match=message):
        create_model(name, **overrides)


def test_model_separates_config_and_run_options():
    model = abstract_model("hivit_base", **MINI, dtype="bfloat16", remat=True)
    assert model.config == replace(VARIANTS["hivit_base"][1], **MINI)
    assert model.config.image_shape == (64, 64, 3)
    assert model.run_options == RunOptions("bfloat16", remat=True)
    assert model.run_options == RunOptions(jnp.bfloat16, remat=True)
    as_lists = MINI | {"depths": [1, 1, 2], "image_size": [64, 64]}
    assert (
        abstract_model("hivit_base", **MINI).config
        == configure("hivit_base", **as_lists)[1]
    )
    with pytest.raises(FrozenInstanceError):
        model.config.embed_dim = 32


def test_arguments_of_a_model_rebuild_it():
    model = abstract_model("mae_hivit_base", **MINI, **DECODER, scan_blocks=True)
    arguments = json.loads(json.dumps(arguments_of(model)))
    rebuilt = nnx.eval_shape(lambda: create_model(**arguments))
    assert split(rebuilt)[0] == split(model)[0]
    assert rebuilt.name == "mae_hivit_base"


@pytest.mark.parametrize("channels", [1, 3])
def test_copies_of_a_model_keep_its_info(channels):
    model = abstract_model("hivit_base", **MINI, in_channels=channels, num_classes=2)
    info = model.info
    assert (info.image_size, info.channels) == ((64, 64), channels)
    assert (info.class_names, info.crop, info.scale) == ((), 0.875, 1 / 255)
    mean = (0.485, 0.456, 0.406)
    assert info.mean == pytest.approx(mean if channels == 3 else [np.mean(mean)])
    model.info = replace(info, class_names=("cat", "dog"))
    copies = copy.deepcopy(model), nnx.merge(*nnx.split(model)), nnx.clone(model)
    assert all(copied.info == model.info for copied in copies)
    assert all(copied.config == model.config for copied in copies)


MODELS = [
    ("hivit_base", {}),
    ("mae_hivit_base", {"relative_position": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "overrides"), MODELS)
def test_seed_determines_parameters(name, overrides):
    params, other_params = (
        initial_params(name, 0, **overrides),
        initial_params(name, 1, **overrides),
    )
    repeated = initial_params(name, 0, **overrides)
    for path, value in params.items():
        assert_array_equal(value, repeated[path])
        constant = "norm" in path and "proj" not in path
        constant |= path.endswith("bias") and "patch_embed/proj" not in path
        constant |= path.endswith("absolute_pos_embed") and name.startswith("mae_")
        constant |= "decoder_pos_embed" in path
        assert (value == other_params[path]).all() == constant, path
    # No two parameters are drawn with the same key: their first values differ.
    random_values = [v.flat[0] for v in params.values() if v.flat[0] not in (0, 1)]
    assert len(set(random_values)) == len(random_values)


@pytest.mark.slow
def test_integer_seed_equals_its_key():
    def kernel(seed):
        return create_model("hivit_base", seed=seed, **MINI, num_classes=10).head.kernel

    expected = unoptimized_jit(lambda key: kernel(key)[...])(jax.random.key(3))
    assert_array_equal(unoptimized_jit(lambda: kernel(3)[...])(), expected)


def test_parameter_keys_equal_those_of_nnx():
    for seed in (3, jax.random.key(4)):
        ours, theirs = ParameterKeys(seed), nnx.Rngs(seed)
        for _ in range(3):
            assert ours.params() == theirs.params()


@pytest.mark.parametrize("name", ["pretrained", "weights", "checkpoint_path"])
def test_create_model_refers_to_load_pretrained(name):
    with pytest.raises(ConfigError, match=r"hivit_jax.load_pretrained\(PATH\)"):
        configure("hivit_base", **{name: True})
