"""Frozen parameters: no gradient, no update, no optimizer state."""

from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hivit_jax.errors import ConfigError
from hivit_jax.tree import leaf_name

STAGES = "stages:"  # followed by the number of stages to freeze
# Parts of the encoder that are numbered by stage.
_STAGE_PARTS = ("stages", "merges")


def frozen_parameters(freeze: str, names: Iterable[str]) -> frozenset[str]:
    """Return the names of the parameters that `model.freeze` selects.

    Args:
      freeze: prefixes of names, separated by commas. A prefix ends at a slash or at the
        end of the name. ``stages:N`` stands for the encoder up to the Nth stage: patch
        embedding, absolute positions, N stages and the merges after them.
      names: names of all parameters.

    Raises:
      ConfigError: a prefix selects no parameter, or no parameter remains to be trained.
    """
    names, frozen = [*names], set()
    for item in filter(None, map(str.strip, freeze.split(","))):
        prefixes = _stage_prefixes(item, names) or (item.rstrip("/"),)
        found = {n for n in names for p in prefixes if f"{n}/".startswith(f"{p}/")}
        if not found:
            raise ConfigError(
                f"model.freeze: no parameter is selected by {item!r}; expected "
                f"{_choices(names)}"
            )
        frozen |= found
    if frozen and len(frozen) == len(names):
        raise ConfigError(
            f"model.freeze={freeze!r} selects all parameters; expected at least "
            "one that is not frozen"
        )
    return frozenset(frozen)


def _stage_prefixes(item: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return the prefixes that ``stages:N`` stands for; () if `item` is not valid."""
    count = item.removeprefix(STAGES)
    if count == item or not (count.isascii() and count.isdigit()):
        return ()
    if not 1 <= int(count) <= _number_of_stages(names):
        return ()
    stages = range(int(count))
    parts = [f"encoder/{part}/{stage}" for stage in stages for part in _STAGE_PARTS]
    return ("encoder/patch_embed", "encoder/absolute_pos_embed", *parts)


def _number_of_stages(names: Iterable[str]) -> int:
    return len({n.split("/")[2] for n in names if n.startswith("encoder/stages/")})


def _choices(names: Iterable[str]) -> str:
    """Return the prefixes that `model.freeze` may contain, as text.

    A prefix is the first component of a name, or the first two in the encoder.
    """
    names = [*names]
    parts = [name.split("/") for name in names]
    depth = {"encoder": 2}
    choices = dict.fromkeys("/".join(p[: depth.get(p[0], 1)]) for p in parts)
    if stages := _number_of_stages(names):
        choices = [f"{STAGES}1 to {STAGES}{stages}", "encoder", *choices]
    return f"{', '.join(choices)}, or a longer prefix of a parameter's name"


def freeze_updates(
    optimizer: optax.GradientTransformation, frozen: Collection[str]
) -> optax.GradientTransformation:
    """Return an optimizer that has no updates and no state for frozen parameters.

    Freezing does not change the names of the other arrays of the optimizer state.
    """

    def without_frozen(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: optax.MaskedNode() if leaf_name(path) in frozen else x, tree
        )

    def update(updates, state, params=None):
        new_updates, state = optimizer.update(
            without_frozen(updates), state, params and without_frozen(params)
        )
        # Adding -0.0 leaves every x unchanged. Adding 0.0 would change -0.0 to 0.0.
        updates = jax.tree.map(
            lambda new, old: jnp.full_like(old, -0.0) if _is_masked(new) else new,
            new_updates,
            updates,
            is_leaf=_is_masked,
        )
        return updates, state

    if not frozen:
        return optimizer
    init = optimizer.init
    return optax.GradientTransformation(lambda p: init(without_frozen(p)), update)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def stop_gradients(params: Any, frozen: Collection[str]) -> Any:
    """Return the parameters, with `stop_gradient` on the frozen parameters."""
    return select_frozen(frozen, jax.tree.map(jax.lax.stop_gradient, params), params)


def select_frozen(frozen: Collection[str], if_frozen: Any, if_trained: Any) -> Any:
    """Return a pytree with the leaves of `if_frozen` at frozen names.

    All other leaves come from `if_trained`.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x, y: x if leaf_name(path) in frozen else y,
        if_frozen,
        if_trained,
    )
