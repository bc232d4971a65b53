"""Shapes of the arrays of a state dict, and registered models by size."""

from collections.abc import Mapping
from typing import Any

from hivit_jax.errors import CheckpointError
from hivit_jax.models import VARIANTS, Model
from hivit_jax.progress import listed


class Shapes(dict[str, tuple[int, ...]]):
    """Shapes of the arrays of a state dict, by official name."""

    kind = "HiViT"  # for error messages

    def require(self, name: str, ndim: int) -> tuple[int, ...]:
        """Return the shape of an array.

        Raises:
          CheckpointError: there is no such array, it does not have `ndim` dimensions,
            or one of its dimensions is 0.
        """
        if len(self.get(name, ())) != ndim or 0 in self[name]:
            found = list(self[name]) if name in self else "missing"
            raise CheckpointError(
                f"not a {self.kind}: {name!r} is {found}; expected a nonempty array "
                f"with {ndim} dimensions.\nFound the entries {listed([*self], 3)}"
            )
        return self[name]

    def count(self, prefix: str) -> int:
        """Return the number of different components right after `prefix` in names."""
        suffixes = [n.removeprefix(prefix) for n in self if n.startswith(prefix)]
        return len({suffix.split(".")[0] for suffix in suffixes})

    def head_arguments(self) -> dict[str, Any]:
        """Return a classifier's num_classes (if it has a head) and running_norm."""
        arguments: dict[str, Any] = dict(running_norm="fc_norm.mean" in self)
        if head := self.get("head.weight"):
            arguments["num_classes"] = head[0]
        return arguments

    def block_counts(self) -> list[int]:
        """Return the number of residual blocks of each stage of a HiViT.

        Raises:
          CheckpointError: blocks and widths do not fit a HiViT.
        """
        counts, index = [0], 0
        while any(name.startswith(f"blocks.{index}.") for name in self):
            if f"blocks.{index}.reduction.weight" in self:  # a merge
                counts.append(0)
            else:
                counts[-1] += 1
            index += 1
        dim = self.require("absolute_pos_embed", 3)[2]
        width = self.require("patch_embed.proj.weight", 4)[0]
        num_merges = len(counts) - 1
        has_odd_count = any(count % 2 for count in counts[:-1])
        if has_odd_count or not num_merges or width << num_merges != dim:
            raise CheckpointError(
                f"not a HiViT: found {counts} blocks between merges and widths from "
                f"{width} to {dim}; expected an even number of blocks before each "
                "merge, and that each merge doubles the width"
            )
        return counts


def registered(model_class: type[Model], arguments: Mapping[str, Any]) -> list[str]:
    """Return the names of the registered models of this class and size."""
    depths = arguments.get("depths") or (arguments["depth"],)
    sizes = arguments["embed_dim"], depths
    return [
        name
        for name, (variant_class, config) in VARIANTS.items()
        if variant_class is model_class and (config.embed_dim, config.depths) == sizes
    ]


def with_name(model_class: type[Model], arguments: dict[str, Any]) -> dict[str, Any]:
    """Add a name to arguments: the first `registered` name, or `model_class.name`."""
    name = next(iter(registered(model_class, arguments)), model_class.name)
    return dict(name=name) | arguments
