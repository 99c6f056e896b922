"""The roles of a module's collections of variables: parameters, state, losses, metrics, outputs."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from jaxwrap._layer import CallResult
from jaxwrap._pytree import key_name
from jaxwrap._typing import Array, PyTree

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
        metrics = _flat_metrics(self.select(sown, METRIC))
        # A list, as only the losses of a dict are reported by name.
        return CallResult(outputs, state, list(self.select(sown, LOSS).values()), metrics)


def _flat_metrics(collections: Mapping[str, PyTree]) -> dict[str, Array]:
    """Return metrics by their paths. A value that was sown once is not a tuple."""
    metrics = {}
    for collection in collections.values():
        leaves = jax.tree_util.tree_leaves_with_path(
            collection, is_leaf=lambda node: isinstance(node, tuple) and len(node) == 1
        )
        for path, leaf in leaves:
            metrics["/".join(map(key_name, path))] = leaf[0] if isinstance(leaf, tuple) else leaf
    return metrics
