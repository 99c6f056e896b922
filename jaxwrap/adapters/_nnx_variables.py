"""The variables of NNX modules: by the names of their types, taken out of modules, and split as a layer has them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from jaxwrap._typing import PyTree


def collection_name(name: Any) -> str:
    """Return the name of a collection, from the type of its variables or from itself."""
    from flax import nnx

    return name if isinstance(name, str) else nnx.variable_name_from_type(name, allow_register=True)


def take_apart(
    module: Any, trained: Any, sown: Collection[str]
) -> tuple[dict[str, PyTree], Any, Any, Any]:
    """Take the variables of the sown collections out of a module, and split the rest.

    Returns:
        The sown values by collection, the graph definition, the parameters, and the state.
    """
    from flax import nnx

    values = _pop(module, sown)
    graphdef, params, state = nnx.split(module, trained, ...)
    return values, graphdef, params, state


def _pop(module: Any, names: Collection[str]) -> dict[str, PyTree]:
    from flax import nnx
    from flax.traverse_util import unflatten_dict

    popped = nnx.pop(module, lambda _, variable: collection_name(type(variable)) in names)
    flat: dict[str, dict[tuple[Any, ...], Any]] = {}
    for path, variable in nnx.to_flat_state(popped):
        flat.setdefault(collection_name(type(variable)), {})[path] = variable.get_value()
    return {name: unflatten_dict(values) for name, values in flat.items()}


def as_params_and_state(variables: Any, params: Any, dropped: Collection[str]) -> Any:
    """Return the variables of a module, as `nnx.state` and `nnx.split` do, in the form of `get_variables`.

    Args:
        variables: An `nnx.State`, or a dict with one under `params` and under `state`. Anything else is returned.
        params: The `nnx.State` of the parameters of the layer, whose paths are those of parameters.
        dropped: The collections that are not among the weights.
    """
    from flax import nnx
    from flax.traverse_util import unflatten_dict

    if isinstance(variables, dict):
        return {
            name: nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
            for name, tree in variables.items()
        }
    if not isinstance(variables, nnx.State):
        return variables
    paths = {path for path, _ in nnx.to_flat_state(params)}
    parts: dict[str, dict[tuple[Any, ...], Any]] = {"params": {}, "state": {}}
    for path, leaf in nnx.to_flat_state(variables):
        if isinstance(leaf, nnx.Variable):
            if collection_name(type(leaf)) in dropped:
                continue
            leaf = leaf.get_value()
        parts["params" if path in paths else "state"][path] = leaf
    return {name: unflatten_dict(part) for name, part in parts.items()}
