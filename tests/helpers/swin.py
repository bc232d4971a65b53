"""Swin and SimMIM of the golden data: facts, state dicts and models."""

import json
from functools import partial

import jax.numpy as jnp
import reference
from vit import images, weight
from vit import labels as labels
from vit import noise as noise

FACTS = json.loads((reference.GOLDEN / "swin.json").read_text())
FIXTURES = FACTS["fixtures"]
check_gradients = partial(reference.check_gradients, FIXTURES, seed=0)
# Model arguments of the golden data -> arguments of this package
OUR_NAMES = {"img_size": "image_size", "img": "image_size"}
# Model arguments of the golden data that this package does not have
NOT_OURS = ("qkv_bias", "encoder_stride", "mask_ratio", "mask_count", "patch_norm")


def arguments(fixture):
    """Return (model name, arguments) of a fixture in this package."""
    config = {k: v for k, v in FIXTURES[fixture]["config"].items() if k not in NOT_OURS}
    is_simmim = fixture.startswith("simmim")
    if is_simmim:
        config.pop("num_classes", None)
    if fixture == "swin_mini_pad":
        config |= dict(shrink_windows=False, num_classes=0)
    config = {OUR_NAMES.get(key, key): value for key, value in config.items()}
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    return "simmim_swin_base" if is_simmim else "swin_base", config


def state_dict(fixture, shapes=None):
    """Return the official state dict of a fixture without buffers."""
    shapes = shapes or FIXTURES[fixture]["state_dict"]
    return {
        name: weight(name, shape)
        for name, shape in shapes.items()
        if not name.endswith(("relative_position_index", "attn_mask"))
    }


def build(fixture, state=None):
    """Return (model, params) of a fixture."""
    name, config = arguments(fixture)
    state = state_dict(fixture) if state is None else state
    return reference.build(name, state, **config)


def fixture_images(fixture):
    """Return the images of a fixture, [B, H, W, 3], as crops of square images."""
    tag, batch, size = FIXTURES[fixture]["input"]["images"]
    height, width = size if isinstance(size, list) else (size, size)
    square = images(tag, batch, max(height, width))
    return jnp.asarray(square[:, :height, :width])
