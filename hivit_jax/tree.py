"""Split modules into arrays, and name the leaves of pytrees."""

from typing import Any

import jax
from flax import nnx


def split(model: nnx.Module) -> tuple[nnx.GraphDef, dict]:
    """Split a module into (graphdef, nested dict of arrays) for `nnx.merge`."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def split_params(model: nnx.Module) -> tuple[nnx.GraphDef, dict, dict]:
    """Split a module into (graphdef, parameters, model state) for `nnx.merge`.

    Parameters and model state are nested dicts of arrays. The model state contains
    every variable that is not an `nnx.Param`, such as batch statistics and fixed
    tables, and is never trained.
    """
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, model_state = map(nnx.to_pure_dict, states)
    return graphdef, params, model_state


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves by name, such as ``encoder/stages/0/1/mlp/fc1/kernel``."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {leaf_name(path): leaf for path, leaf in leaves}


def leaf_name(path: tuple) -> str:
    """Convert a key path of `jax.tree_util` to a name of `named_leaves`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
