"""Files that hold state dicts: PyTorch's ``.pth``, and safetensors.

Nothing in a file is ever run. PyTorch reads its own format with ``weights_only``, which
builds tensors and plain containers and refuses everything else, after its zip archive
has been checked here; a safetensors file is numbers behind a table of contents.
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
# Where programs put the state dict; the averaged weights (EMA) come first.
PLACES = ("model_ema", "state_dict_ema", "model", "state_dict")
# Key of our own description of the model, JSON text, which other programs pass over.
KEY = "hivit_jax"


class WeightFile(NamedTuple):
    """A state dict as a file holds it.

    state: numpy arrays by their PyTorch names.
    about: what `write` was given, {} in other programs' files.
    place: which of `PLACES` the state dict was found in, "" where it is the file.
    others: what else the file holds, by name.
    """

    state: dict[str, np.ndarray]
    about: dict[str, Any]
    place: str
    others: list[str]


def read(path: Path, averaged: bool = True) -> WeightFile:
    """Reads a state dict.

    Args:
      averaged: take averaged weights where the file has them.

    Raises:
      CheckpointError: no file, a damaged or unsafe one, no state dict in it, something
        else than dense tensors in it, or PyTorch is missing.
    """
    path = Path(path)  # of this machine; a bucket's files are to be copied first
    if not path.is_file():
        raise CheckpointError(f"no file {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path, averaged)
    raise CheckpointError(
        f"{path} has an unknown ending; expected one of {', '.join(SUFFIXES)}"
    )


def write(path: Path, state: Mapping[str, np.ndarray], about: Mapping) -> None:
    """Writes a state dict, as safetensors or as PyTorch does ({"model": state}).

    Raises:
      CheckpointError: PyTorch is missing.
    """
    # Copies: PyTorch takes only what it may write to.
    state = {name: np.array(array, order="C") for name, array in state.items()}
    if path.suffix == ".safetensors":
        save_file(state, path, {"format": "pt", KEY: json.dumps(about)})
    else:
        torch = import_torch(path)
        tensors = {name: torch.from_numpy(array) for name, array in state.items()}
        torch.save({"model": tensors, KEY: json.dumps(about)}, path)


def import_torch(path: Path) -> Any:
    """PyTorch; CheckpointError where it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{path}: this format is PyTorch's, which is not installed.\n"
            "pip install 'hivit-jax[torch]', or use a .safetensors file"
        ) from error
    return torch


def _read_safetensors(path: Path) -> WeightFile:
    try:
        with safe_open(path, "np") as file:
            about = (file.metadata() or {}).get(KEY, "{}")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file: {first_line(error)}"
        ) from error
    return WeightFile(state, _about(path, about), "", [])


def _read_torch(path: Path, averaged: bool) -> WeightFile:
    _check_archive(path)
    torch = import_torch(path)
    try:
        # Official files hold the command line's arguments as a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes of it
        raise CheckpointError(
            f"{path} is damaged, or holds more than tensors and plain values: "
            f"{_torch_reason(error)}"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected dict")
    places = PLACES if averaged else [p for p in PLACES if not p.endswith("ema")]
    found = [p for p in places if isinstance(content.get(p), Mapping) and content[p]]
    place = found[0] if found else ""
    tensors = content[place] if place else content
    others = [str(name) for name in content if name != place] if place else []
    limit, state = path.stat().st_size, {}
    for name, tensor in tensors.items():
        if name == KEY and not place:
            continue
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{path}: {name!r} is of type {type(tensor).__name__}; expected a "
                "state dict, tensors by name"
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(f"{path}: {name!r} is not a dense tensor")
        if tensor.numel() * tensor.element_size() > limit:
            raise CheckpointError(
                f"{path}: {name!r}, {list(tensor.shape)}, is larger than the file"
            )
        if tensor.dtype == torch.bfloat16:
            bits = tensor.contiguous().view(torch.uint16).numpy()
            state[name] = bits.view(ml_dtypes.bfloat16)
        else:
            state[name] = tensor.detach().resolve_conj().resolve_neg().numpy()
    about = content.get(KEY, "{}")
    return WeightFile(
        state, _about(path, about), place, [o for o in others if o != KEY]
    )


def _check_archive(path: Path) -> None:
    """CheckpointError unless a file is a zip archive as ``torch.save`` writes it.

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


def _about(path: Path, text: Any) -> dict[str, Any]:
    try:
        about = json.loads(text)
        if not isinstance(about, dict):
            raise ValueError
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: what it says of the model is not JSON"
        ) from error
    return about


def _torch_reason(error: Exception) -> str:
    """What PyTorch says it refused, without its advice to switch the check off."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return (telling or lines or [type(error).__name__])[0][:200]
