"""The weights of a layer or a model by path, and the other names that files have for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import keras

from jaxwrap._errors import describe, naming
from jaxwrap._layer import JaxLayer
from jaxwrap._pytree import path_str
from jaxwrap._typing import PyTree
from jaxwrap._weights._leaf import LeafPath
from jaxwrap._weights._targets import Target, of_variable

# The names of a file that holds trained parts alone begin so.
TRAINABLE = "trainable/"


class Owner(NamedTuple):
    """What a checkpoint is of.

    Attributes:
        targets: The weights by their paths.
        spellings: The path for each other name: as the library itself spells it, and without `params/`.
        tree: The pytree that a file without names holds, with a `LeafPath` for each weight.
    """

    targets: dict[str, Target]
    spellings: dict[str, str]
    tree: PyTree

    def held(self) -> set[str]:
        """The paths of the weights that must be compared with each other before any is assigned."""
        ties = {path: target.tie[0] for path, target in self.targets.items() if target.tie}
        return ties.keys() | set(ties.values())


def owner_of(layer: Any, trainable_only: bool = False) -> Owner:
    """List the weights of a layer of jaxwrap, or of all layers of a Keras model.

    Args:
        layer: The layer or the model.
        trainable_only: List the trained variables alone, parts of leaves as they are.

    Raises:
        TypeError: If it is neither.
        ValueError: If a layer has not been built, or two weights of a model have one path.
    """
    if isinstance(layer, JaxLayer):
        return _trained(layer) if trainable_only else _of_layer(layer)
    if isinstance(layer, keras.Layer):
        if trainable_only:
            return _trained(layer)
        return _of_model(layer)
    raise TypeError(f"expected a layer of jaxwrap or a Keras model; received {layer!r}.")


def _of_layer(layer: JaxLayer) -> Owner:
    with naming(describe(layer)):
        targets = layer._engine.built_weights().targets()
        tree = layer._engine.checkpoint_tree()
        boxed = {leaf.path for leaf in layer._engine.built_weights().leaves if leaf.axes}
    spellings: dict[str, list[str]] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, LeafPath):
            names = {leaf.path, path_str(keys)}
            if leaf.path in boxed:
                # Flax writes its boxes too.
                names |= {f"{name}/value" for name in names}
            for name in names:
                spellings.setdefault(name, []).append(leaf.path)
                # Files of the parameters alone do not say that they are.
                if leaf.path.startswith("params/"):
                    spellings.setdefault(name.removeprefix("params/"), []).append(leaf.path)
    return Owner(
        targets,
        {name: paths[0] for name, paths in spellings.items() if len(set(paths)) == 1},
        tree,
    )


def _of_model(model: keras.Layer) -> Owner:
    targets: dict[str, Target] = {}
    spellings: dict[str, str] = {}

    def add(path: str, target: Target) -> None:
        if targets.setdefault(path, target) is not target:
            raise ValueError(
                f"two weights of the model have the path {path!r}. Give their layers different names."
            )

    for layer in _own(model):
        weights, names, _ = _of_layer(layer)
        for path, target in weights.items():
            if target.tie:
                other, compare = target.tie
                target = target._replace(tie=(f"{layer.name}/{other}", _below(layer.name, compare)))
            add(f"{layer.name}/{path}", target)
        spellings |= {f"{layer.name}/{name}": f"{layer.name}/{to}" for name, to in names.items()}
        if len(_own(model)) == 1:
            # A file of this layer does not hold its name.
            spellings |= {name: f"{layer.name}/{to}" for name, to in names.items()}
    known = {id(variable) for target in targets.values() for variable in target.variables}
    for variable in model.weights:
        if id(variable) not in known:
            # Keras puts the name of the model in front if the model builds its layers, as `Sequential` does.
            add(_short(model, variable), of_variable(variable))
    return Owner(targets, spellings, {path: LeafPath(path) for path in targets})


def _own(model: keras.Layer) -> list[JaxLayer]:
    return [layer for layer in model._flatten_layers() if isinstance(layer, JaxLayer)]


def _short(model: keras.Layer, variable: keras.Variable) -> str:
    return variable.path.removeprefix(f"{model.name}/")


def variables_by_path(owner: keras.Layer) -> dict[str, keras.Variable]:
    """Return the weights of a layer of jaxwrap or of a model by their names in files, and the parts of leaves."""
    layers = (
        [(owner, "")] if isinstance(owner, JaxLayer) else [(o, f"{o.name}/") for o in _own(owner)]
    )
    paths: dict[str, keras.Variable] = {}
    for layer, prefix in layers:
        with naming(describe(layer)):
            for path, variable in layer._engine.built_weights().by_path().items():
                paths[prefix + path] = variable
    known = set(map(id, paths.values()))
    others = [variable for variable in owner.weights if id(variable) not in known]
    return paths | {_short(owner, variable): variable for variable in others}


def _trained(owner: keras.Layer) -> Owner:
    trained = set(map(id, owner.trainable_variables))
    targets = {
        TRAINABLE + path: of_variable(variable)
        for path, variable in variables_by_path(owner).items()
        if id(variable) in trained
    }
    return Owner(targets, {}, {path: LeafPath(path) for path in targets})


def _below(
    name: str, compare: Callable[[Mapping[str, Any]], list[str]]
) -> Callable[[Mapping[str, Any]], list[str]]:
    """Return what compares values of a layer, for values whose paths begin with its name."""
    return lambda values: compare({p.removeprefix(f"{name}/"): v for p, v in values.items()})
