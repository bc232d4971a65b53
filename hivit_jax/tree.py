"""Names and splitting of pytrees of arrays."""

from typing import Any

import jax
from flax import nnx


def split(model: nnx.Module) -> tuple[nnx.GraphDef, dict]:
    """Module -> (structure, nested dicts of arrays); `nnx.merge` undoes it."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def split_state(model: nnx.Module) -> tuple[nnx.GraphDef, dict, dict]:
    """Module -> (structure, parameters, model state), the last two nested dicts of
    arrays; `nnx.merge` undoes it.

    Model state is every variable that is not an `nnx.Param`: batch statistics and
    fixed tables. It is never trained.
    """
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, model_state = map(nnx.to_pure_dict, states)
    return graphdef, params, model_state


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves of a pytree by path, such as ``encoder/stages/0/1/mlp/fc1/kernel``."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {leaf_name(path): leaf for path, leaf in leaves}


def leaf_name(path: tuple) -> str:
    """A key path of `jax.tree_util` as the name that `named_leaves` gives."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
