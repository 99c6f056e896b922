"""Flax Linen modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import keras

from jaxwrap._layer import JaxLayer
from jaxwrap._typing import PyTree


@keras.saving.register_keras_serializable(package="jaxwrap")
class FlaxLayer(JaxLayer):
    """A Keras layer that computes a Flax Linen module, on every Keras backend.

    The contract is that of `keras.layers.FlaxLayer`: the method takes `inputs`, one array or any nest of arrays, and,
    if it likes, `training`. The collection `params` is trained; all others that the module makes when it is initialized
    are non-trainable state. Every RNG stream that the module draws from gets new keys at each call in training.

    Args:
        module: A `flax.linen.Module`.
        method: What to call: None for `__call__`, a method of `module`, its name, or a function that takes the module
            as its first argument.
        variables: Initial variables, as `module.init` returns them. They are copied. None to have `module.init` make
            them when the layer is built.
        **kwargs: What `JaxLayer` takes beside its functions and values: `seed`, `name`, `dtype`, ...

    Attributes:
        module: The module.
        method: The method, as given.

    Example:
        >>> import flax.linen as nn, numpy as np, jaxwrap
        >>> layer = jaxwrap.FlaxLayer(nn.Dense(4), name="dense")
        >>> tuple(layer(np.ones((2, 3), "float32")).shape)
        (2, 4)
        >>> sorted(variable.path for variable in layer.variables)[0]
        'dense/params/bias'
    """

    def __init__(
        self,
        module: Any,
        method: str | Callable[..., Any] | None = None,
        variables: PyTree = None,
        **kwargs: Any,
    ):
        if variables is not None and not isinstance(variables, Mapping):
            raise TypeError(
                f"{type(self).__name__}: `variables` must be a dict of collections, as `module.init` returns it; "
                f"received a {type(variables).__name__}."
            )
        self.module = module
        self.method = method
        params, state = _split(variables)
        super().__init__(**self._functions(), params=params, state=state, **kwargs)

    def _functions(self) -> dict[str, Callable[..., Any]]:
        """The `call_fn` and `init_fn` of the module."""
        from flax.core import DenyList

        module, method = self.module, self.method
        bound = getattr(module, method) if isinstance(method, str) else method or module.__call__

        def apply(params: PyTree, state: PyTree, rng: PyTree, inputs: PyTree, **flag: bool) -> Any:
            outputs, changed = module.apply(
                {**(params or {}), **(state or {})},
                inputs,
                rngs=_with_default_stream(rng),
                method=method,
                mutable=DenyList(["params"]),
                **flag,
            )
            # Only what `init` makes is state: collections such as `intermediates` appear in `apply` alone.
            return outputs, {name: changed.get(name, old) for name, old in (state or {}).items()}

        def init(rng: PyTree, inputs: PyTree, **flag: bool) -> tuple[PyTree, PyTree]:
            return _split(module.init(rng, inputs, method=method, **flag))

        if "training" not in inspect.signature(bound).parameters:
            return {
                "call_fn": lambda params, state, rng, inputs: apply(params, state, rng, inputs),
                "init_fn": lambda rng, inputs: init(rng, inputs),
            }
        return {
            "call_fn": lambda params, state, rng, inputs, training: apply(
                params, state, rng, inputs, training=training
            ),
            "init_fn": lambda rng, inputs, training: init(rng, inputs, training=training),
        }

    def _get_init_rng(self) -> PyTree:
        return {"params": self._get_init_seed(), "dropout": self._get_init_seed()}

    def _get_call_rng(self, training: bool) -> PyTree:
        return {"dropout": self._get_call_seed()} if training else {}

    def _variable_roots(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (), ()  # the collections' names begin the paths already

    def _function_config(self) -> dict[str, Any]:
        method = self.method
        if inspect.ismethod(method) and method.__self__ is self.module:
            method = method.__name__
        return {
            "module": keras.saving.serialize_keras_object(self.module),
            "method": keras.saving.serialize_keras_object(method),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FlaxLayer:
        """Makes a layer from what `get_config` gave."""
        module = keras.saving.deserialize_keras_object(config["module"])
        method = keras.saving.deserialize_keras_object(config["method"])
        # Past JaxLayer's own: this layer has no functions in its config.
        return super(JaxLayer, cls).from_config({**config, "module": module, "method": method})


def _split(variables: PyTree) -> tuple[PyTree, PyTree]:
    """Linen's variables as `(params, state)`, both of them dicts of collections."""
    if variables is None:
        return None, None
    state = {name: collection for name, collection in variables.items() if name != "params"}
    return ({"params": variables["params"]} if "params" in variables else {}), state


def _with_default_stream(rngs: PyTree) -> PyTree:
    """Adds the stream `params`, from which Linen draws for every stream that is not there."""
    if not rngs or "params" in rngs:
        return rngs
    return {**rngs, "params": jax.random.fold_in(next(iter(rngs.values())), 1)}
