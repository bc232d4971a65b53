"""Tests of conversions between official state dicts and our parameters."""

import json
import re

import jax
import numpy as np
import pytest
import reference
from networks import abstract_model
from numpy.testing import assert_array_equal

from hivit_jax.errors import CheckpointError, ConfigError
from hivit_jax.tree import leaf_name, named_leaves, split
from hivit_jax.weights.adapt import Pretrained, adapt, match_arrays
from hivit_jax.weights.names.official import from_official, to_official, to_state_dict

FIXTURES = [k for k, v in reference.FIXTURES.items() if "state_dict" in v]


def fixture_model(fixture):
    """Return the abstract model of a fixture."""
    facts = reference.FIXTURES[fixture]
    if fixture == "mmpretrain_tiny":
        return abstract_model("hivit_tiny", fc_norm=False, layer_norm_eps=1e-5)
    if fixture in reference.SUPERVISED:
        return abstract_model(f"hivit_{fixture[4:]}")
    config = dict(facts.get("config", {}))
    overrides = {reference.OUR_NAMES.get(k, k): v for k, v in config.items()}
    overrides = {k: tuple(v) if type(v) is list else v for k, v in overrides.items()}
    name = "hivit_base" if "num_classes" in config else "mae_hivit_base"
    return abstract_model(name, **overrides)


def fixture_layout(fixture):
    """Return the layout of a fixture."""
    if fixture == "mmpretrain_tiny":
        return "mmpretrain"
    return "supervised" if fixture in reference.SUPERVISED else "official"


@pytest.mark.slow
@pytest.mark.parametrize("fixture", FIXTURES)
def test_official_hivit_state_dict_survives_a_round_trip(fixture):
    """Names and bytes are unchanged after a conversion to our parameters and back.

    All values of the state dict differ, so that the test detects a transposed array.
    """
    shapes = reference.FIXTURES[fixture]["state_dict"]
    state, start = {}, 0
    for name, shape in shapes.items():
        if not name.endswith("relative_position_index"):
            size = int(np.prod(shape))
            numbers = np.arange(start, start + size, dtype=np.uint32)
            state[name], start = numbers.view(np.float32).reshape(shape), start + size
    model = fixture_model(fixture)
    ours = from_official(state, model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(split(model)[1]):
        assert named_leaves(ours)[leaf_name(path)].shape == leaf.shape
    back = to_state_dict(ours, model, fixture_layout(fixture))
    assert {name: list(array.shape) for name, array in back.items()} == shapes
    if "nohifeat" in fixture:  # the official file contains a norm that it never applies
        del state["norm.weight"], state["norm.bias"]
    for name, array in state.items():
        assert back[name].dtype == np.float32
        assert back[name].tobytes() == array.tobytes(), name
    side = fixture_model(fixture).encoder.grid[0]
    index = np.load(reference.GOLDEN / "relative_position_index.npz")
    for name in back.keys() - state.keys() - {"norm.weight", "norm.bias"}:
        assert back[name].dtype == np.int64
        assert_array_equal(back[name], index[f"grid{side}"])


@pytest.fixture
def mae_state():
    """Return the state dict of a fixture and its abstract model."""
    return reference.state_dict("mae_mini"), fixture_model("mae_mini")


@pytest.mark.parametrize("name", ["blocks.0.mlp.fc1.weight", "mask_token", "norm.bias"])
def test_missing_entry_is_refused(mae_state, name):
    state, model = mae_state
    del state[name]
    with pytest.raises(CheckpointError, match=f"has no '{re.escape(name)}'"):
        from_official(state, model)


@pytest.mark.parametrize("name", ["cls_token", "blocks.99.norm1.weight"])
def test_unexpected_entry_is_refused(mae_state, name):
    state, model = mae_state
    state[name] = np.zeros(3, np.float32)
    with pytest.raises(CheckpointError, match=f"unexpected .*'{re.escape(name)}'"):
        from_official(state, model)


def test_relative_position_index_is_ignored(mae_state):
    state, model = mae_state
    expected = named_leaves(from_official(state, model))
    for name in ("relative_position_index", "blocks.6.attn.relative_position_index"):
        state[name] = np.zeros((16, 16), np.int64)
    for name, array in named_leaves(from_official(state, model)).items():
        assert_array_equal(array, expected[name])


@pytest.mark.parametrize(
    ("name", "shape", "expected_shape"),
    [
        ("absolute_pos_embed", (1, 196, 64), [1, 16, 64]),
        ("patch_embed.proj.weight", (16, 1, 4, 4), [16, 3, 4, 4]),
        ("blocks.6.attn.qkv.weight", (64, 192), [192, 64]),
        ("decoder_embed.weight", (32, 64), [32, 448]),
        ("norm.weight", (64,), [448]),
    ],
)
def test_entry_of_a_wrong_shape_is_refused(mae_state, name, shape, expected_shape):
    state, model = mae_state
    state[name] = np.zeros(shape, np.float32)
    message = re.escape(f"'{name}' has shape {list(shape)}; expected {expected_shape}")
    with pytest.raises(CheckpointError, match=message):
        from_official(state, model)


@pytest.mark.slow
def test_finetuning_loads_the_official_arrays():
    """Loaded, unused and missing arrays equal those of the official loader."""
    facts = json.loads((reference.GOLDEN / "finetune_loading.json").read_text())
    official_names, params = {}, {}
    for name in ("hivit_base", "mae_hivit_base"):
        model = abstract_model(name)
        zeros = jax.tree.map(
            lambda x: np.broadcast_to(np.float32(0), x.shape), split(model)[1]
        )
        params = named_leaves(zeros)
        official_names |= dict(zip(params, to_official(zeros, model), strict=True))
    arguments = {"name": "mae_hivit_base"}
    pretrained = Pretrained("path", "path", arguments, params, [], [], [], {}, {}, {})
    model = abstract_model("hivit_base")
    _, report = match_arrays(pretrained, model)
    by_outcome = {
        outcome: {official_names[n] for n in names}
        for outcome, names in vars(report).items()
    }
    assert by_outcome["matched"] == set(facts["loaded"])
    assert by_outcome["unused"] == set(facts["unexpected_dropped"])
    not_loaded = set(facts["missing_keep_own_init"]) - {"relative_position_index"}
    assert by_outcome["zero_init"] | by_outcome["newly_initialized"] == not_loaded
    assert by_outcome["newly_initialized"] == {
        "fc_norm.weight",
        "fc_norm.bias",
        "head.weight",
        "head.bias",
    }
    assert (
        not by_outcome["missing"] | by_outcome["shape_mismatch"] | by_outcome["resized"]
    )
    for name in [name for name in pretrained.params if "stages/2/7/" in name]:
        del pretrained.params[name]
    missing = match_arrays(pretrained, model)[1].missing
    assert len(missing) > 5
    assert all(name.startswith("encoder/stages/2/7/") for name in missing)
    with pytest.raises(
        ConfigError, match=f"{len(missing)} arrays are missing, .* is {missing[0]}"
    ):
        adapt(pretrained, model)
