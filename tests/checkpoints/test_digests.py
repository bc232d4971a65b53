"""Tests of digests of arrays, and of the search for inf and NaN."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import random_array
from states import MESHES, state_on_mesh

from hivit_jax.checkpoints.digests import digests, nonfinite_names

pytestmark = pytest.mark.usefixtures("shard_small_arrays")


@pytest.mark.slow
def test_digests_do_not_depend_on_the_mesh():
    results = [digests({"state": state_on_mesh(name, seed=1)[0]}) for name in MESHES]
    assert all(result == results[0] for result in results)
    assert len(set(results[0]["state"].values())) > 10


DTYPES = ["float32", "bfloat16", "int32", "uint8", "bool"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8, 9), (8, 2**13 + 1)])
def test_digests_on_the_host_and_on_devices_agree(shape, dtype):
    x = np.arange(np.prod(shape)).reshape(shape) % 201
    x = np.asarray(jnp.asarray(x * (x % 3), dtype))
    sharding = jax.NamedSharding(jax.make_mesh((8,), ("rows",)), jax.P("rows"))
    arrays = (x, jax.device_put(x, sharding), x[:0])
    host, devices, empty = (digests({"": {"x": array}}) for array in arrays)
    assert host == devices != empty


@pytest.mark.parametrize("dtype", DTYPES)
def test_flipped_bit_changes_the_digest(dtype):
    """Each flipped bit gives a new digest, and so does the sign of 0.0."""
    x = np.asarray(jnp.asarray(random_array((5, 7), "bits") > 0, dtype))
    distinct, raw = {digests({"": {"x": x}})[""]["x"]}, x.tobytes()
    bits = range(8) if dtype != "bool" else [0]
    for byte, bit in itertools.product(range(0, len(raw), 3), bits):
        changed = bytearray(raw)
        changed[byte] ^= 1 << bit
        y = np.frombuffer(bytes(changed), x.dtype).reshape(x.shape)
        distinct.add(digests({"": {"x": y}})[""]["x"])
    assert len(distinct) == 1 + len(range(0, len(raw), 3)) * len(bits)
    if dtype == "float32":
        distinct.add(digests({"": {"x": np.float32(0)}})[""]["x"])
        assert digests({"": {"x": np.float32(-0.0)}})[""]["x"] not in distinct


def test_nonfinite_names_lists_arrays_with_inf_or_nan():
    """The arrays may have any float dtype, and be small or large."""
    large = np.ones((300, 300), np.float32)
    tree = {
        "good": {"x": np.ones(3), "n": np.int32(7), "b": jnp.ones(4, jnp.bfloat16)},
        "nan": np.array([1.0, np.nan], np.float32),
        "inf": jnp.array([-jnp.inf], jnp.bfloat16),
        "large": jnp.asarray(large),
        "large_bad": jnp.asarray(large).at[299, 299].set(jnp.inf),
        "empty": np.ones((0, 2)),
    }
    assert nonfinite_names(tree) == ["inf", "large_bad", "nan"]
