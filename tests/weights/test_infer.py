"""Tests of arguments inferred from the names and shapes of weights."""

import pytest
import state_files
from networks import abstract_model

from hivit_jax.models import configure
from hivit_jax.weights.infer import infer

# Arguments of MMPretrain's classifiers. The test also renames their weights.
MMPRETRAIN = dict(fc_norm=False, layer_norm_eps=1e-5)


NETWORKS = [
    ("hivit_tiny", {}),
    ("hivit_small", {}),
    ("hivit_base", {}),
    ("hivit_base", dict(relative_position=False)),
    ("hivit_base", dict(image_size=384, in_channels=4, num_classes=21)),
    ("hivit_base", dict(mlp_ratio=3.0, stem_mlp_ratio=4.0)),
    ("hivit_base_24", MMPRETRAIN),
    ("hivit_large", MMPRETRAIN),
    ("mae_hivit_tiny", {}),
    ("mae_hivit_base", {}),
    ("mae_hivit_base", dict(decoder_depth=8)),
    ("mae_hivit_base", dict(multi_scale=False)),
    ("mae_hivit_base", dict(relative_position=True)),
    ("mae_hivit_large", dict(image_size=448)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "overrides"), NETWORKS)
def test_arguments_are_inferred_from_names_and_shapes(name, overrides):
    model = abstract_model(name, **overrides)
    state = state_files.zero_state_dict(model)
    if overrides is MMPRETRAIN:
        state = {
            n.replace("head.", "head.fc.")
            if n.startswith("head.")
            else f"backbone.{n}": a
            for n, a in state.items()
        }
    arguments, guessed = infer(state)
    assert configure(**arguments)[:2] == (type(model), model.config)
    assert arguments["name"] == name
    has_bias_table = (
        model.encoder.stages[-1][0].attn.relative_position_bias_table is not None
    )
    assert ("num_heads" in guessed) == (not has_bias_table)
