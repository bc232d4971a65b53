"""Read and write state dicts as PyTorch (``.pth``) or safetensors files.

Reading never runs code from a file. PyTorch files are loaded with ``weights_only``,
which builds only tensors and plain containers, after a check of their zip archive. A
safetensors file contains only numbers and a JSON header.
"""

import argparse
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hivit_jax.errors import CheckpointError, first_line

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
# Keys under which programs save the state dict, averaged weights (EMA) first.
STATE_DICT_KEYS = ("model_ema", "state_dict_ema", "model", "state_dict")
# Key of our JSON description of the model, which other programs ignore.
METADATA_KEY = "hivit_jax"


class WeightFile(NamedTuple):
    """Contents of a file with a state dict.

    state: numpy arrays by their PyTorch names.
    metadata: the `metadata` passed to `write`, {} in files of other programs.
    key: key of the state dict in the file, "" if the file is a bare state dict.
    other_keys: keys of the other entries of the file.
    """

    state: dict[str, np.ndarray]
    metadata: dict[str, Any]
    key: str
    other_keys: list[str]


def read(path: Path, averaged: bool = True) -> WeightFile:
    """Read a state dict from a local file; files in buckets must be copied first.

    Args:
      averaged: prefer averaged weights (EMA) if the file contains them.

    Raises:
      CheckpointError: the file does not exist, is damaged or unsafe, or contains no
        state dict of dense tensors; or PyTorch is required but not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no file {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path, averaged)
    raise CheckpointError(
        f"{path} has an unknown suffix; expected one of {', '.join(SUFFIXES)}"
    )


def write(path: Path, state: Mapping[str, np.ndarray], metadata: Mapping) -> None:
    """Write a state dict to a safetensors file or a PyTorch file ({"model": state}).

    Args:
      metadata: description of the model for `read`, which JSON can represent.

    Raises:
      CheckpointError: PyTorch is required but not installed.
    """
    # Copy, because PyTorch accepts only writable arrays.
    state = {name: np.array(array, order="C") for name, array in state.items()}
    if path.suffix == ".safetensors":
        save_file(state, path, {"format": "pt", METADATA_KEY: json.dumps(metadata)})
    else:
        torch = import_torch(path)
        tensors = {name: torch.from_numpy(array) for name, array in state.items()}
        torch.save({"model": tensors, METADATA_KEY: json.dumps(metadata)}, path)


def import_torch(path: Path) -> Any:
    """Return the PyTorch module, which is required for the file `path`.

    Raises:
      CheckpointError: it is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{path} requires PyTorch, which is not installed.\n"
            "Run pip install 'hivit-jax[torch]', or use a .safetensors file"
        ) from error
    return torch


def _read_safetensors(path: Path) -> WeightFile:
    try:
        with safe_open(path, "np") as file:
            text = (file.metadata() or {}).get(METADATA_KEY, "{}")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file: {first_line(error)}"
        ) from error
    return WeightFile(state, _parse_metadata(path, text), "", [])


def _read_torch(path: Path, averaged: bool) -> WeightFile:
    _check_archive(path)
    torch = import_torch(path)
    try:
        # Official files contain the command line arguments as a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # because damaged files cause exceptions of many types
        raise CheckpointError(
            f"{path} is damaged, or contains more than tensors and plain values: "
            f"{_torch_reason(error)}"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} contains a {type(content).__name__}; expected dict"
        )
    entries = {name: entry for name, entry in content.items() if name != METADATA_KEY}
    keys = [k for k in STATE_DICT_KEYS if averaged or not k.endswith("ema")]
    keys = [k for k in keys if isinstance(entries.get(k), Mapping) and entries[k]]
    key = keys[0] if keys else ""
    other_keys = [str(name) for name in entries if name != key] if key else []
    file_size, state = path.stat().st_size, {}
    for name, tensor in (entries[key] if key else entries).items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{path}: {name!r} is of type {type(tensor).__name__}; expected a "
                "state dict with tensors by name"
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(f"{path}: {name!r} is not a dense tensor")
        if tensor.numel() * tensor.element_size() > file_size:
            raise CheckpointError(
                f"{path}: {name!r}, {list(tensor.shape)}, is larger than the file"
            )
        if tensor.dtype == torch.bfloat16:
            bits = tensor.contiguous().view(torch.uint16).numpy()
            state[name] = bits.view(ml_dtypes.bfloat16)
        else:
            state[name] = tensor.detach().resolve_conj().resolve_neg().numpy()
    metadata = _parse_metadata(path, content.get(METADATA_KEY, "{}"))
    return WeightFile(state, metadata, key, other_keys)


def _check_archive(path: Path) -> None:
    """Raise CheckpointError unless a file is a zip archive in ``torch.save``'s format.

    Its members are not compressed, so that none can be larger than the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} is truncated, or not written by PyTorch 1.6 or newer: "
            f"{first_line(error)}"
        ) from error
    size = path.stat().st_size
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
            raise CheckpointError(
                f"{path}: {member.filename!r} is compressed, which PyTorch never does"
            )
        if member.filename.startswith(("/", "\\")) or ".." in member.filename:
            raise CheckpointError(f"{path}: {member.filename!r} leaves the archive")
    if sum(member.file_size for member in members) > size:
        raise CheckpointError(f"{path}: its members overlap")


def _parse_metadata(path: Path, text: Any) -> dict[str, Any]:
    try:
        metadata = json.loads(text)
        if not isinstance(metadata, dict):
            raise ValueError
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: its {METADATA_KEY!r} metadata is not a JSON object"
        ) from error
    return metadata


def _torch_reason(error: Exception) -> str:
    """Return PyTorch's reason, without its advice to disable ``weights_only``."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return (reasons or lines or [type(error).__name__])[0][:200]
