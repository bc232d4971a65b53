"""Swin and SimMIM of the golden data: their facts, state dicts and our models."""

import json
from functools import partial

import jax.numpy as jnp
import reference
from networks import abstract_model
from vit import images, labels, noise, probe, weight

__all__ = ["abstract_model", "images", "labels", "noise", "probe", "weight"]
FACTS = json.loads((reference.GOLDEN / "swin.json").read_text())
FIXTURES = FACTS["fixtures"]
check_gradients = partial(reference.check_gradients, FIXTURES, seed=0)
# The golden data's names of model arguments -> ours, and names without one of ours
OUR_NAMES = {"img_size": "image_size", "img": "image_size"}
NOT_OURS = ("qkv_bias", "encoder_stride", "mask_ratio", "mask_count", "patch_norm")


def arguments(fixture):
    """Return our name and arguments of the model of a fixture."""
    config = {k: v for k, v in FIXTURES[fixture]["config"].items() if k not in NOT_OURS}
    is_simmim = fixture.startswith("simmim")
    if is_simmim:
        config.pop("num_classes", None)
    if fixture == "swin_mini_pad":
        config |= dict(shrink_windows=False, num_classes=0)
    sizes = {OUR_NAMES.get(key, key): value for key, value in config.items()}
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in sizes.items()}
    return "simmim_swin_base" if is_simmim else "swin_base", sizes


def state_dict(fixture, shapes=None):
    """Return the official parameters of a fixture, without its buffers."""
    shapes = shapes or FIXTURES[fixture]["state_dict"]
    return {
        name: weight(name, shape)
        for name, shape in shapes.items()
        if not name.endswith(("relative_position_index", "attn_mask"))
    }


def build(fixture, state=None):
    """Return the model of a fixture, and its parameters."""
    name, config = arguments(fixture)
    state = state_dict(fixture) if state is None else state
    return reference.build(name, state, **config)


def fixture_images(fixture):
    """Return the images of a fixture, cropped from square images if not square."""
    tag, batch, size = FIXTURES[fixture]["input"]["images"]
    height, width = size if isinstance(size, list) else (size, size)
    square = images(tag, batch, max(height, width))
    return jnp.asarray(square[:, :height, :width])
