"""Flax Linen modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import keras

from jaxwrap._pure import CallResult
from jaxwrap._rng import Generator
from jaxwrap._serialization import serialize_callable
from jaxwrap._signature import AUTO, check_types
from jaxwrap._typing import PyTree
from jaxwrap.adapters._module import (
    DROP,
    LOSS,
    METRIC,
    STATE,
    TRAINABLE,
    Collections,
    ModuleLayer,
    bind_method,
    check_method,
    method_parameters,
    require,
)

_DEFAULT_ROLES = {"params": TRAINABLE, "losses": LOSS, "metrics": METRIC, "intermediates": DROP}


@keras.saving.register_keras_serializable(package="jaxwrap")
class FlaxLayer(ModuleLayer):
    """A Keras layer that computes a Flax Linen module, on every Keras backend.

    The contract is that of `keras.layers.FlaxLayer`, and more: the layer takes the arguments that the method takes,
    tensors by position or by keyword, other values by keyword. Of these, the method's train flag is Keras's
    `training`. Every RNG stream that the module draws from gets new keys at each call; in inference the streams are
    there only for a module that cannot do without, unless `rngs` names them.

    Args:
        module: A `flax.linen.Module`.
        method: What to call: None for `__call__`, a method of `module`, its name, or a function that takes the module
            as its first argument.
        variables: Initial variables, as `module.init` returns them. They are copied. None to have `module.init` make
            them when the layer is built.
        collections: What collections of variables are, by name:

            - "trainable": parameters. The default for `params`.
            - "state": non-trainable state, if `module.init` makes it. The default for all not named here.
            - "loss": their sum is added to the model's loss. The default for `losses`.
            - "metric": the model reports their means over batches. The default for `metrics`.
            - "output": the layer returns `(outputs, {name: collection})`.
            - "drop": nothing is kept. The default for `intermediates`.
        rngs: The names of the RNG streams, or a dict with a seed for each, or None for those that are to draw from the
            seed of the layer. By default any that the module asks for.
        training_argument: The train flag of the method. By default `training`, `train`, `is_training`, or the opposite,
            `deterministic`, `inference`, `use_running_average`; "train" names it, "!frozen" names an opposite one. With
            None the module's own default holds.
        **kwargs: What `JaxLayer` takes beside its functions and values: `seed`, `rules`, `name`, `dtype`, ...

    Attributes:
        module: The module.
        method: The method, as given.

    Raises:
        TypeError: If `variables` is no dict.
        ValueError: If a collection is said to be something else, or the method has no argument `training_argument`.

    Example:
        >>> import flax.linen as nn, numpy as np, jaxwrap
        >>> layer = jaxwrap.FlaxLayer(nn.Dense(4), name="dense")
        >>> tuple(layer(np.ones((2, 3), "float32")).shape)
        (2, 4)
        >>> sorted(variable.path for variable in layer.variables)[0]
        'dense/params/bias'
    """

    _serialized = (*ModuleLayer._serialized, "module", "method")

    def __init__(
        self,
        module: Any,
        method: str | Callable[..., Any] | None = None,
        variables: PyTree = None,
        *,
        collections: Mapping[str, str] | None = None,
        rngs: Mapping[str, int | None] | Sequence[str] | None = None,
        training_argument: str | None = AUTO,
        **kwargs: Any,
    ):
        owner = self._describe(kwargs.get("name"))
        require("flax", "0.12", "flax", owner)
        if variables is not None and not isinstance(variables, Mapping):
            raise TypeError(
                f"{owner}: `variables` must be a dict of collections, as `module.init` returns it; "
                f"received a {type(variables).__name__}."
            )
        from flax import linen

        if not isinstance(module, linen.Module):
            raise TypeError(f"{owner}: expected a `flax.linen.Module`; received {module!r}.")
        check_types(owner, rngs=(rngs, "names, with integers or None for seeds, or None"))
        self.module = module
        self.method = method
        streams = rngs if isinstance(rngs, Mapping) else dict.fromkeys(rngs or ())
        self._keep("_collections", Collections(collections, _DEFAULT_ROLES, owner))
        self._keep("_rngs", None if rngs is None else dict(streams))
        self._keep("_module_argument", training_argument)
        self._takes(*self._read_method())
        params, state = (None, None) if variables is None else self._split_variables(variables)
        super().__init__(self._call, self._init_module, params=params, state=state, **kwargs)
        self._stream_generators = {
            name: self._make_generator(seed, f"rngs_{name}")
            for name, seed in streams.items()
            if seed is not None
        }

    def _read_method(self) -> tuple[Mapping[str, inspect.Parameter], str | None]:
        """What the method takes, and which argument of it is the train flag."""
        module, argument = self.module, self._module_argument
        parameters = method_parameters(module, self.method)
        # A module that was told when it was made wants to hear it once.
        told = [name for name in parameters if getattr(module, name, None) is not None]
        if argument == AUTO and set(told) & {"deterministic", "use_running_average"}:
            argument = None
        return parameters, argument

    # The two pure functions.

    def _init_module(self, rng: PyTree, inputs: dict[str, PyTree]) -> tuple[PyTree, PyTree]:
        return self._split_variables(self.module.init(rng, inputs, training=True, method=self._run))

    def _call(
        self, params: PyTree, state: PyTree, rng: PyTree, inputs: dict[str, PyTree], training: bool
    ) -> CallResult:
        from flax.core import DenyList
        from flax.errors import InvalidRngError

        fixed = self._collections.named(TRAINABLE, DROP)

        def apply(rngs: PyTree) -> tuple[PyTree, PyTree]:
            return self.module.apply(
                {**(params or {}), **(state or {})},
                inputs,
                training=training,
                rngs=rngs,
                method=self._run,
                mutable=DenyList(fixed),
            )

        if self._rngs is not None or type(self)._get_call_rng is not FlaxLayer._get_call_rng:
            outputs, changed = apply(rng)
        elif training:
            outputs, changed = apply(_with_default_stream(rng))
        else:
            try:
                outputs, changed = apply({})
            except InvalidRngError:
                outputs, changed = apply(_with_default_stream(rng))
        # Only what `init` makes is state: other collections appear in `apply` alone.
        new_state = {name: changed.get(name, old) for name, old in (state or {}).items()}
        return self._collections.result(outputs, new_state, changed)

    def _run(self, module: Any, inputs: dict[str, PyTree], training: bool) -> Any:
        """Calls the method of a bound module."""
        return self._call_with(bind_method(module, self.method), inputs, training)

    # What the layer asks of an adapter.

    def _get_init_rng(self) -> PyTree:
        names = dict.fromkeys(["params", "dropout", *(self._rngs or ())])
        return {name: self._get_init_seed() for name in names}

    def _get_call_rng(self, training: bool) -> PyTree:
        if self._rngs is None:
            return {"dropout": self._get_call_seed()}
        generators = self._stream_generators
        return {
            name: generators[name].next() if name in generators else self._get_call_seed()
            for name in self._rngs
        }

    def _generators(self) -> dict[str, Generator]:
        streams = self._stream_generators.items()
        return {
            **super()._generators(),
            **{f"rngs_{name}": generator for name, generator in streams},
        }

    def _variable_roots(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (), ()  # the collections' names begin the paths already

    def _join_variables(self, params: PyTree, state: PyTree) -> PyTree:
        return {**(params or {}), **(state or {})}

    def _split_variables(self, variables: PyTree) -> tuple[PyTree, PyTree]:
        return tuple(self._collections.select(variables, role) for role in (TRAINABLE, STATE))

    def _function_config(self) -> dict[str, Any]:
        from flax import linen

        return {
            "module": serialize_callable(self.module, "module", self._owner),
            "method": self._method_config(linen.Module),
            "collections": self._collections.given,
            "rngs": self._rngs,
            "training_argument": self._module_argument,
        }

    @classmethod
    def _arguments_from_config(cls, config: dict[str, Any]) -> dict[str, Any]:
        from flax import linen

        arguments = super()._arguments_from_config(config)
        check_method(arguments["module"], arguments.get("method"), linen.Module, cls.__name__)
        return arguments


def _with_default_stream(rngs: PyTree) -> PyTree:
    """Adds the stream `params`, from which Linen draws for every stream that is not there."""
    if not rngs or "params" in rngs:
        return rngs
    return {**rngs, "params": jax.random.fold_in(next(iter(rngs.values())), 1)}
