"""Support for meshes with Explicit axes, the default of `jax.make_mesh`."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def accepts_explicit_axes(method: Callable) -> Callable:
    """Decorate a method of an nnx.Module so that it runs on meshes with Explicit axes.

    With Explicit axes, the sharding of an array is part of its type, and JAX rejects
    reshapes that split or merge a sharded dimension. Models need such reshapes for
    patches and cells. The decorated method therefore runs with Auto axes, where XLA
    propagates shardings. Without Explicit axes the method runs unchanged.

    The first array argument that has dimensions and lies on a mesh with Explicit axes
    is the batch. Dimension 0 of each result is sharded like dimension 0 of the batch.
    All other dimensions are replicated.

    The method must not change variables of the module.
    """

    @wraps(method)
    def run(self, *args, **kwargs):
        leaves, tree = jax.tree.flatten((args, kwargs))
        shardings = [jax.typeof(x).sharding for x in leaves if _is_array(x)]
        meshes = [jax.sharding.get_abstract_mesh(), *(s.mesh for s in shardings)]
        mesh = next((mesh for mesh in meshes if _explicit_axes(mesh)), None)
        if mesh is None:
            return method(self, *args, **kwargs)
        graphdef, state = nnx.split(self)
        out_structures = []  # filled while `with_auto_axes` is traced

        def with_auto_axes(state, arrays):
            arrays = iter(arrays)
            inputs = [next(arrays) if _is_array(x) else x for x in leaves]
            args, kwargs = jax.tree.unflatten(tree, inputs)
            out = method(nnx.merge(graphdef, state), *args, **kwargs)
            out_leaves, treedef = jax.tree.flatten(out)
            out_structures.append((treedef, [x.ndim == 0 for x in out_leaves]))
            scalars = [x for x in out_leaves if x.ndim == 0]
            return scalars, [x for x in out_leaves if x.ndim]

        specs = [s.spec for s in shardings if len(s.spec) and _explicit_axes(s.mesh)]
        batch_spec = PartitionSpec(*specs[0][:1]) if specs else PartitionSpec()
        scalars, arrays = map(
            iter,
            jax.sharding.auto_axes(
                with_auto_axes,
                axes=_explicit_axes(mesh),
                out_sharding=(
                    NamedSharding(mesh, PartitionSpec()),
                    NamedSharding(mesh, batch_spec),
                ),
            )(state, [x for x in leaves if _is_array(x)]),
        )
        treedef, are_scalars = out_structures[-1]
        return jax.tree.unflatten(
            treedef, [next(scalars if scalar else arrays) for scalar in are_scalars]
        )

    return run


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array)


def _explicit_axes(mesh: jax.sharding.AbstractMesh) -> tuple[str, ...]:
    """Return the names of the mesh axes whose type is Explicit."""
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, type_ in types if type_ == AxisType.Explicit)
