"""Plain ViTs of the golden data: arguments, state dicts and models."""

import json
from functools import partial

import numpy as np
import reference

from hivit_jax.models.positions import sincos_table
from hivit_jax.tree import named_leaves, split
from hivit_jax.weights.names.official import to_official

FACTS = json.loads((reference.GOLDEN / "vit.json").read_text())
FIXTURES = FACTS["fixtures"]
# The seed of these fixtures is 0 instead of `reference.SEED`.
weight, images, noise, labels, probe = (
    partial(make, seed=0)
    for make in (
        reference.weight,
        reference.images,
        reference.noise,
        reference.labels,
        reference.probe,
    )
)
check_gradients = partial(reference.check_gradients, FIXTURES, seed=0)
# Model arguments of the golden data -> arguments of this package
OUR_NAMES = {"img_size": "image_size"}


def arguments(fixture):
    """Return (model name, arguments) of a fixture in this package."""
    config = dict(FIXTURES[fixture].get("config", {}))
    config.pop("qkv_bias", None)
    is_autoencoder = fixture.startswith("mae_")
    name = "mae_vit_base" if is_autoencoder else "vit_base"
    has_mean = config.pop("global_pool", fixture != "vit_base_token")
    if not is_autoencoder:
        config["pooling"] = "mean" if has_mean else "token"
    return name, {OUR_NAMES.get(key, key): value for key, value in config.items()}


def position_table(shape):
    """Return the fixed position table of a masked autoencoder, [1, 1+N, D]."""
    side = round((shape[1] - 1) ** 0.5)
    rows = sincos_table((side, side), shape[2])
    return np.concatenate([np.zeros_like(rows[:1]), rows])[None]


def state_dict(fixture, shapes=None):
    """Return the official state dict of a fixture: random weights, computed tables."""
    is_autoencoder = fixture.startswith("mae_")
    return {
        name: position_table(shape)
        if is_autoencoder and name.endswith("pos_embed")
        else weight(name, shape)
        for name, shape in (shapes or FIXTURES[fixture]["state_dict"]).items()
    }


def build(fixture, state=None):
    """Return (model, params) of a fixture."""
    name, config = arguments(fixture)
    state = state_dict(fixture) if state is None else state
    return reference.build(name, state, **config)


def by_official_name(model, values):
    """Return {official name: value} for {our name: value}."""
    leaves = named_leaves(split(model)[1])
    return {
        official: values[name]
        for name, leaf in leaves.items()
        if name in values
        for official in to_official(nested(name, np.empty(leaf.shape, bool)), model)
    }


def nested(name, leaf):
    """Return nested dicts with one leaf at a name such as "encoder/norm/scale"."""
    for part in reversed(name.split("/")):
        leaf = {part: leaf}
    return leaf
