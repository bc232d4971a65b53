"""Selection of a source's examples: held-out images, percent slices, exclusions."""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from hivit_jax.data.sources.base import DerivedSource, Source
from hivit_jax.errors import ConfigError, DataError
from hivit_jax.paths import expand

NO_EVALUATION = "none"  # value of `data.eval_split`
EXCLUDED = "excluded by data.exclude"
_SLICE = re.compile(r"(.*)\[(?:(-?\d+)%)?:(?:(-?\d+)%)?\]")


@dataclass(frozen=True)
class Selection:
    """Rules that select examples, from the config keys of the same names.

    Attributes:
      eval_fraction: fraction of the examples to hold out; 0: none.
      eval_group: regular expression; files whose paths have the same first group stay
        in the same split.
      exclude: file that lists the paths of the files to leave out, one per line; "": no
        such file.
    """

    eval_fraction: float = 0.0
    eval_group: str = ""
    exclude: str = ""

    def check(self, eval_split: str) -> None:
        """Raise ConfigError for contradictory values or an invalid pattern."""
        if self.eval_fraction and eval_split:
            raise ConfigError(
                f"data.eval_fraction={self.eval_fraction} with data.eval_split="
                f"{eval_split!r}; expected only one of the two; set "
                "data.eval_fraction=0 to override a recipe"
            )
        if self.eval_group and not self.eval_fraction:
            raise ConfigError(
                f"data.eval_group={self.eval_group!r} has no effect with "
                "data.eval_fraction=0; expected data.eval_fraction such as 0.1"
            )
        if self.eval_group:
            try:
                groups = re.compile(self.eval_group).groups
            except re.error as error:
                raise ConfigError(
                    f"data.eval_group={self.eval_group!r}: {error}; expected a regular "
                    "expression"
                ) from error
            if not groups:
                raise ConfigError(
                    f"data.eval_group={self.eval_group!r}: expected a group in "
                    r"parentheses, such as '(scene\d+)'"
                )


class FileSource(Source):
    """Source of files below one directory, whose examples can be selected by path.

    Attributes:
      root: directory that contains the files.
      labels: int [n], or uint8 [n, classes] with several labels per image.
    """

    root: str
    labels: np.ndarray

    def relative_paths(self) -> list[str]:
        """Return the path of each example's file; a path below `root` is relative."""
        raise NotImplementedError


class Subset(DerivedSource):
    """Selected examples of another source, in the order of that source.

    Args:
      source: the other source.
      indices: indices of the examples in `source`, int64 [k], increasing.
      excluded: number of examples that `data.exclude` leaves out.
      unmatched: see `Source`.
    """

    def __init__(
        self,
        source: FileSource,
        indices: np.ndarray,
        excluded: int = 0,
        unmatched: Sequence[str] = (),
    ):
        super().__init__(source)
        self._indices, self.labels = indices, source.labels[indices]
        self.ignored, self.unmatched = dict(source.ignored), unmatched
        if excluded:
            self.ignored[EXCLUDED] = excluded

    def source_index(self, index: int) -> int:
        return int(self._indices[index])

    def __len__(self) -> int:
        return len(self._indices)


def parse_slice(split: str) -> tuple[str, tuple[int, int]]:
    """Split a name such as ``train[:80%]`` into ("train", (0, 80)).

    Negative percentages count from the end.

    Raises:
      DataError: the name ends with a slice of another form.
    """
    match = _SLICE.fullmatch(split)
    if match:
        name, *bounds = match.groups()
        start, stop = (
            default if text is None else int(text) + 100 * text.startswith("-")
            for text, default in zip(bounds, (0, 100), strict=True)
        )
        if 0 <= start < stop <= 100:
            return name or ".", (start, stop)
    elif not split.endswith("]"):
        return split, (0, 100)
    raise DataError(
        f"split {split!r}: expected NAME or NAME[A%:B%] with A < B from 0 to 100, such "
        "as train[:80%] and train[80%:]"
    )


def select(
    source: FileSource,
    selection: Selection,
    held_out: bool,
    percent: tuple[int, int] = (0, 100),
) -> Source:
    """Return the selected examples of a source; `source` itself if all are selected.

    Args:
      held_out: with `eval_fraction`, return the held-out examples; False: return the
        training examples.
      percent: slice of each class to return; held-out examples are not sliced. The
        images of a class are ordered by a hash of their paths, so that adjacent slices
        are random, disjoint parts.

    Raises:
      ConfigError: `selection.exclude` cannot be read.
      DataError: `selection.eval_group` matches no path.
    """
    if not (selection.exclude or selection.eval_fraction or percent != (0, 100)):
        return source
    paths, excluded, unmatched = source.relative_paths(), 0, []
    chosen = np.arange(len(source))
    if selection.exclude:
        listed = _listed_paths(selection.exclude, source.root)
        known = {*paths}
        unmatched = [entry for entry, names in listed.items() if not known & names]
        names = set().union(*listed.values())
        chosen = np.array([i for i in chosen if paths[i] not in names], np.int64)
        excluded = len(source) - len(chosen)
    if selection.eval_fraction:
        groups = _groups([paths[i] for i in chosen], selection.eval_group)
        is_held_out = hold_out(groups, source.labels[chosen], selection.eval_fraction)
        chosen = chosen[is_held_out == held_out]
    if percent != (0, 100) and not (selection.eval_fraction and held_out):
        chosen_paths = [paths[i] for i in chosen]
        chosen = chosen[_slice_mask(chosen_paths, source.labels[chosen], percent)]
    return Subset(source, chosen, excluded, unmatched)


def _listed_paths(file: str, root: str) -> dict[str, set[str]]:
    """Return {line of a file: {its path as written, its path relative to `root`}}.

    Line feeds in paths are escaped, as check_data writes them.
    """
    try:
        lines = os.fsdecode(Path(expand(file)).read_bytes()).splitlines()
    except OSError as error:
        raise ConfigError(f"data.exclude={file}: {error.strerror}") from error
    names = {line: line.replace("\\n", "\n") for line in lines if line}
    return {k: {name, os.path.relpath(name, root)} for k, name in names.items()}


def _groups(paths: Sequence[str], pattern: str) -> list[str]:
    """Return the group of each path: the first group of `pattern`, else the path."""
    if not pattern:
        return [*paths]
    matches = [re.search(pattern, path) for path in paths]
    if paths and not any(matches):
        raise DataError(
            f"data.eval_group={pattern!r} matches none of {len(paths):,} paths, such "
            f"as {paths[0]}"
        )
    pairs = zip(paths, matches, strict=True)
    # match[1] is None if the group is optional in the pattern and did not match.
    return [match and match[1] or path for path, match in pairs]


def hold_out(groups: Sequence[str], labels: np.ndarray, fraction: float) -> np.ndarray:
    """Return True for each held-out example, bool [n].

    A group is held out if the hash of its name, in [0, 1), is below `fraction`. Other
    groups matter only if all groups of a class are on one side of `fraction`: then the
    group with the nearest hash changes sides. A group is not held out if a class would
    have no training group left; the group with the next hash is held out instead. A
    class with a single group is therefore never held out.

    Args:
      groups: name of each example's group.
      labels: int [n], or [n, classes] with several labels per image.
    """
    indices: dict[str, int] = {}  # name of a group -> its index
    group_of = np.array([indices.setdefault(g, len(indices)) for g in groups], np.int64)
    hashes = np.array([_hash(name) for name in indices])
    is_held_out = hashes < fraction
    class_groups = [np.unique(group_of[examples]) for examples in by_label(labels)]
    for members in class_groups:
        if is_held_out[members].all():
            is_held_out[members[hashes[members].argmax()]] = False
    num_training = [int((~is_held_out[members]).sum()) for members in class_groups]
    classes_of = defaultdict(list)
    for k, members in enumerate(class_groups):
        for group in members.tolist():
            classes_of[group].append(k)
    for members in class_groups:
        if is_held_out[members].any():
            continue
        for group in members[hashes[members].argsort()].tolist():
            if all(num_training[k] > 1 for k in classes_of[group]):
                is_held_out[group] = True
                for k in classes_of[group]:
                    num_training[k] -= 1
                break
    return is_held_out[group_of]


def _slice_mask(
    paths: Sequence[str], labels: np.ndarray, percent: tuple[int, int]
) -> np.ndarray:
    """Return True for the examples in a slice of each class, bool [n].

    With several labels per image, returns a slice of all examples.
    """
    hashes = np.array([_hash(path) for path in paths])
    mask = np.zeros(len(paths), bool)
    # An image with several labels must not be in the slices of two classes.
    several = labels.ndim == 2
    for indices in [np.arange(len(paths))] if several else by_label(labels):
        order = indices[hashes[indices].argsort()]
        start, stop = (round(len(order) * bound / 100) for bound in percent)
        mask[order[start:stop]] = True
    return mask


def by_label(labels: np.ndarray) -> list[np.ndarray]:
    """Return the indices of the examples of each label that occurs."""
    if not len(labels):
        return []
    if labels.ndim == 2:
        return [np.flatnonzero(column) for column in labels.T if column.any()]
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _hash(text: str) -> float:
    """Return a hash of a path in [0, 1) that is the same on every machine."""
    digest = blake2b(os.fsencode(text), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
