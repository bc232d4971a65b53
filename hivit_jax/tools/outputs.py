"""Paths that commands write to."""

from collections.abc import Iterable
from pathlib import Path

from hivit_jax.errors import ConfigError
from hivit_jax.paths import expand
from hivit_jax.weights.files import CARD, CONFIG, SUFFIXES, WEIGHTS


def figure_path(flag: str, path: str | Path, inputs: Iterable[str | Path]) -> Path:
    """Return the path of a PNG file to write; see `output_path`.

    Raises:
      ConfigError: as in `output_path`; or the path is a directory or does not end in
        .png.
    """
    output = output_path(flag, path, inputs)
    if output.is_dir():
        raise ConfigError(f"{flag}={path} is a directory; expected a .png file")
    if output.suffix.lower() != ".png":
        raise ConfigError(f"{flag}={path}: expected a name that ends in .png")
    return output


def output_path(flag: str, path: str | Path, inputs: Iterable[str | Path]) -> Path:
    """Return the path of a file or directory to write, with ``~`` expanded.

    Args:
      flag: name of the argument, for errors.
      inputs: files and directories that the command reads.

    Raises:
      ConfigError: the path is an input file, or a model's file in an input directory.
    """
    output = Path(expand(str(path)))
    for source in (Path(expand(str(each))) for each in inputs):
        files = [source]
        if source.is_dir():
            files = [source / name for name in (WEIGHTS, CONFIG, CARD)]
            files += [f for f in source.iterdir() if f.name.endswith(SUFFIXES)]
        if output.exists() and any(f.exists() and output.samefile(f) for f in files):
            raise ConfigError(
                f"{flag}={path} is an input of this command and would be overwritten; "
                "choose another path"
            )
    return output
