"""Tests of `match_names` for checkpoints of different optax chains.

A transformation without state, such as clipping, shifts the position of the following
transformations in a chain. Positions are part of the saved names.
"""

import jax.numpy as jnp
import optax
import pytest

from hivit_jax.checkpoints.names import match_names
from hivit_jax.tree import named_leaves

PARAMS = {"stages": {"0": {"1": {"kernel": jnp.ones(2)}}, "2": {"bias": jnp.ones(1)}}}
VARIABLES = named_leaves(PARAMS)


def array_names(*transformations):
    """Return the array names in a checkpoint of a chain of transformations."""
    state = optax.chain(*transformations).init(PARAMS)
    return [*named_leaves({"opt_state": state, "step": 0})]


clip, adam = optax.clip_by_global_norm(1.0), optax.scale_by_adam()
scale, schedule = optax.scale(0.5), optax.scale_by_schedule(lambda step: 0.1)


@pytest.mark.parametrize(
    ("saved_chain", "expected_chain"),
    [
        ((clip, adam, scale, schedule), (adam, scale, schedule)),
        ((adam, schedule), (clip, scale, adam, scale, scale, schedule)),
        ((optax.trace(0.9), schedule), (clip, optax.trace(0.9), schedule)),
        (
            (optax.chain(clip, adam), schedule),
            (optax.chain(adam), scale, scale, schedule),
        ),
    ],
)
def test_names_match_if_only_stateless_transformations_differ(
    saved_chain, expected_chain
):
    """Chains may be nested. Numbers in the names of parameters stay the same."""
    saved, expected = array_names(*saved_chain), array_names(*expected_chain)
    assert match_names(saved, expected, VARIABLES) == dict(
        zip(saved, expected, strict=True)
    )


def test_names_match_inside_multi_transform():
    def labeled_names(*transformations):
        transforms = {"a": optax.chain(*transformations), "b": optax.set_to_zero()}
        state = optax.multi_transform(transforms, {"stages": "a"}).init(PARAMS)
        return [*named_leaves({"opt_state": state})]

    saved, expected = labeled_names(clip, adam, schedule), labeled_names(adam, schedule)
    assert saved != expected
    assert [*match_names(saved, expected, VARIABLES).values()] == expected


@pytest.mark.parametrize("other", [(optax.trace(0.9), schedule), (adam,), (schedule,)])
def test_not_all_names_match_if_stateful_transformations_differ(other):
    saved, expected = array_names(adam, schedule), array_names(*other)
    matches = match_names(saved, expected, VARIABLES)
    assert set(matches.values()) != set(expected)


def test_numbers_in_parameter_names_are_not_renumbered():
    """Only numbers in the names of optimizer arrays are positions."""
    saved = ["stages/3/kernel", "stages/7/kernel", "step"]
    expected = ["stages/0/kernel", "stages/1/kernel", "step"]
    assert match_names(saved, expected, expected) == {name: name for name in saved}
