"""Downloads from the Hugging Face hub."""

from functools import partial
from pathlib import Path

from hivit_jax.errors import CheckpointError, first_line
from hivit_jax.weights.files import CONFIG, DIRECTORY_WEIGHTS, TORCH_WEIGHTS, WEIGHTS
from hivit_jax.weights.library_configs import PREPROCESSOR


def download(address: str) -> Path:
    """Download ``hf://ORGANIZATION/NAME[@REVISION][/FILE]`` and return the local path.

    Without FILE, returns a directory with files as written by
    `hivit_jax.save_pretrained`, timm or transformers. Offline (``HF_HUB_OFFLINE=1`` or
    no network), returns an earlier download.

    Raises:
      CheckpointError: the address is malformed, the file does not exist, there is
        neither a connection nor a local copy, or huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{address}: huggingface_hub is not installed. Run "
            "pip install 'hivit-jax[hub]', or download the files by other means"
        ) from error
    parts = address.removeprefix("hf://").split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise CheckpointError(f"{address}: expected hf://ORGANIZATION/NAME")
    name, _, revision = parts[1].partition("@")
    file = parts[2] if len(parts) > 2 else ""
    patterns = [file] if file else [WEIGHTS, CONFIG, PREPROCESSOR]
    download_files = partial(
        snapshot_download, f"{parts[0]}/{name}", revision=revision or None
    )
    try:
        directory = Path(download_files(allow_patterns=patterns))
        if not file and not (directory / WEIGHTS).is_file():
            download_files(allow_patterns=[TORCH_WEIGHTS])
    except Exception as error:  # network and hub cause many types of exceptions
        raise CheckpointError(
            f"{address} cannot be downloaded, and there is no complete local copy: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    path = directory / file
    candidates = [path] if file else [path / name for name in DIRECTORY_WEIGHTS]
    if not any(candidate.is_file() for candidate in candidates):
        hint = "" if file else f"; for another file, use {address}/FILE"
        raise CheckpointError(f"{address} has no {file or WEIGHTS}{hint}")
    return path
