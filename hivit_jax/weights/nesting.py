"""Find the state dict of a model in the nested objects that training programs save."""

import re
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from hivit_jax.errors import CheckpointError
from hivit_jax.progress import listed
from hivit_jax.weights.torch_format import StandIn, is_array

# Keys of the state dict in files of training programs, in order of preference. "": the
# file itself is the state dict.
STATE_DICT_KEYS = ("", "model", "state_dict", "module", "model_state_dict")
# The state dict of every supported model has an entry with this name, possibly after
# the prefix of a wrapper.
ANCHOR = "patch_embed.proj.weight"
# Names that PyTorch inserts for DistributedDataParallel, torch.compile,
# FullyShardedDataParallel and activation checkpointing. The pattern does not match at
# the start of a name, where such a component is part of the prefix.
WRAPPERS = re.compile(
    r"(?<=\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
MAX_DEPTH = 3  # levels of nested dicts that are searched for state dicts
MAX_MODULES = 100_000  # visited modules; a damaged file may nest them in a cycle


class Unwrapped(NamedTuple):
    """A state dict without prefixes.

    state: {remaining name: array}, for `official_names`.
    removed: the removed wrappers and prefixes.
    unused: names that do not start with the prefix, such as parameters of a loss.
    """

    state: dict[str, Any]
    removed: list[str]
    unused: list[str]


def is_averaged(name: str) -> bool:
    """Return True if a key or prefix contains the word "ema" (averaged weights)."""
    return "ema" in re.split(r"[^a-z]", name.lower())


def find_state_dict(
    content: Mapping[Any, Any], averaged: bool = True
) -> tuple[str, dict[str, StandIn]]:
    """Return the key and the entries of the state dict in a `TorchFile`'s content.

    The entries are {name: stand-in}; `TorchFile.array` reads the array of a stand-in.
    Keys of nested dicts are joined by "/". A pickled module counts as a state dict.

    Args:
      averaged: prefer averaged weights (EMA).

    Raises:
      CheckpointError: there is no state dict, or several to choose from.
    """
    found = _state_dicts(content)
    if not found:
        kinds = [f"{key!r}: {_type_name(value)}" for key, value in content.items()]
        raise CheckpointError(
            f"contains no named tensors, only {{{listed(kinds, 4)}}}; expected a state "
            "dict"
        )
    keys = [key for key, names in found.items() if any(map(_is_anchor, names))]
    if not keys:  # no supported model; `infer.infer` raises an error
        keys = [max(found, key=lambda key: len(found[key]))]
    keys = [key for key in keys if is_averaged(key) == averaged] or keys
    for known in STATE_DICT_KEYS:
        keys = [key for key in keys if key.split("/")[0] == known] or keys
    if len(keys) > 1:
        raise CheckpointError(
            f"contains several state dicts, {', '.join(keys)}; expected one. "
            "Save one state dict in a separate file"
        )
    return keys[0], found[keys[0]]


def remove_prefixes(state: Mapping[str, Any], averaged: bool = True) -> Unwrapped:
    """Remove `WRAPPERS` and the prefix in front of a model's names.

    Args:
      averaged: prefer averaged weights (EMA) if there are two models.

    Raises:
      CheckpointError: the state dict contains several models.
    """
    # Remove wrappers inside names first, so that all names have the same prefix.
    removed = sorted({f"{part}." for n in state for part in WRAPPERS.findall(n)})
    named = {WRAPPERS.sub("", name): array for name, array in state.items()}
    # "backbone." stays, because `official_names` removes it from MMPretrain's names.
    prefixes = {
        name.removesuffix(ANCHOR).removesuffix("backbone.")
        for name in filter(_is_anchor, named)
    }
    # The "encoder." of SimMIM also stays. Only SimMIM has a mask token in the encoder.
    prefixes = {
        p.removesuffix("encoder.") if f"{p}mask_token" in named else p for p in prefixes
    }
    prefixes = {p for p in prefixes if is_averaged(p) == averaged} or prefixes
    # Names collide if the state dict contains a model both with and without wrappers.
    if len(prefixes) > 1 or len(named) < len(state):
        found = ", ".join(map(repr, sorted(prefixes)))
        raise CheckpointError(
            f"the state dict contains several models, {found}; expected one. Save one "
            "model in a separate file"
        )
    prefix = "".join(prefixes)
    if not prefix:
        return Unwrapped(named, removed, [])
    unprefixed = {
        n.removeprefix(prefix): a for n, a in named.items() if n.startswith(prefix)
    }
    unused = [name for name in named if not name.startswith(prefix)]
    return Unwrapped(unprefixed, [*removed, prefix], unused)


def _is_anchor(name: str) -> bool:
    return f".{name}".endswith(f".{ANCHOR}")


def _type_name(value: Any) -> str:
    return getattr(value, "source", "") or type(value).__name__


def _state_dicts(content: Mapping[Any, Any]) -> dict[str, dict[str, StandIn]]:
    """Return {key: tensors by name} of all nested dicts that contain tensors."""
    found, seen, queue = {}, set(), deque([("", 0, content)])
    while queue:
        key, depth, entry = queue.popleft()
        if id(entry) in seen:
            continue
        seen.add(id(entry))
        items = {n: v for n, v in _entries(entry).items() if isinstance(n, str)}
        if arrays := {name: value for name, value in items.items() if is_array(value)}:
            found[key] = arrays
        if depth < MAX_DEPTH:
            queue.extend(
                (f"{key}/{name}".lstrip("/"), depth + 1, value)
                for name, value in items.items()
                if isinstance(value, dict) and not is_array(value)
            )
    return found


def _entries(entry: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the items and attributes of `entry`, or the state dict of a module."""
    attributes = _as_dict(getattr(entry, "state", None))
    if "_parameters" not in attributes:
        return {**attributes, **entry}
    arrays, queue = {}, deque([("", attributes)])
    for _ in range(MAX_MODULES):
        if not queue:
            break
        prefix, attributes = queue.popleft()
        for group in ("_parameters", "_buffers"):
            entries = _as_dict(attributes.get(group))
            arrays |= {f"{prefix}{name}": array for name, array in entries.items()}
        for name, module in _as_dict(attributes.get("_modules")).items():
            queue.append((f"{prefix}{name}.", _as_dict(getattr(module, "state", None))))
    return arrays


def _as_dict(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}
