"""The weights of a layer or a model by path, and the other names that files have for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import keras

from jaxwrap._errors import describe, naming
from jaxwrap._layer import JaxLayer
from jaxwrap._pytree import path_str
from jaxwrap._typing import PyTree
from jaxwrap._weights._leaf import LeafPath


class Owner(NamedTuple):
    """What a checkpoint is of.

    Attributes:
        variables: The weights by their paths.
        spellings: The path for each other name: as the library itself spells it, and without `params/`.
        tree: The pytree that a file without names holds, with a `LeafPath` for each weight.
    """

    variables: dict[str, keras.Variable]
    spellings: dict[str, str]
    tree: PyTree


def owner_of(layer: Any) -> Owner:
    """List the weights of a layer of jaxwrap, or of all layers of a Keras model.

    Raises:
        TypeError: If it is neither.
        ValueError: If a layer has not been built, or two weights of a model have one path.
    """
    if isinstance(layer, JaxLayer):
        return _of_layer(layer)
    if isinstance(layer, keras.Layer):
        return _of_model(layer)
    raise TypeError(f"expected a layer of jaxwrap or a Keras model; received {layer!r}.")


def _of_layer(layer: JaxLayer) -> Owner:
    with naming(describe(layer)):
        variables = layer._engine.built_weights().by_path()
        tree = layer._engine.checkpoint_tree()
    spellings: dict[str, list[str]] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, LeafPath):
            for name in {leaf.path, path_str(keys)}:
                spellings.setdefault(name, []).append(leaf.path)
                # Files of the parameters alone do not say that they are.
                if leaf.path.startswith("params/"):
                    spellings.setdefault(name.removeprefix("params/"), []).append(leaf.path)
    return Owner(
        variables,
        {name: paths[0] for name, paths in spellings.items() if len(set(paths)) == 1},
        tree,
    )


def _of_model(model: keras.Layer) -> Owner:
    variables: dict[str, keras.Variable] = {}
    spellings: dict[str, str] = {}

    def add(path: str, variable: keras.Variable) -> None:
        if variables.setdefault(path, variable) is not variable:
            raise ValueError(
                f"two weights of the model have the path {path!r}. Give their layers different names."
            )

    own = [layer for layer in model._flatten_layers() if isinstance(layer, JaxLayer)]
    for layer in own:
        weights, names, _ = _of_layer(layer)
        for path, variable in weights.items():
            add(f"{layer.name}/{path}", variable)
        spellings |= {f"{layer.name}/{name}": f"{layer.name}/{to}" for name, to in names.items()}
        if len(own) == 1:
            # A file of this layer does not hold its name.
            spellings |= {name: f"{layer.name}/{to}" for name, to in names.items()}
    known = set(map(id, variables.values()))
    for variable in model.weights:
        if id(variable) not in known:
            # Keras puts the name of the model in front if the model builds its layers, as `Sequential` does.
            add(variable.path.removeprefix(f"{model.name}/"), variable)
    return Owner(variables, spellings, {path: LeafPath(path) for path in variables})
