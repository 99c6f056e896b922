"""The arguments of a layer: bound by name, described without data, and as JSON."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxwrap._serialization import deserialize, register_serializable, serialize
from jaxwrap._specs import Spec, placeholder, read_spec, specs_from_shapes
from jaxwrap._typing import PyTree

_Parameter = inspect.Parameter
_STATIC = (bool, int, float, str, type(None))
# The key of a config whose arguments stand in containers that JSON does not have.
_CONTAINERS = "containers"
_ONE = inspect.Signature([_Parameter("inputs", _Parameter.POSITIONAL_OR_KEYWORD)])


register_serializable("jaxwrap")(Spec)


class Inputs:
    """The arguments that a layer is called with, besides `training`.

    Args:
        signature: The arguments, or None for one, `inputs`.
        model: The name of the model in errors.

    Attributes:
        names: Their names, in order.
        signature: The signature of the layer's `call`, for Keras. `training` is its last argument.

    Raises:
        ValueError: If there are no arguments.
    """

    def __init__(self, signature: inspect.Signature | None, model: str = "the model"):
        parameters = [
            # Keras binds by name.
            parameter.replace(kind=_Parameter.POSITIONAL_OR_KEYWORD)
            if parameter.kind is _Parameter.POSITIONAL_ONLY
            else parameter
            for parameter in (signature or _ONE).parameters.values()
        ]
        if not parameters:
            raise ValueError("a Keras layer has at least one argument; received none.")
        # Of the kind of the argument before it, as in a signature the kinds come in order.
        training = _Parameter("training", parameters[-1].kind, default=None)
        self.names = tuple(parameter.name for parameter in parameters)
        self.signature = inspect.Signature([*parameters, training])
        self._is_dict = signature is not None
        # Without annotations, which are long and say little.
        bare = [p.replace(annotation=p.empty) for p in self.signature.parameters.values()]
        self._takes = f"the layer of {model} takes {inspect.Signature(bare)}"
        parameters = self.signature.parameters.values()
        self._known = {parameter.name for parameter in parameters}
        self._required = {p.name for p in parameters if p.default is p.empty}
        self._by_position = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]

    def for_adapter(self, arguments: dict[str, PyTree]) -> PyTree:
        """Return what an adapter gets as `inputs`."""
        return arguments if self._is_dict else arguments["inputs"]

    def bind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[str, PyTree], bool | None]:
        """Return the arguments by name, and the train flag, None if the caller does not set it.

        Raises:
            TypeError: If an argument is missing or unknown, or the train flag is not a bool.
        """
        kwargs = self.rename(args, kwargs)
        arguments = dict(zip(self._by_position, args, strict=False))
        arguments.update(kwargs)
        # The signature says what is wrong, but takes its time.
        whole = len(arguments) == len(args) + len(kwargs) and self._required <= arguments.keys()
        if not whole or not self._known >= arguments.keys():
            try:
                arguments = dict(self.signature.bind(*args, **kwargs).arguments)
            except TypeError as error:
                raise TypeError(f"{error}{self._near(kwargs)}; {self._takes}.") from None
        training = arguments.pop("training", None)
        if not isinstance(training, (bool, np.bool_, int, type(None))):
            shape = getattr(training, "shape", None)
            shown = "" if shape is None else f" of shape {tuple(shape)}"
            raise TypeError(
                f"`training` must be a bool; received a {type(training).__name__}{shown}; {self._takes}: "
                f"{', '.join(self.names)} by position, then the train flag."
            )
        return arguments, None if training is None else bool(training)

    def _near(self, kwargs: dict[str, Any]) -> str:
        """Return the names that misspelled ones are near."""
        unknown = [name for name in kwargs if name not in self._known]
        near = [
            found
            for name in unknown
            for found in difflib.get_close_matches(name, self._known - kwargs.keys(), n=1)
        ]
        return f" (did you mean {', '.join(map(repr, near))}?)" if near else ""

    def rename(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Let `inputs=` stand for the first argument, whatever its name."""
        if args or "inputs" not in kwargs or "inputs" in self.names:
            return kwargs
        return {
            self.names[0] if name == "inputs" else name: value for name, value in kwargs.items()
        }

    def specs(
        self, arguments: dict[str, PyTree], read: Callable[[Any], tuple[Any, str]]
    ) -> dict[str, PyTree]:
        """Describe the arguments by a `Spec` for each tensor. Other values stay, except in the first argument.

        Raises:
            TypeError: For a leaf of the first argument that is not a tensor, or a dtype that JAX does not have.
            ValueError: For a tensor of unknown rank.
        """
        return {
            name: jax.tree_util.tree_map_with_path(
                lambda path, leaf, name=name: read_spec(
                    leaf,
                    path,
                    read,
                    "input" if name == self.names[0] else f"argument `{name}`",
                    static=name != self.names[0],
                ),
                tree,
            )
            for name, tree in arguments.items()
        }

    def from_shapes(self, shapes: PyTree, dtypes: PyTree) -> dict[str, PyTree]:
        """Describe the first argument alone, from a nest of shapes: see `specs_from_shapes`."""
        return {self.names[0]: specs_from_shapes(shapes, dtypes)}

    def to_config(self, specs: dict[str, PyTree]) -> dict[str, Any]:
        """Return specs as JSON.

        Raises:
            TypeError: For a container whose class is not registered. The error names it.
        """
        if not all(map(_is_plain, specs.values())):
            # The first one on top, under Keras's own key, which Keras reads too.
            return {_CONTAINERS: {name: serialize(tree, name) for name, tree in specs.items()}}
        first, *others = self.names
        config = _describe(specs.get(first))
        more = {name: _describe(specs[name]) for name in others if name in specs}
        return {**config, "arguments": more} if more else config

    def from_config(self, config: dict[str, Any], dtype: str) -> dict[str, PyTree]:
        """Read the result of `to_config`. A config without a dtype means `dtype`."""
        if _CONTAINERS in config:
            return {name: deserialize(tree, name) for name, tree in config[_CONTAINERS].items()}
        first = {self.names[0]: config}
        return {
            name: part["value"]
            if "value" in part
            else specs_from_shapes(part["input_shape"], part.get("input_dtype", dtype))
            for name, part in {**first, **config.get("arguments", {})}.items()
        }


def placeholders(specs: PyTree) -> PyTree:
    """Return arguments for `init`: an array for each spec, other leaves as they are."""
    return jax.tree_util.tree_map(
        lambda leaf: placeholder(leaf) if isinstance(leaf, Spec) else leaf, specs
    )


def _describe(tree: PyTree) -> dict[str, Any]:
    if isinstance(tree, _STATIC):
        return {"value": tree}
    return {
        "input_shape": jax.tree_util.tree_map(lambda spec: spec.shape, tree),
        "input_dtype": jax.tree_util.tree_map(lambda spec: spec.dtype, tree),
    }


def _is_plain(tree: PyTree) -> bool:
    """Whether a tree is a plain value, or nests specs in dicts and lists only. JSON makes lists of tuples."""
    return isinstance(tree, _STATIC) or _is_nest(tree)


def _is_nest(tree: PyTree) -> bool:
    if type(tree) is dict:
        return all(isinstance(key, str) and _is_nest(value) for key, value in tree.items())
    return isinstance(tree, Spec) or (type(tree) is list and all(map(_is_nest, tree)))
