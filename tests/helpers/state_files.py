"""Small state dicts in three formats of PyTorch files, and a writer of safetensors.

``python tests/helpers/state_files.py`` writes the .pth files of tests/parity/golden
with PyTorch.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
import reference
from networks import abstract_model

from hivit_jax.tree import split
from hivit_jax.weights.names.official import to_official

TINY = dict(image_size=32, embed_dim=16, depths=(1, 1, 2), num_heads=1)
TINY_DECODER = dict(decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=1)
# Head counts, which the weights do not contain; passing them avoids guesses.
NOT_IN_STATE_DICT = dict(num_heads=1, decoder_num_heads=1)


def random_state_dict(name, **overrides):
    """Return (model, random official state dict) of a small network."""
    overrides = TINY | (TINY_DECODER if name.startswith("mae_") else {}) | overrides
    model = abstract_model(name, **overrides)
    state = zero_state_dict(model)
    return model, {n: reference.weight(n, a.shape) for n, a in state.items()}


def zero_state_dict(model):
    """Return the official state dict of an abstract model, filled with zeros."""
    params = jax.tree.map(
        lambda x: np.broadcast_to(np.float32(0), x.shape), split(model)[1]
    )
    return to_official(params, model)


def contents_by_format():
    """Return {format: (model, content of a file)}."""
    model, state = random_state_dict("mae_hivit_base")
    args = argparse.Namespace(blr=1e-4, device="cuda", output_dir="somewhere")
    other_entries = {
        "optimizer": {"state": {}},
        "epoch": 1599,
        "scaler": {},
        "args": args,
    }
    contents = {"official_mae": (model, {"model": state, **other_entries})}

    model, state = random_state_dict("hivit_base", num_classes=5)
    state["relative_position_index"] = np.zeros((4, 4), np.int64)
    ema = {name: array * 2 for name, array in state.items()}
    contents["official_finetuned"] = (
        model,
        {"model": state, "model_ema": ema, "args": args},
    )

    model, state = random_state_dict(
        "hivit_base", num_classes=5, fc_norm=False, layer_norm_eps=1e-5
    )
    mmpretrain_state = {}
    for name, array in state.items():
        if name.startswith("head."):
            mmpretrain_state[name.replace("head.", "head.fc.")] = array
        else:
            new_name = {"absolute_pos_embed": "pos_embed"}.get(name, name)
            mmpretrain_state[f"backbone.{new_name}"] = array
    index = np.zeros((4, 4), np.int64)
    mmpretrain_state["backbone.relative_position_index"] = index
    mmpretrain_state["backbone.blocks.6.attn.relative_position_index"] = index
    meta = {"epoch": 300, "experiment_name": "hivit"}
    contents["mmpretrain"] = (model, {"state_dict": mmpretrain_state, "meta": meta})
    return contents


def with_tensors(content):
    """Convert the arrays of nested dicts to PyTorch tensors."""
    import torch

    if isinstance(content, dict):
        return {key: with_tensors(value) for key, value in content.items()}
    return torch.tensor(content) if isinstance(content, np.ndarray) else content


def save_safetensors(path, state, about=()):
    """Write a safetensors file with the safetensors package; return its path.

    Args:
      about: metadata, {text: text}.
    """
    from safetensors.numpy import save_file

    state = {name: np.array(array, order="C") for name, array in state.items()}
    save_file(state, path, dict(about))
    return path


if __name__ == "__main__":
    import torch

    for kind, (_, content) in contents_by_format().items():
        torch.save(with_tensors(content), Path(reference.GOLDEN) / f"{kind}.pth")
