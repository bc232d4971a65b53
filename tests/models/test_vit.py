"""Tests of plain ViT: sizes, layers, weight decay, maps, errors, initialization."""

import jax.numpy as jnp
import mini_runs
import numpy as np
import pytest
from networks import abstract_model, abstract_outputs, unoptimized_jit
from vit import FACTS, by_official_name

from hivit_jax import inputs
from hivit_jax.errors import ConfigError
from hivit_jax.models import create_model
from hivit_jax.tree import named_leaves, split, split_params

MINI = dict(image_size=64, embed_dim=64, depth=2, num_heads=2)
PUBLISHED = {
    "vit_tiny": "vit_tiny_patch16 224 (DeiT-Ti widths)",
    "vit_base": "vit_base_patch16 224",
    "vit_huge": "vit_huge_patch14 224",
    "mae_vit_base": "mae_vit_base 224, 25% kept",
    "mae_vit_huge": "mae_vit_huge patch14 224, 25% kept",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_vit_parameters_and_multiply_adds_equal_the_official_ones(name):
    model, facts = abstract_model(name), FACTS["params_macs"][PUBLISHED[name]]
    assert model.parameter_count() == facts["params"]
    assert model.macs(layer_norm_cost=0) == facts["macs"]
    assert model.macs() == facts["macs_plus_5_per_layernorm_element"]


def test_layer_ids_equal_the_official_ones():
    """The official layers are those of MAE's ``lr_decay.py``."""
    model = abstract_model("vit_base")
    facts = FACTS["layer_decay"]["base_0.65"]
    actual = by_official_name(model, model.layer_ids())
    assert actual == {name: layer for name, (layer, _) in facts.items()}


@pytest.mark.slow
def test_vit_pretraining_has_the_official_weight_decay():
    """Class token and mask token decay; fixed tables are not trained."""
    task = inputs.task_of_recipe(mini_runs.recipe("mae_vit"))
    facts = FACTS["weight_decay"]["mae_vit_base pretraining (0.05)"]
    model = abstract_model("mae_vit_base")
    trained = named_leaves(split_params(model)[1])
    actual = by_official_name(model, {name: task.is_decayed(name) for name in trained})
    for name, decay in facts.items():
        assert actual.get(name) == (None if decay is None else decay > 0), name


def test_finetuning_decays_neither_class_token_nor_positions():
    task = inputs.task_of_recipe(mini_runs.recipe("finetune_vit"))
    assert not task.is_decayed("encoder/cls_token")
    assert not task.is_decayed("encoder/absolute_pos_embed")
    assert task.is_decayed("encoder/patch_embed/proj/kernel")


def test_maps_exclude_the_class_token_and_tokens_include_it():
    model = abstract_model("vit_base", **MINI, num_classes=7)
    images = jnp.zeros((2, 64, 64, 3))
    maps, layers, logits, kept_maps = abstract_outputs(
        lambda m: (
            m.features(images, stride_32=True),
            m.layers(images, attention=True),
            m(images),
            m.features(images, jnp.zeros((2, 3), int)),
        ),
        model,
    )
    assert [x.shape for x in maps] == [(2, 4, 4, 64), (2, 2, 2, 64)]
    assert layers[-1].tokens.shape == (2, 17, 64)
    assert layers[-1].attention.shape == (2, 2, 17, 17)
    assert logits.shape == (2, 7)
    assert kept_maps[0].shape == (2, 3, 1, 1, 64)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depths": (1, 1, 2)}, "override of vit_base 'depths'; did you mean 'depth'"),
        ({"pooling": "max"}, "pooling"),
        ({"num_heads": 5}, "num_heads=5; expected a divisor of embed_dim, which is 64"),
        ({"image_size": 60}, "image_size=60"),
    ],
)
def test_invalid_vit_arguments_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        abstract_model("vit_base", **MINI | overrides)


@pytest.mark.slow
def test_initial_weights_have_the_official_bounds():
    """The largest weight of a matrix is close to Xavier's bound.

    In this bound, q, k and v count as one matrix. The first row of the position table,
    which is added to the class token, is 0.
    """
    decoder = dict(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    sizes = MINI | decoder
    build = unoptimized_jit(lambda: split(create_model("mae_vit_base", **sizes))[1])
    params = named_leaves(build())
    block = "encoder/stages/0/0"
    for name, bound in {
        f"{block}/attn/qkv/kernel": (6 / (4 * 64)) ** 0.5,
        f"{block}/mlp/fc1/kernel": (6 / (5 * 64)) ** 0.5,
        "encoder/patch_embed/proj/kernel": (6 / (64 + 768)) ** 0.5,
        "encoder/patch_embed/proj/bias": 768**-0.5,  # PyTorch's default
        "decoder_pred/kernel": (6 / (32 + 768)) ** 0.5,
    }.items():
        largest = np.abs(params[name]).max()
        assert 0.8 * bound < largest <= bound, name
    assert not np.any(params[f"{block}/attn/qkv/bias"])
    assert not np.any(params["encoder/absolute_pos_embed"][0])
    assert 0.01 < np.std(params["encoder/cls_token"]) < 0.03
