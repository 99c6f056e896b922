"""A layer ⇄ its config."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxwrap._errors import describe, naming
from jaxwrap._layer._adapter import Adapter
from jaxwrap._layer._engine import Engine
from jaxwrap._serialization import deserialize, one_config, serialize, serialize_callable

# The key of a config that holds the arguments of a constructor of the user's own.
_CONSTRUCTOR = "constructor"
_NOTED = "_constructor_arguments"
_VALUES = ("params", "state")


def get_config(layer: Any, keras_config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a layer.

    Raises:
        TypeError: If something cannot be saved.
    """
    with one_config("layer", describe(layer)):
        return _config(layer, keras_config)


def _config(layer: Any, keras_config: dict[str, Any]) -> dict[str, Any]:
    engine: Engine = layer._engine
    if (arguments := vars(layer).get(_NOTED)) is not None:
        return _own_constructor_config(layer, arguments)
    return {
        **keras_config,
        **_adapter_config(engine.adapter, layer.adapter_class),
        **engine.options.get_config(),
        "rules": engine.rules.get_config(),
        "update_state_in_inference": layer.update_state_in_inference,
        "supports_masking": layer.supports_masking,
        **(_values_config(engine) if engine.has_values else {}),
    }


def note_constructor(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Note the arguments of a constructor that a user's class has, unless the class says what to save."""
    cls = type(layer)
    is_ours = [m.__module__.startswith("jaxwrap.") for m in (cls.__init__, cls.get_config)]
    if is_ours == [False, True]:
        # Past Keras, which would track layers and variables among the arguments.
        object.__setattr__(layer, _NOTED, (args, kwargs))


def _adapter_config(adapter: Adapter, adapter_class: type[Adapter]) -> dict[str, Any]:
    """Return the fields of the adapter that the layer's constructor makes, or else the adapter as `call_fn`."""
    # Exactly this class: the constructor would make no other one again.
    if isinstance(adapter, adapter_class):
        return adapter.get_config()
    return {"call_fn": serialize(adapter, "adapter")}


def _values_config(engine: Engine) -> dict[str, Any]:
    """Describe `params` and `state` that the user passed. Their values are in the weights file."""
    weights = engine.built_weights()
    trees = (weights.params.placeholders(), weights.state.placeholders())
    return {
        name: serialize(tree, name)
        for name, tree in zip(_VALUES, trees, strict=True)
        if tree is not None
    }


def from_config(cls: Any, config: dict[str, Any], keras_from_config: Callable[..., Any]) -> Any:
    """Make a layer of a class from its config, by Keras's `from_config`."""
    with naming(f"{cls.__name__} {config.get('name')!r}"):
        arguments = _read_config(config, cls.adapter_class)
    layer = keras_from_config(arguments)
    # Shapes in a file may ask for more memory than there is, so `build` checks them first.
    layer._engine.is_from_file = True
    return layer


def _read_config(config: Mapping[str, Any], adapter_class: type[Adapter]) -> dict[str, Any]:
    """Return the arguments of a layer's constructor, from its config."""
    if _CONSTRUCTOR in config:
        return {name: deserialize(value, name) for name, value in config[_CONSTRUCTOR].items()}
    names = {field.name for field in dataclasses.fields(adapter_class)}  # type: ignore[arg-type]
    fields = {name: value for name, value in config.items() if name in names}
    read = {name: deserialize(config[name], name) for name in (*_VALUES, "rules") if name in config}
    return {**config, **adapter_class.fields_from_config(fields), **read}


def _own_constructor_config(layer: Any, arguments: tuple[Any, Any]) -> dict[str, Any]:
    """Save a layer whose class has a constructor of its own by the arguments of that constructor.

    Args:
        layer: The layer.
        arguments: The arguments of its constructor, by position and by keyword.
    """
    args, kwargs = arguments
    signature = inspect.signature(type(layer).__init__)
    bound = signature.bind(layer, *args, **kwargs).arguments
    bound.pop(next(iter(signature.parameters)))
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound |= bound.pop(parameter.name, {})
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY):
            raise TypeError(
                f"cannot be saved: the constructor of {type(layer).__name__} takes `{parameter}` by position only. "
                "Define `get_config` and `from_config`, or make an adapter (`jaxwrap.Adapter`)."
            )
    # Keras may have made the name up, and the paths of the variables begin with it.
    bound.setdefault("name", layer.name)
    return {_CONSTRUCTOR: {name: serialize_callable(value, name) for name, value in bound.items()}}
