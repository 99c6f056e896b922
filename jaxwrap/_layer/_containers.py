"""Containers that JAX knows: made known to Keras, and put back where Keras has made lists of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import keras

from jaxwrap._bridge import get_bridge
from jaxwrap._specs import Spec
from jaxwrap._typing import PyTree


def register_containers(tree: PyTree) -> None:
    """Register with Keras each class of nodes that JAX knows and Keras does not.

    Keras takes an unknown node for a leaf, and then refuses it as no tensor or loses the tensors in it.
    """
    for node in _nodes(tree):
        if not keras.tree.is_nested(node):
            get_bridge().register_node(type(node), _flatten, _unflatten)


def one_level(node: Any) -> tuple[list[Any], Any]:
    """Return the children of a node, and the treedef that takes them back."""
    return jax.tree_util.tree_flatten(node, is_leaf=lambda part: part is not node)


def _nodes(tree: PyTree) -> Iterator[Any]:
    children, _ = one_level(tree)
    if len(children) == 1 and children[0] is tree:
        return
    if tree is not None:
        yield tree
    for child in children:
        yield from _nodes(child)


def _flatten(node: Any) -> tuple[list[Any], Any]:
    # Keras takes None for a leaf, which no symbolic tensor can stand for. So the metadata keeps it.
    children, treedef = one_level(node)
    places = tuple(place for place, child in enumerate(children) if child is not None)
    return [children[place] for place in places], (treedef, places, len(children))


def _unflatten(metadata: Any, children: Any) -> Any:
    treedef, places, count = metadata
    parts: list[Any] = [None] * count
    for place, child in zip(places, children, strict=True):
        parts[place] = child
    return treedef.unflatten(parts)


def restored(tree: PyTree, like: PyTree) -> PyTree:
    """Return a tree with the containers of `like`, where Keras has made lists of them.

    Args:
        tree: What the layer is called with.
        like: The specs that the layer was built for.
    """
    if isinstance(like, Spec) or (type(tree) is type(like) is dict and tree.keys() != like.keys()):
        return tree
    expected, treedef = one_level(like)
    if len(expected) == 1 and expected[0] is like:
        return tree
    children, _ = one_level(tree)
    if len(children) != len(expected) or not _may_stand_for(tree, like):
        return tree
    return treedef.unflatten([restored(*pair) for pair in zip(children, expected, strict=True)])


def _may_stand_for(tree: Any, like: Any) -> bool:
    if type(tree) is type(like) or isinstance(tree, list):
        return True
    # A tuple that was passed where a list was built for stays a tuple.
    return type(tree) in (tuple, dict) and type(like) not in (list, tuple, dict)
