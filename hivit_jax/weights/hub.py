"""Models on the Hugging Face hub."""

from pathlib import Path

from hivit_jax.errors import CheckpointError, first_line
from hivit_jax.weights.save import CONFIG, WEIGHTS


def download(address: str) -> Path:
    """``hf://ORGANISATION/NAME[@REVISION][/FILE]`` -> the local copy.

    Offline (``HF_HUB_OFFLINE=1``, or no network) what was downloaded before is used.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{address}: huggingface_hub is not installed; "
            "pip install 'hivit-jax[hub]', or download it by other means"
        ) from error
    parts = address.removeprefix("hf://").split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise CheckpointError(f"{address}: expected hf://ORGANISATION/NAME")
    name, _, revision = parts[1].partition("@")
    file = parts[2] if len(parts) > 2 else ""
    wanted = [file] if file else [WEIGHTS, CONFIG]
    try:
        directory = snapshot_download(
            f"{parts[0]}/{name}", revision=revision or None, allow_patterns=wanted
        )
    except Exception as error:  # of the network, the hub or the local copy
        raise CheckpointError(
            f"{address} cannot be had, and no local copy is complete: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    path = Path(directory) / file
    if not (path if file else path / WEIGHTS).is_file():
        raise CheckpointError(f"{address} has no {file or WEIGHTS}")
    return path
