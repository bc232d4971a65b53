"""Weight files in the layouts of the official code, timm and `transformers`."""

import json

import numpy as np
import state_files
import torch_files

# Official names -> names in the library `transformers`. `BLOCK_NAMES`: modules of a
# block; `NAMES`: modules and arrays outside of blocks.
BLOCK_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "patch_embed.norm": "embeddings.norm",
    "norm": "layernorm",
}


def transformers_state(state, family):
    """Convert an official state dict to the names of the library `transformers`.

    Args:
      family: "vit" or "swin", the prefix of the encoder's names.
    """
    named = {}
    for name, array in state.items():
        name = name.removeprefix("encoder.")
        module, _, leaf = name.rpartition(".")
        if name == "mask_token":
            is_swin = family == "swin"
            new_name = "swin.embeddings.mask_token" if is_swin else "decoder.mask_token"
            named[new_name] = array
        elif name in NAMES or module in NAMES:
            new_name = NAMES[name] if name in NAMES else f"{NAMES[module]}.{leaf}"
            named[f"{family}.{new_name}"] = array
        elif module == "head":
            named[f"classifier.{leaf}"] = array
        elif name.startswith("decoder."):
            named[name] = array
        elif "blocks." in name:
            named |= _block_arrays(name, array, family)
        elif name.startswith("decoder_"):
            named[f"decoder.{name}"] = array
        else:
            named[f"{family}.encoder.{name}"] = array
    return named


def _block_arrays(name, array, family):
    """Return {new name: array} for an array of a block; split qkv into three."""
    prefix, _, rest = name.partition("blocks.")
    block_index, _, rest = rest.partition(".")
    module, leaf = rest.rsplit(".", 1)
    if prefix == "decoder_":
        block_name = f"decoder.decoder_layers.{block_index}"
    elif family == "swin":
        block_name = f"swin.encoder.{prefix}blocks.{block_index}"
    else:
        block_name = f"vit.encoder.layer.{block_index}"
    inner = "self" if family == "swin" else "attention"
    if module == "attn":
        return {f"{block_name}.attention.{inner}.{leaf}": array}
    if module == "attn.qkv":
        parts = zip(("query", "key", "value"), np.split(array, 3), strict=True)
        return {
            f"{block_name}.attention.{inner}.{part}.{leaf}": np.array(x)
            for part, x in parts
        }
    return {f"{block_name}.{BLOCK_NAMES[module]}.{leaf}": array}


def timm_swin_state(state):
    """Convert an official state dict of Swin to the names of timm."""
    named = {}
    for name, array in state.items():
        parts = name.split(".")
        if parts[0] == "head":
            parts.insert(1, "fc")
        elif parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) + 1)
        named[".".join(parts)] = array
    return named


def write_directory(path, state, config, processor=None):
    """Write a model directory in the layout of timm or `transformers`; return its path.

    Args:
      config: content of config.json.
      processor: content of preprocessor_config.json; None: do not write the file.
    """
    path.mkdir(parents=True)
    state_files.save_safetensors(path / "model.safetensors", state)
    (path / "config.json").write_text(json.dumps(config))
    if processor:
        (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


def write_official(path, weights):
    """Write a PyTorch file in the layout of the official code; return its path."""
    args = torch_files.Global("argparse", "Namespace")(state={"norm_pix_loss": True})
    content = {"model": torch_files.with_tensors(weights), "epoch": 3, "args": args}
    return torch_files.save(content, path)
