"""The adapter for each kind of object: `wrap`, and `register_adapter`."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import Any

import keras

from jaxwrap._layer import Adapter, CallResult, JaxLayer
from jaxwrap._serialization import register_serializable
from jaxwrap.adapters._equinox import EquinoxLayer
from jaxwrap.adapters._haiku import HaikuLayer
from jaxwrap.adapters._linen import FlaxLayer
from jaxwrap.adapters._nnx import NNXLayer
from jaxwrap.adapters._transformers import from_transformers, is_flax_model

Match = Callable[[Any], bool]


def _is_a(library: str, *names: str) -> Match:
    """Match objects of these classes of a library, without importing it."""

    def match(obj: Any) -> bool:
        # An object of a library exists only after its import, which takes seconds for some.
        module = sys.modules.get(library)
        return module is not None and isinstance(obj, tuple(getattr(module, n) for n in names))

    return match


def _is_function(obj: Any) -> bool:
    # Those of `jnp` are objects: jitted functions and ufuncs.
    is_jax = type(obj).__module__.partition(".")[0] in ("jax", "jaxlib")
    return inspect.isroutine(obj) or (is_jax and callable(obj))


def _is_pair(obj: Any) -> bool:
    return type(obj) is tuple and len(obj) == 2 and all(map(callable, obj))


def _from_pair(pair: tuple[Callable[..., Any], Callable[..., Any]], **kwargs: Any) -> JaxLayer:
    init_fn, call_fn = pair
    return JaxLayer(call_fn, init_fn, **kwargs)


def _is_stateful_equinox(obj: Any) -> bool:
    module = sys.modules.get("equinox")
    if module is None or type(obj) is not tuple or len(obj) != 2:
        return False
    return isinstance(obj[0], module.Module) and isinstance(obj[1], module.nn.State)


def _from_equinox(obj: Any, **kwargs: Any) -> EquinoxLayer:
    module, state = obj if type(obj) is tuple else (obj, kwargs.pop("state", None))
    # The classes of `eqx.nn` take one example.
    if type(module).__module__.startswith("equinox.nn"):
        kwargs.setdefault("batch", True)
    return EquinoxLayer(module, state, **kwargs)


def _has_init_and_apply(obj: Any) -> bool:
    methods = (getattr(obj, name, None) for name in ("init", "apply"))
    return not isinstance(obj, type) and all(map(callable, methods))


@register_serializable("jaxwrap")
@dataclasses.dataclass(frozen=True, eq=False)
class InitApply(Adapter):
    """The adapter of objects with `init(key, inputs)`, which makes params, and `apply(params, inputs)`."""

    model: Any

    def init(self, keys: Any, inputs: Any) -> tuple[Any, Any]:
        """Call `init`."""
        return self.model.init(keys, inputs), None

    def call(self, params: Any, state: Any, keys: Any, inputs: Any, training: bool) -> CallResult:
        """Call `apply`."""
        return CallResult(self.model.apply(params, inputs))


# A name for errors, the match, and what makes the layer. Later ones are asked first.
_ADAPTERS: list[tuple[str, Match, Callable[..., Any]]] = [
    ("an object with `init` and `apply`: JaxLayer", _has_init_and_apply, InitApply),
    ("a function: JaxLayer", _is_function, JaxLayer),
    ("a pair (init_fn, call_fn): JaxLayer", _is_pair, _from_pair),
    ("an Equinox module: EquinoxLayer", _is_a("equinox", "Module"), _from_equinox),
    ("an Equinox module and its state: EquinoxLayer", _is_stateful_equinox, _from_equinox),
    (
        "a Haiku transform: HaikuLayer",
        _is_a(
            "haiku",
            "Transformed",
            "TransformedWithState",
            "MultiTransformed",
            "MultiTransformedWithState",
        ),
        HaikuLayer,
    ),
    ("a Flax model of transformers: from_transformers", is_flax_model, from_transformers),
    ("a Flax NNX module: NNXLayer", _is_a("flax.nnx", "Module"), NNXLayer),
    ("a Flax Linen module: FlaxLayer", _is_a("flax.linen", "Module"), FlaxLayer),
]


def register_adapter(
    match: Match, adapter_class: type[Adapter] | Callable[..., keras.layers.Layer]
) -> None:
    """Teach `wrap` another kind of object.

    Args:
        match: Returns whether an object is of that kind. Adapters that are registered later are asked first.
        adapter_class: An `Adapter`, made of the object and those keyword arguments of `wrap` that are its fields. Or a
            function that takes the object and the keyword arguments of `wrap`, and returns a Keras layer.

    Raises:
        TypeError: If one of them cannot be called.

    Example:
        >>> import dataclasses, jaxwrap, numpy as np
        >>> from typing import Any
        >>> @dataclasses.dataclass(frozen=True)
        ... class Scale(jaxwrap.Adapter):
        ...     model: Any
        ...     power: int = 1
        ...
        ...     def init(self, keys, inputs):
        ...         return {"scale": float(self.model.scale)}, None
        ...
        ...     def call(self, params, state, keys, inputs, training):
        ...         return jaxwrap.CallResult(inputs * params["scale"] ** self.power)
        >>> class Scaling:
        ...     scale = 3
        >>> jaxwrap.register_adapter(lambda obj: type(obj).__name__ == "Scaling", Scale)
        >>> float(jaxwrap.wrap(Scaling(), power=2, name="scale")(np.ones(1, "float32"))[0])
        9.0
    """
    if not callable(match) or not callable(adapter_class):
        raise TypeError(
            "register_adapter: expected a function of an object and an adapter class; received "
            f"{match!r} and {adapter_class!r}."
        )
    name = getattr(adapter_class, "__name__", repr(adapter_class))
    _ADAPTERS.append((name, match, adapter_class))


def wrap(obj: Any, **kwargs: Any) -> keras.layers.Layer:
    """Make a Keras layer of a module or a function of any library that has an adapter.

    Args:
        obj: A Flax Linen or NNX module, a Haiku transform, an Equinox module, a pair `(init_fn, call_fn)`, a function,
            an object that an adapter is registered for, or a Keras layer, which comes back as it is.
        **kwargs: The other arguments of the layer's constructor, and the fields of a registered adapter.

    Raises:
        TypeError: For an object that no adapter matches, or a Keras layer with keyword arguments.

    Example:
        >>> import flax.linen as nn, jaxwrap
        >>> type(jaxwrap.wrap(nn.Dense(3), name="dense")).__name__
        'FlaxLayer'
    """
    if isinstance(obj, keras.layers.Layer):
        if kwargs:
            raise TypeError(
                f"wrap: {obj.name!r} is a Keras layer already, and takes no {', '.join(kwargs)} any more."
            )
        return obj
    for _, match, make in reversed(_ADAPTERS):
        if match(obj):
            if isinstance(make, type) and issubclass(make, Adapter):
                return _from_adapter(make, obj, kwargs)
            return make(obj, **kwargs)
    known = "\n".join(f"  {name}" for name, _, _ in reversed(_ADAPTERS))
    raise TypeError(
        f"wrap: there is no adapter for {obj!r}, a {type(obj).__name__}. There are:\n{known}\nTo add one, write an "
        "`jaxwrap.Adapter`:\n"
        "  @dataclasses.dataclass(frozen=True)\n"
        "  class MyAdapter(jaxwrap.Adapter):\n"
        "      model: Any\n"
        "      def init(self, keys, inputs):\n"
        "          return self.model.init(keys, inputs), None\n"
        "      def call(self, params, state, keys, inputs, training):\n"
        "          return jaxwrap.CallResult(self.model.apply(params, inputs))\n"
        "  jaxwrap.register_adapter(lambda obj: isinstance(obj, MyModule), MyAdapter)"
    )


def _from_adapter(adapter_class: type[Adapter], obj: Any, kwargs: dict[str, Any]) -> JaxLayer:
    _, *names = (field.name for field in dataclasses.fields(adapter_class))  # type: ignore[arg-type]
    fields = {name: kwargs.pop(name) for name in names if name in kwargs}
    make: Any = adapter_class  # the fields are those of a dataclass
    return JaxLayer(make(obj, **fields), **kwargs)
