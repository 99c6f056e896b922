"""Flax NNX modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import keras

from jaxwrap._pure import CallResult
from jaxwrap._serialization import serialize
from jaxwrap._signature import AUTO
from jaxwrap._typing import PyTree
from jaxwrap.adapters._module import (
    DROP,
    LOSS,
    METRIC,
    OUTPUT,
    Collections,
    ModuleLayer,
    bind_method,
    check_method,
    method_parameters,
    require,
)

_DEFAULT_ROLES = {"losses": LOSS, "metrics": METRIC, "intermediates": DROP}


@keras.saving.register_keras_serializable(package="jaxwrap")
class NNXLayer(ModuleLayer):
    """A Keras layer that computes a Flax NNX module, on every Keras backend.

    The values of the module's variables become the weights; the instance itself never changes. `nnx.Param` is trained;
    all other variables, such as `BatchStat`, `Cache` and the keys and counters of `nnx.Rngs`, are state. Shared modules
    and variables stay shared. A call in training is one after `module.train()`, others are after `module.eval()`. The
    layer takes the arguments that the method takes, tensors by position or by keyword, other values by keyword.

    Args:
        module: An `nnx.Module`. For one that is made with the layer's seed when the layer is made, see `from_factory`.
        method: What to call: None for `__call__`, a method of `module`, its name, or a function that takes the module
            as its first argument.
        trainable: An `nnx` filter for the variables that are trained, `nnx.LoRAParam` say; by default `nnx.Param`. A
            bool says, as for every Keras layer, whether the layer is trained at all.
        collections: What sown variables are, by their type or its name: "loss", "metric", "output" or "drop", as with
            `FlaxLayer`. By default `nnx.Intermediate` is dropped.
        training_argument: The train flag of the method, if it has one: see `FlaxLayer`. With None the module stays in
            the mode it is in.
        factory: In the place of `module`, which is then None: see `from_factory`.
        **kwargs: What `JaxLayer` takes beside its functions and values: `seed`, `rules`, `name`, `dtype`, ...

    Attributes:
        module: The module.
        method: The method, as given.

    Example:
        >>> import numpy as np, jaxwrap
        >>> from flax import nnx
        >>> layer = jaxwrap.NNXLayer(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), name="linear")
        >>> tuple(layer(np.ones((5, 3), "float32")).shape)
        (5, 2)
        >>> sorted(variable.path for variable in layer.variables)
        ['linear/params/bias', 'linear/params/kernel']
    """

    _serialized = (*ModuleLayer._serialized, "factory", "method", "trained")

    def __init__(
        self,
        module: Any,
        method: str | Callable[..., Any] | None = None,
        *,
        trainable: Any = None,
        collections: Mapping[Any, str] | None = None,
        training_argument: str | None = AUTO,
        factory: Callable[..., Any] | None = None,
        **kwargs: Any,
    ):
        owner = self._describe(kwargs.get("name"))
        require("flax", "0.12", "flax", owner)
        from flax import nnx

        if factory is not None:
            module = _abstract(factory)
        if not isinstance(module, nnx.Module):
            raise TypeError(
                f"{owner}: expected an `nnx.Module`; received {module!r}. A function that makes one goes to "
                f"`{type(self).__name__}.from_factory`."
            )
        self._keep("module", module)
        self.method = method
        self._keep("_factory", factory)
        if isinstance(trainable, bool):
            kwargs["trainable"] = trainable
            trainable = None
        self._keep("_trainable_filter", nnx.Param if trainable is None else trainable)
        named = {_collection_name(name): role for name, role in (collections or {}).items()}
        self._keep("_collections", Collections(named, _DEFAULT_ROLES, owner))
        self._keep("_module_argument", training_argument)
        self._takes(method_parameters(module, method), training_argument)
        self._keep("_graphdef", None)
        if factory is not None:
            super().__init__(self._call, self._init_module, **kwargs)
        else:
            params, state = self._split(module)
            super().__init__(self._call, params=params, state=state, **kwargs)

    @classmethod
    def from_factory(cls, factory: Callable[..., Any], **kwargs: Any) -> NNXLayer:
        """Makes a layer of the module that `factory(rngs)` returns, built with the layer's seed when the layer is.

        Args:
            factory: Takes an `nnx.Rngs`, as `rngs` if it has an argument of that name, and returns an `nnx.Module`.
            **kwargs: What the constructor takes beside the module.

        Example:
            >>> import numpy as np, jaxwrap
            >>> from flax import nnx
            >>> layer = jaxwrap.NNXLayer.from_factory(lambda rngs: nnx.Linear(3, 2, rngs=rngs), seed=0)
            >>> tuple(layer(np.ones((5, 3), "float32")).shape)
            (5, 2)
        """
        return cls(None, factory=factory, **kwargs)

    def module_with_weights(self) -> Any:
        """A new `nnx.Module` that holds the present values of the weights.

        Raises:
            ValueError: If the layer has not been built.
        """
        from flax import nnx

        values = jax.tree_util.tree_map(jnp.asarray, self.get_variables())
        return nnx.merge(self._graphdef, values["params"], values["state"])

    # The pure functions.

    def _init_module(self, rng: PyTree, inputs: dict[str, PyTree]) -> tuple[PyTree, PyTree]:
        from flax import nnx

        if not jax.dtypes.issubdtype(rng.dtype, jax.dtypes.prng_key):
            rng = jax.random.wrap_key_data(rng)
        return self._split(_make(self._factory, nnx.Rngs(rng)))

    def _split(self, module: Any) -> tuple[PyTree, PyTree]:
        """The values of parameters and state; what has been sown is none of them."""
        from flax import nnx

        module = nnx.clone(module)
        self._pop_sown(module)
        graphdef, params, state = nnx.split(module, self._trainable_filter, ...)
        self._keep("_graphdef", graphdef)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

    def _call(
        self, params: PyTree, state: PyTree, inputs: dict[str, PyTree], training: bool
    ) -> CallResult:
        from flax import nnx

        module = nnx.merge(self._graphdef, params, state)
        if self._module_argument is not None:
            module.train() if training else module.eval()
        outputs = self._call_with(bind_method(module, self.method), inputs, training)
        sown = self._pop_sown(module)
        _, _, new_state = nnx.split(module, self._trainable_filter, ...)
        return self._collections.result(outputs, nnx.to_pure_dict(new_state), sown)

    def _pop_sown(self, module: Any) -> dict[str, PyTree]:
        """Takes the variables out of a module that are neither parameters nor state; returns them by type."""
        from flax import nnx
        from flax.traverse_util import unflatten_dict

        names = self._collections.named(LOSS, METRIC, OUTPUT, DROP)
        popped = nnx.pop(module, lambda _, variable: _collection_name(type(variable)) in names)
        flat: dict[str, dict[tuple[Any, ...], Any]] = {}
        for path, variable in nnx.to_flat_state(popped):
            flat.setdefault(_collection_name(type(variable)), {})[path] = variable.get_value()
        return {name: unflatten_dict(values) for name, values in flat.items()}

    # What the layer asks of an adapter.

    def _function_config(self) -> dict[str, Any]:
        from flax import nnx

        if self._factory is None:
            raise TypeError(
                f"{self._owner} cannot be saved: `module` is an instance, of which nothing says how it was made. Make "
                "the layer with `NNXLayer.from_factory(make)`, where `make(rngs)` is a function that returns the "
                'module, registered by `@jaxwrap.register_serializable("my_package")`.'
            )
        chosen = self._trainable_filter
        return {
            "module": None,
            "factory": serialize(self._factory, "factory", self._owner),
            "trained": None if chosen is nnx.Param else serialize(chosen, "trainable", self._owner),
            "method": self._method_config(nnx.Module),
            "collections": self._collections.given,
            "training_argument": self._module_argument,
        }

    @classmethod
    def _arguments_from_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        from flax import nnx

        arguments = super()._arguments_from_config(config)
        if (trained := arguments.pop("trained", None)) is not None:
            arguments["trainable"] = trained
        check_method(
            _abstract(arguments["factory"]), arguments.get("method"), nnx.Module, cls.__name__
        )
        return arguments

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NNXLayer:
        """Makes a layer from what `get_config` gave."""
        layer = super().from_config(config)
        layer.trainable = config.get("trainable", True)
        return layer


def _abstract(factory: Callable[..., Any]) -> Any:
    """The module that a factory makes, without values."""
    from flax import nnx

    return nnx.eval_shape(lambda: _make(factory, nnx.Rngs(0)))


def _make(factory: Callable[..., Any], rngs: Any) -> Any:
    # A class, or a `functools.partial` of it, is a factory too: modules take their rngs by keyword, and hide it.
    parameters = inspect.signature(factory).parameters
    named = "rngs" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return factory(rngs=rngs) if named else factory(rngs)


def _collection_name(name: Any) -> str:
    """The name of a collection, given by the type of its variables or by itself."""
    from flax import nnx

    return name if isinstance(name, str) else nnx.variable_name_from_type(name, allow_register=True)
