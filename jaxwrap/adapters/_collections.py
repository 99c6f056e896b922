"""The roles of a module's collections of variables: parameters, state, losses, metrics, outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import jax

from jaxwrap._layer import CallResult
from jaxwrap._pytree import key_name
from jaxwrap._typing import PyTree

TRAINABLE, STATE, LOSS, METRIC, OUTPUT, DROP = ROLES = (
    "trainable",
    "state",
    "loss",
    "metric",
    "output",
    "drop",
)


class Collections:
    """The role of each collection, by name.

    Args:
        given: The roles that the user sets.
        defaults: The roles of collections that the user does not name.

    Attributes:
        given: The roles that the user sets.

    Raises:
        ValueError: For a role that does not exist.
    """

    def __init__(self, given: Mapping[str, str] | None, defaults: Mapping[str, str]):
        if not isinstance(given, (Mapping, type(None))):
            raise ValueError(f"`collections` must be a dict or None; received {given!r}.")
        for name, role in (given or {}).items():
            if role not in ROLES:
                raise ValueError(
                    f"`collections` maps {name!r} to {role!r}; expected one of {', '.join(map(repr, ROLES))}."
                )
        self.given = dict(given or {})
        self._roles = {**defaults, **self.given}

    def named(self, *roles: str) -> list[str]:
        """Return the names that have one of these roles."""
        return [name for name, role in self._roles.items() if role in roles]

    def select(self, collections: Mapping[str, PyTree], role: str) -> dict[str, PyTree]:
        """Return the collections of one role. Without a role, a collection is state."""
        return {
            name: tree for name, tree in collections.items() if self._roles.get(name, STATE) == role
        }

    def result(self, outputs: PyTree, state: PyTree, sown: Mapping[str, PyTree]) -> CallResult:
        """Return the result of a call of a module that has sown these collections."""
        if self.named(OUTPUT):
            outputs = (outputs, self.select(sown, OUTPUT))
        metrics = {
            name: leaf[0] if _is_sown(leaf) else leaf
            for name, leaf in _named(self.select(sown, METRIC), _is_sown_once).items()
        }
        # All values that were sown under one name are one loss.
        losses = _named(self.select(sown, LOSS), _is_sown, taken=metrics)
        return CallResult(outputs, state, losses, metrics)


def _is_sown(node: PyTree) -> bool:
    return isinstance(node, tuple)


def _is_sown_once(node: PyTree) -> bool:
    return _is_sown(node) and len(node) == 1


def _named(
    collections: Mapping[str, PyTree],
    is_leaf: Callable[[PyTree], bool],
    taken: Collection[str] = (),
) -> dict[str, PyTree]:
    """Return what was sown by its path, with the name of its collection before it if the path is taken."""
    named: dict[str, PyTree] = {}
    for collection, tree in collections.items():
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
            path = "/".join(map(key_name, keys))
            named[f"{collection}/{path}" if path in named or path in taken else path] = leaf
    return named
