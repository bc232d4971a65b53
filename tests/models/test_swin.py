"""Tests of Swin and SimMIM: sizes, layers, weight decay, errors and features."""

import jax
import jax.numpy as jnp
import mini_runs
import numpy as np
import pytest
import swin
from flax import nnx
from kernel_cases import kernels_in, mesh_of
from networks import abstract_model, abstract_outputs, keys_per_sample
from vit import by_official_name

from hivit_jax import inputs
from hivit_jax.errors import ConfigError
from hivit_jax.models.windows import Windows
from hivit_jax.tree import named_leaves, split, split_params

MINI = dict(image_size=64, embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=4)


@pytest.mark.slow
@pytest.mark.parametrize("title", swin.FACTS["params_macs"])
def test_swin_parameters_and_multiply_adds_equal_the_official_ones(title):
    name, size, _, window = title.removeprefix("simmim ").split()[:4]
    if title.startswith("simmim"):
        model = abstract_model(
            f"simmim_{name}", image_size=int(size), window_size=int(window)
        )
    else:
        classes = 0 if "no head" in title else 1000
        sizes = dict(image_size=int(size), window_size=int(window.rstrip(",")))
        model = abstract_model(name, **sizes, num_classes=classes)
    facts = swin.FACTS["params_macs"][title]
    assert model.parameter_count() == facts["params"]
    assert model.macs(layer_norm_cost=0) == facts["macs"]
    assert model.macs() == facts["macs_plus_5_per_layernorm_element"]


def test_finetuning_has_the_official_layer_ids_and_weight_decay():
    name, config = swin.arguments("swin_mini")
    model, facts = abstract_model(name, **config), swin.FACTS["layer_decay"]
    found = by_official_name(model, model.layer_ids())
    assert found == {name: layer for name, (layer, _) in facts.items()}
    task = inputs.task_of_recipe(mini_runs.recipe("finetune_swin"))
    found = by_official_name(model, {n: task.is_decayed(n) for n in model.layer_ids()})
    assert found == {name: decay > 0 for name, (_, decay) in facts.items()}


@pytest.mark.slow
def test_swin_pretraining_has_the_official_weight_decay():
    """The mask token does not decay; the relative position tables do."""
    task = inputs.task_of_recipe(mini_runs.recipe("simmim_swin"))
    (facts,) = swin.FACTS["weight_decay"].values()
    model = abstract_model("simmim_swin_base")
    trained = named_leaves(split_params(model)[1])
    found = by_official_name(model, {name: task.is_decayed(name) for name in trained})
    assert found == {name: decay > 0 for name, decay in facts.items()}


@pytest.mark.slow
def test_maps_and_layers_have_the_shapes_of_their_stages():
    """`layers` returns one output per block, for the blocks of all stages.

    The maps have strides 4 and 8.
    """
    model = abstract_model("swin_base", **MINI | dict(image_size=(56, 72)))
    images = jnp.zeros((2, 56, 72, 3))
    maps, layers, logits = abstract_outputs(
        lambda m: (
            m.features(images),
            m.layers(images, attention=True),
            m(images, drop_path_keys=keys_per_sample(2)),
        ),
        model,
    )
    assert [x.shape for x in maps] == [(2, 14, 18, 24), (2, 7, 9, 48)]
    # layers[::2] are the first blocks of the two stages, which have two blocks each.
    assert [x.tokens.shape for x in layers[::2]] == [(2, 252, 24), (2, 63, 48)]
    # 4x5 windows of 4x4 tokens cover the grid of 14x18 tokens, padded to 16x20.
    assert layers[1].attention.shape == (2, 4 * 5, 2, 16, 16)
    assert logits.shape == (2, 1000)


def test_windows_shrink_to_small_grids():
    """Windows shrink to the grid's shorter side; windows of that size never shift."""
    config = abstract_model("swin_base", **MINI).config
    unshifted = Windows((4, 8), (4, 4), 0, attend_padding=True)
    assert config.stage_windows(0, (4, 8)) == [unshifted] * 2
    assert config.stage_windows(0, (3, 3)) == [None] * 2
    assert config.stage_windows(0, (8, 8))[1].shift == 2


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("swin_base", {"num_heads": (2,)}, r"num_heads=\(2,\); expected one number"),
        (
            "swin_base",
            {"num_heads": (2, 5)},
            "num_heads=5; expected a divisor of the width of a stage",
        ),
        ("swin_base", {"scan_blocks": True}, "scan_blocks=True with Swin"),
        ("swin_base", {"stem_mlp_ratio": 3.0}, "override of swin_base"),
        ("simmim_swin_base", {"mask_patch_size": 30}, "mask_patch_size=30"),
        ("simmim_swin_base", {"mask_patch_size": 24}, "image_size"),
    ],
)
def test_invalid_swin_arguments_are_refused(name, overrides, message):
    with pytest.raises(ConfigError, match=message):
        abstract_model(name, **MINI | overrides)


def test_features_of_some_tokens_are_refused():
    model = abstract_model("swin_base", **MINI)
    with pytest.raises(ConfigError, match="ids_keep with Swin"):
        model.features(jnp.zeros((1, 64, 64, 3)), np.zeros((1, 2), int))


def test_blocks_with_shifted_windows_fuse_only_the_mlp():
    """Each of the two stages has a block without shift and a block with shift."""
    sizes = MINI | dict(embed_dim=128)  # a width that the kernels support
    graphdef, params = split(abstract_model("swin_base", **sizes, kernels="fused"))

    def run(params):
        return nnx.merge(graphdef, params)(jnp.zeros((2, 64, 64, 3)))

    with mesh_of(data=1):
        jaxpr = jax.make_jaxpr(run)(params).jaxpr
    without_shift, with_shift = ["attention_block", "mlp_block"], ["mlp_block"]
    assert kernels_in(jaxpr) == 2 * (without_shift + with_shift)
