"""Read recipes: installed ones, the user's Python files, and a run's config.json."""

import ast
import importlib.util
import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from hivit_jax.errors import ConfigError, unknown
from hivit_jax.paths import expand

_PACKAGE = Path(__file__).parent
_INSTALLED = _PACKAGE / "configs"  # a clone has configs/ beside the package instead
DIRECTORY = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "configs"


def names() -> dict[str, str]:
    """Return {name: first line of the docstring} of the installed recipes."""
    return {name: text.split("\n")[0] for name, text in _docstrings().items()}


def variants() -> dict[str, str]:
    """Return {name: text that lists the variants} of the recipes that have variants."""
    found = {
        n: re.search(r"^Variants: ([^.]*)", t, re.M) for n, t in _docstrings().items()
    }
    return {name: " ".join(match[1].split()) for name, match in found.items() if match}


def _docstrings() -> dict[str, str]:
    """Return {name: docstring} of the installed recipes, without executing them."""
    trees = {p.stem: ast.parse(p.read_text()) for p in sorted(DIRECTORY.glob("*.py"))}
    return {name: ast.get_docstring(tree) or "" for name, tree in trees.items()}


def read(path: str) -> Mapping[str, Any]:
    """Read the values of a recipe as nested dicts, which include "task".

    Args:
      path: NAME of an installed recipe or a Python file, either of which may end with
        :VARIANT; or a ``config.json`` file of a run.

    Raises:
      ConfigError: the recipe does not exist or cannot be executed.
    """
    try:
        recipe = _read_json(path) if path.endswith(".json") else _execute(path)
        if not isinstance(recipe, Mapping):
            raise TypeError("expected a dict or ConfigDict")
        if "task" not in recipe:
            raise TypeError("config.task is missing")
        return recipe
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"--config={path} cannot be read: {type(error).__name__}: {error}"
        ) from error


def _read_json(path: str) -> Any:
    # Imported here, because Python recipes do not need etils.
    from etils import epath

    return json.loads(epath.Path(path).expanduser().read_text())


def _execute(path: str) -> Any:
    """Execute a recipe and return the result of its ``get_config()``.

    A ConfigDict is returned as nested dicts.
    """
    name, _, variant = path.partition(":")
    file = _locate(name)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None:
        raise ConfigError(f"--config={path}: expected a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if variant and not inspect.signature(module.get_config).parameters:
        raise ConfigError(
            f"--config={path}: {name} has no variants; expected --config={name}"
        )
    recipe = module.get_config(*filter(None, [variant]))
    return recipe.to_dict() if isinstance(recipe, ConfigDict) else recipe


def _locate(name: str) -> Path:
    is_file = "/" in name or name.endswith(".py")
    file = Path(expand(name)) if is_file else DIRECTORY / f"{name}.py"
    if file.is_file():
        return file
    if not is_file:
        raise ConfigError(f"--config={name}: {unknown('recipe', name, names())}")
    known = ", ".join(names())
    raise ConfigError(
        f"--config={name}: no such file; expected FILE.py or a recipe: {known}"
    )
