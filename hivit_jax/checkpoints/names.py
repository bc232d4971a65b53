"""Match the optimizer arrays of older checkpoints with the current ones by name."""

from collections import defaultdict
from collections.abc import Container, Iterable


def match_names(
    saved: Iterable[str], expected: Iterable[str], variables: Container[str]
) -> dict[str, str]:
    """Return {saved name: expected name} for the arrays of a checkpoint's item.

    An optimizer is a chain of transformations, and the name of an array contains the
    position of its transformation. A version of hivit_jax that adds or removes a
    stateless transformation shifts the positions. Two names therefore denote the same
    array if they are equal after the positions are renumbered without gaps.

    A saved name without an expected name is returned unchanged. If two saved names
    would get the same expected name, all saved names are returned unchanged.

    Args:
      variables: names of the model's variables.
    """
    saved, expected = list(saved), list(expected)
    renumbered = _without_gaps(expected, variables)
    expected_names = dict(zip(renumbered, expected, strict=True))
    names = {
        name: expected_names.get(key, name)
        for name, key in zip(saved, _without_gaps(saved, variables), strict=True)
    }
    unique = len({*names.values()}) == len(saved)
    return names if unique else dict(zip(saved, saved, strict=True))


def _without_gaps(names: Iterable[str], variables: Container[str]) -> list[str]:
    """Return names of optimizer arrays with positions renumbered to 0, 1, ...

    Args:
      variables: names of the model's variables. Numbers in them are not positions.
    """

    def positions(name):
        """Yield (i, components before i, position) for each position in a name."""
        parts = name.split("/")
        starts = (i for i in range(len(parts)) if "/".join(parts[i:]) in variables)
        variable_start = next(starts, len(parts))
        for i, part in enumerate(parts[:variable_start]):
            if parts[0] == "opt_state" and part.isdigit():
                yield i, tuple(parts[:i]), int(part)

    used: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for name in names:
        for _, before, position in positions(name):
            used[before].add(position)

    def renumber(name):
        parts = name.split("/")
        for i, before, position in positions(name):
            parts[i] = str(sorted(used[before]).index(position))
        return "/".join(parts)

    return [renumber(name) for name in names]
