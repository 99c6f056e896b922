"""What the caller of a layer feeds: the arguments, and what is known of them before there are any."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax

from jaxwrap._specs import Spec, placeholder, read_spec, specs_from_shapes
from jaxwrap._typing import PyTree

_Parameter = inspect.Parameter
_STATIC = (bool, int, float, str, type(None))


class Arguments:
    """The arguments that a layer is called with, `training` aside.

    Attributes:
        names: Their names, in order.
        signature: The signature that the layer's `call` shows to Keras; `training` is its last argument.
    """

    def __init__(self, parameters: Iterable[inspect.Parameter], owner: str):
        """Takes parameters of the function that is called.

        Raises:
            ValueError: If there are none, or one without a default comes after one with a default.
        """
        kept = [
            # Keras binds by name.
            parameter.replace(kind=_Parameter.POSITIONAL_OR_KEYWORD)
            if parameter.kind is _Parameter.POSITIONAL_ONLY
            else parameter
            for parameter in parameters
        ]
        if not kept:
            raise ValueError(f"{owner}: a Keras layer has at least one argument; received none.")
        kept.sort(key=lambda parameter: parameter.kind is _Parameter.KEYWORD_ONLY)
        training = _Parameter("training", kept[-1].kind, default=False)
        try:
            self.signature = inspect.Signature([*kept, training])
        except ValueError as error:
            raise ValueError(
                f"{owner}: in `call_arguments`, those without a default must come first; received "
                f"{', '.join(map(str, kept))}."
            ) from error
        self.names = tuple(parameter.name for parameter in kept)
        parameters = self.signature.parameters.values()
        self._known = {parameter.name for parameter in parameters}
        self._required = {p.name for p in parameters if p.default is p.empty}
        self._by_position = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, PyTree], bool]:
        """The arguments that were given, by name, and the train flag.

        `inputs` may be used for the first argument, whatever its name.

        Raises:
            TypeError: If one is missing or unknown.
        """
        kwargs = self.rename(args, kwargs)
        given = dict(zip(self._by_position, args, strict=False))
        given.update(kwargs)
        # The signature says what is wrong, but takes its time.
        whole = len(given) == len(args) + len(kwargs) and self._required <= given.keys()
        if not whole or not self._known >= given.keys():
            given = dict(self.signature.bind(*args, **kwargs).arguments)
        training = given.pop("training", False)
        return given, bool(training)

    def rename(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments with the first one's own name in the place of `inputs`."""
        if args or "inputs" not in kwargs or "inputs" in self.names:
            return kwargs
        return {
            self.names[0] if name == "inputs" else name: value for name, value in kwargs.items()
        }

    def specs(
        self, given: dict[str, PyTree], read: Callable[[Any], tuple[Any, str]], owner: str
    ) -> dict[str, PyTree]:
        """The arguments with a `Spec` for each tensor. Other values stay, but the first argument has none.

        Raises:
            TypeError: For a leaf of the first argument that is no tensor, or a dtype that JAX does not have.
            ValueError: For a tensor of unknown rank.
        """
        return {
            name: jax.tree_util.tree_map_with_path(
                lambda path, leaf, name=name: read_spec(
                    leaf,
                    path,
                    read,
                    f"{owner}: {'input' if name == self.names[0] else f'argument `{name}`'}",
                    static=name != self.names[0],
                ),
                tree,
            )
            for name, tree in given.items()
        }

    def from_shapes(self, shapes: PyTree, dtypes: PyTree, owner: str) -> dict[str, PyTree]:
        """Specs of the first argument alone, from a nest of shapes: see `specs_from_shapes`."""
        return {self.names[0]: specs_from_shapes(shapes, dtypes, owner)}

    def to_config(self, specs: dict[str, PyTree]) -> dict[str, Any] | None:
        """What a file can hold of specs; None if it can hold them not."""
        if not all(map(_is_plain, specs.values())):
            return None
        first, *others = self.names
        config = _describe(specs.get(first))
        more = {name: _describe(specs[name]) for name in others if name in specs}
        return {**config, "arguments": more} if more else config

    def from_config(self, config: dict[str, Any], dtype: str, owner: str) -> dict[str, PyTree]:
        """The inverse of `to_config`. A config that holds no dtype means `dtype`."""
        first = {self.names[0]: config}
        return {
            name: part["value"]
            if "value" in part
            else specs_from_shapes(part["input_shape"], part.get("input_dtype", dtype), owner)
            for name, part in {**first, **config.get("arguments", {})}.items()
        }


def placeholders(specs: PyTree) -> PyTree:
    """Arguments for `init_fn`: arrays for specs, other leaves as they are."""
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
    """Whether a nest is of dicts, lists and tuples of specs only, or a plain value by itself."""
    return isinstance(tree, _STATIC) or _is_nest(tree)


def _is_nest(tree: PyTree) -> bool:
    if type(tree) is dict:
        return all(isinstance(key, str) and _is_nest(value) for key, value in tree.items())
    return isinstance(tree, Spec) or (type(tree) in (list, tuple) and all(map(_is_nest, tree)))
