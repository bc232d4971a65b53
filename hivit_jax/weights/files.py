"""Read and write state dicts as PyTorch (``.pth``) or safetensors files.

Reading never runs code from a file, see `torch_format`. A safetensors file contains
only numbers and a JSON header. `read` infers the format of a file from its contents,
`write` from its suffix.
"""

import io
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from safetensors import SafetensorError
from safetensors.numpy import save

from hivit_jax.errors import CheckpointError, ConfigError, first_line
from hivit_jax.weights import nesting
from hivit_jax.weights.torch_format import TorchFile

# Files that `save_pretrained` writes.
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
TORCH_WEIGHTS = "pytorch_model.bin"  # older models of Hugging Face Transformers
# Weight files that a config.json in the same directory or repository describes.
DIRECTORY_WEIGHTS = (WEIGHTS, TORCH_WEIGHTS)
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")  # .tar: for .pth.tar
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
# Key of our JSON description of the model in a file; other programs ignore this key.
METADATA_KEY = "hivit_jax"
SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
# Files that cannot be read, such as failed downloads: pattern of their first bytes ->
# description.
OTHER_KINDS = {
    rb"\s*(<!doctype html|<html|<head)": "an HTML page, not the file that it links to",
    rb"\s*<\?xml": "an XML document",
    rb"version https://git-lfs": "a git-lfs pointer; run git lfs pull",
    rb"\x1f\x8b": "a gzip archive; unpack it first",
    rb"BZh": "a bzip2 archive; unpack it first",
    rb"\xfd7zXZ": "an xz archive; unpack it first",
    rb"\x28\xb5\x2f\xfd": "a zstd archive; unpack it first",
    rb"7z\xbc\xaf|Rar!": "a 7z or rar archive; unpack it first",
    rb".{257}ustar": "a tar archive; unpack it first",
    rb"\x89HDF": "an HDF5 file",
    rb"\x93NUMPY": "a NumPy array",
    rb"GGUF": "a GGUF file",
    rb"%PDF": "a PDF document",
    rb"\x89PNG|\xff\xd8\xff|GIF8": "an image",
    rb"\s*[{\[]": "a JSON file",
    rb"\x00+\Z": "a file of zeros (incomplete download?)",
    rb"[\t\n\r -~]+\Z": "a text file",
}


class WeightFile(NamedTuple):
    """Contents of a file with a state dict.

    state: NumPy arrays by their PyTorch names.
    metadata: the parsed `metadata` of `write`, {} in files of other programs.
    key: key of the state dict in the file, with "/" between nested keys; "" if the file
      is a bare state dict.
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
      CheckpointError: the file does not exist, is damaged or of another kind, contains
        no state dict or several, or has entries that are not dense tensors.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            first_bytes = file.read(1024)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not first_bytes:
        raise CheckpointError(f"{path} is empty; copy or download it again")
    header_size = int.from_bytes(first_bytes[:8], "little")
    if first_bytes[8:9] == b"{" and header_size < path.stat().st_size:
        return _read_safetensors(path)
    if first_bytes.startswith((b"PK", b"\x80")):
        return _read_torch(path, averaged)
    kinds = (
        kind
        for pattern, kind in OTHER_KINDS.items()
        if re.match(b"(?is)" + pattern, first_bytes)
    )
    kind = next(kinds, "")
    if not kind and path.suffix == ".safetensors":
        return _read_safetensors(path)  # raises an error that describes the damage
    kind = kind or f"of an unknown kind, its first bytes are {first_bytes[:8]!r}"
    raise CheckpointError(
        f"{path} is {kind}; expected a file written by torch.save or safetensors"
    )


def write(path: Path, state: Mapping[str, np.ndarray], metadata: str) -> None:
    """Write a state dict to a safetensors file or a PyTorch file ({"model": state}).

    Args:
      metadata: JSON description of the model, which `read` returns as a dict.

    Raises:
      ConfigError: the file cannot be written, or requires PyTorch, which is not
        installed. An existing file is then unchanged.
    """
    if path.suffix == ".safetensors":
        content = save(dict(state), {"format": "pt", METADATA_KEY: metadata})
    else:
        torch, buffer = import_torch(path), io.BytesIO()
        tensors = {name: torch.from_numpy(array) for name, array in state.items()}
        torch.save({"model": tensors, METADATA_KEY: metadata}, buffer)
        content = buffer.getbuffer()
    write_bytes(path, content)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file completely or, after an error, not at all.

    The umask determines the file's mode.

    Raises:
      ConfigError: the file cannot be written.
    """
    part = path.with_name(f"{path.name}.incomplete")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):  # the file was renamed, or never written
            part.unlink()


def import_torch(path: Path) -> Any:
    """Import PyTorch, which is required to write the file `path`.

    Raises:
      ConfigError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ConfigError(
            f"{path} requires PyTorch, which is not installed.\n"
            "Run pip install 'hivit-jax[torch]', or write a .safetensors file"
        ) from error
    return torch


def _read_safetensors(path: Path) -> WeightFile:
    # Does not use `safe_open`, which cannot read float8 into NumPy arrays.
    try:
        content = path.read_bytes()
        arrays = safetensors.deserialize(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        text = header.get("__metadata__", {}).get(METADATA_KEY, "{}")
        state = {
            name: np.frombuffer(
                array["data"], SAFETENSORS_DTYPES[array["dtype"]]
            ).reshape(array["shape"])
            for name, array in arrays
        }
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file: {first_line(error)}"
        ) from error
    return WeightFile(state, _parse_metadata(path, text), "", [])


def _read_torch(path: Path, averaged: bool) -> WeightFile:
    file = TorchFile(path)
    content = file.content
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} contains a {type(content).__name__}; expected a dict"
        )
    try:
        key, records = nesting.find_state_dict(content, averaged)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    used = {METADATA_KEY, key.split("/")[0], *(records if not key else ())}
    other_keys = [str(name) for name in content if name not in used]
    state = {name: file.array(name, record) for name, record in records.items()}
    metadata = _parse_metadata(path, content.get(METADATA_KEY, "{}"))
    return WeightFile(state, metadata, key, other_keys)


def _parse_metadata(path: Path, text: Any) -> dict[str, Any]:
    try:
        metadata = json.loads(text)
        if not isinstance(metadata, dict):
            raise ValueError
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: expected a JSON object as metadata {METADATA_KEY!r}, found "
            f"{text!r:.60}"
        ) from error
    return metadata
