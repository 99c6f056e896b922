"""Structures and names: properties over any pytree."""

import collections
import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from backends import to_numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxwrap import JaxLayer
from jaxwrap._pytree import ARRAY, describe_difference, is_leaf_array, partition
from jaxwrap._weights._names import unique_names

pytestmark = [pytest.mark.quick, pytest.mark.each_jax]

Point = collections.namedtuple("Point", ["x", "y"])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Node:
    left: Any
    right: Any


def arrays():
    shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
    dtypes = st.sampled_from(["float32", "float16", "int32", "uint8", "bool"])
    return st.builds(lambda shape, dtype: np.ones(shape, dtype), shapes, dtypes)


def static():
    return st.one_of(st.none(), st.text(max_size=3), st.sampled_from([np.tanh, object()]))


def nest(children):
    keys = st.one_of(st.text(max_size=4), st.sampled_from(["a/b", "a.b", "a_b", "~", "", "params"]))
    return st.one_of(
        st.lists(children, max_size=3),
        st.builds(Point, children, children),
        st.builds(Node, children, children),
        st.dictionaries(keys, children, max_size=4),
    )


def pytrees():
    return st.recursive(st.one_of(arrays(), static()), nest, max_leaves=8)


@given(pytrees())
def test_partition_and_unflatten_are_inverse(tree):
    values, structure = partition(tree, is_leaf_array)
    back = structure.unflatten(values)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert all(
        one is two for one, two in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True)
    )
    assert len(values) == sum(leaf is ARRAY for leaf in structure.leaves)
    assert len(structure.array_paths()) == len(values)
    again = partition(tree, is_leaf_array)[1]
    assert (again, hash(again)) == (structure, hash(structure))
    assert describe_difference(structure, again) is None


@pytest.mark.parametrize(("one", "two"), [(True, 1), (1, 1.0), ("a", "b"), (None, "a")])
def test_static_leaves_that_differ_make_different_structures(one, two):
    one, two = (partition({"leaf": leaf}, lambda _: False)[1] for leaf in (one, two))
    assert one != two
    assert "leaf" in describe_difference(one, two)


def test_an_unhashable_static_leaf_equals_itself_only():
    leaf = {1, 2}
    one, two, other = (partition([value], lambda _: False)[1] for value in (leaf, leaf, {1, 2}))
    assert one == two
    assert one != other


@given(
    st.lists(
        st.lists(st.text(max_size=3), min_size=1, max_size=3).map(tuple), unique=True, max_size=12
    )
)
def test_names_are_unique_clean_and_never_a_group(paths):
    names = unique_names(paths)
    assert len(set(names)) == len(paths)
    assert names == unique_names(paths)
    groups = {name[:end] for name in names for end in range(1, len(name))}
    assert not groups & set(names)
    for name in names:
        assert all(part and set(part) <= set("_-") | set(map(chr, range(48, 123))) for part in name)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pytrees())
def test_any_pytree_lives_in_a_layer(tree):
    """Variables of the same dtypes and values, unique paths, and the function gets the tree back."""
    seen = []

    def call(params, state, inputs):
        seen.append(params)
        return inputs, state

    tree = [tree]  # a tree that is None says that there are no params
    layer = JaxLayer(call, params=tree, state=tree)
    layer(np.ones(2, "float32"))
    assert jax.tree.structure(seen[0]) == jax.tree.structure(tree)
    paths = [v.path for v in layer.variables]
    assert len(set(paths)) == len(paths)

    def check(variable, leaf):
        if is_leaf_array(leaf):
            assert variable.dtype == leaf.dtype
            np.testing.assert_array_equal(to_numpy(variable.value), leaf)
        else:
            assert variable is leaf

    jax.tree.map(check, layer.params, tree)
    jax.tree.map(check, layer.state, tree)
