"""Equinox modules."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras

from jaxwrap._errors import check_types, describe, door, naming
from jaxwrap._layer import Adapter, CallResult, JaxLayer
from jaxwrap._layer._signature import AUTO
from jaxwrap._pytree import is_array
from jaxwrap._serialization import name_of, serialize, serialize_by_name, serialize_callable
from jaxwrap._typing import PyTree
from jaxwrap.adapters._arguments import ModuleArguments, select_output
from jaxwrap.adapters._equinox_calls import (
    axis_name_of,
    check_factory_size,
    make_module,
    suggesting_batch,
    takes_key,
)
from jaxwrap.adapters._equinox_leaves import ModuleLeaves
from jaxwrap.adapters._libraries import require
from jaxwrap.adapters._methods import (
    Method,
    bind_method,
    check_method,
    method_for_config,
    method_parameters,
)


@keras.saving.register_keras_serializable(package="jaxwrap")
# `eq=False`, since `==` of modules compares arrays, which has no single answer.
@dataclasses.dataclass(frozen=True, eq=False)
class Equinox(Adapter):
    """The adapter of Equinox modules. `EquinoxLayer` documents the fields."""

    module: Any
    state: PyTree = None
    filter_spec: Any = None
    method: Method = None
    batch: bool = False
    unbatched: Sequence[str] = ()
    training_argument: str | None = AUTO
    output: str | int | None = None
    factory: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        require("equinox", "0.11")
        check_types(batch=(self.batch, "a bool"), unbatched=(self.unbatched, "a tuple of names"))
        if self.method is None and not callable(self.module):
            raise TypeError(
                f"expected an Equinox module that can be called; received {self.module!r}."
            )
        object.__setattr__(self, "unbatched", tuple(self.unbatched))
        names = self.signature().parameters
        if unknown := [name for name in self.unbatched if name not in names]:
            raise ValueError(
                f"`unbatched` names {unknown}, which the module does not take. It takes {', '.join(names)}."
            )

    @functools.cached_property
    def _parameters(self) -> dict[str, inspect.Parameter]:
        return method_parameters(self.module, self.method)

    @functools.cached_property
    def _own(self) -> list[str]:
        """The names of arguments that the layer passes."""
        own = ["key"] if takes_key(self._parameters) else []
        return own + (["state"] if self.state is not None else [])

    @functools.cached_property
    def _arguments(self) -> ModuleArguments:
        argument = self.training_argument
        if argument == AUTO and "inference" in self._parameters:
            argument = "!inference"  # some modules have an old name for it as well
        return ModuleArguments(self._parameters, argument, self._own)

    @functools.cached_property
    def _leaves(self) -> ModuleLeaves:
        return ModuleLeaves(self.module)

    @property
    def draws(self) -> str:  # type: ignore[override]
        """Always, for a module that takes a key."""
        return "always" if "key" in self._own else "never"

    def signature(self) -> inspect.Signature:
        """Return the arguments of the module, without the train flag, the key and the state."""
        return self._arguments.signature

    def initial(self) -> tuple[PyTree, PyTree]:
        """Return the arrays of the module. Those that are not trained, and the module's state, are state."""
        import equinox as eqx

        spec = eqx.is_inexact_array if self.filter_spec is None else self.filter_spec
        params, rest = self._leaves.divide(eqx.filter(self.module, spec))
        return params, {"module": rest, "state": self.state}

    def init(self, keys: PyTree, inputs: PyTree) -> tuple[PyTree, PyTree]:
        """Return the values of the module, which has them already."""
        return self.initial()

    def call(
        self,
        params: PyTree,
        state: PyTree,
        keys: PyTree,
        inputs: Mapping[str, PyTree],
        training: bool,
    ) -> CallResult:
        """Call the module with these arrays, mapped over the batch if it takes one example."""
        import equinox as eqx

        module = self._leaves.join(params, state["module"])
        if self.training_argument is not None:
            module = eqx.nn.inference_mode(module, value=not training)
        fn = bind_method(module, self.method)
        is_stateful = "state" in self._own

        def call(inputs: Mapping[str, PyTree], key: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
            own = {name: {"key": key, "state": state}[name] for name in self._own}
            outputs = self._arguments.call(fn, inputs, training, **own)
            outputs, new = outputs if is_stateful else (outputs, state)
            return select_output(outputs, self.output), new

        if self.batch:
            outputs, new = self._map(call, axis_name_of(module), inputs, keys, state["state"])
        else:
            with suggesting_batch():
                outputs, new = call(inputs, keys, state["state"])
        return CallResult(outputs, {**state, "state": new})

    def _map(
        self,
        call: Callable[..., Any],
        axis_name: Any,
        inputs: Mapping[str, PyTree],
        key: PyTree,
        state: PyTree,
    ) -> tuple[PyTree, PyTree]:
        import equinox as eqx

        axes = {name: None if name in self.unbatched else eqx.if_array(0) for name in inputs}
        mapped = {name: tree for name, tree in inputs.items() if name not in self.unbatched}
        array = next(filter(is_array, jax.tree_util.tree_leaves(mapped)), None)
        if array is None:
            raise ValueError(
                "with `batch=True` at least one argument must be a tensor with a batch; received none."
            )
        # One key for all examples would draw the same mask for each.
        keys = None if key is None else jax.random.split(key, array.shape[0])
        vmapped = eqx.filter_vmap(
            call, in_axes=(axes, eqx.if_array(0), None), out_axes=(0, None), axis_name=axis_name
        )
        return vmapped(dict(inputs), keys, state)

    def module_of(self, params: PyTree, state: PyTree) -> Any:
        """Make a new module of these values. For a stateful one, the module and the state."""
        module = self._leaves.join(params, state["module"])
        return module if state["state"] is None else (module, state["state"])

    def checkpoint_tree(self, params: PyTree, state: PyTree) -> PyTree:
        """Return the module, whose leaves Equinox saves in its own order."""
        return self.module_of(params, state)

    def get_config(self) -> dict[str, Any]:
        """Return the fields as JSON, with arrays left to the weights file."""
        import equinox as eqx

        method = method_for_config(self.module, self.method, eqx.Module)
        config = {
            "module": None,
            "filter_spec": serialize(self.filter_spec, "filter_spec"),
            "method": serialize_callable(method, "method"),
            "batch": self.batch,
            "unbatched": list(self.unbatched),
            "training_argument": self.training_argument,
            "output": self.output,
        }
        if self.factory is not None:
            return {**config, "factory": serialize(self.factory, "factory")}
        if self.state is None:
            # An instance that is registered comes back as it is.
            module = self.module if name_of(self.module) else self._leaves.placeholders()
            return {**config, "module": serialize(module, "module")}
        problem = "belongs to a stateful module, whose state is not data"
        advice = (
            "Make the layer with `EquinoxLayer.from_factory(make)`, where `make(key)` is a function that returns the "
            'module and the state, registered by `@jaxwrap.register_serializable("my_package")`'
        )
        return {
            **config,
            "module": serialize_by_name(self.module, "module", problem, advice),
            "state": serialize_by_name(self.state, "state", problem, advice),
        }

    @classmethod
    def fields_from_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields. A method that is named must be the module's own."""
        import equinox as eqx

        fields = super().fields_from_config(config)
        if fields.get("factory") is not None:
            check_factory_size(fields["factory"])
        if fields.get("module") is not None:
            check_method(fields["module"], fields.get("method"), eqx.Module)
        return fields


@keras.saving.register_keras_serializable(package="jaxwrap")
class EquinoxLayer(JaxLayer):
    """A Keras layer that computes an Equinox module, on every Keras backend.

    Arrays in the module become the weights. The module itself never changes. An array that stands in several places is
    one weight. A call is in inference mode, `eqx.nn.inference_mode`, unless it is in training. The layer takes the
    arguments of the module, tensors by position or by keyword, other values by keyword. If the module takes `key`, it
    gets a new one at each call.

    Args:
        module: An Equinox module, or any callable pytree.
        state: The state of a stateful module, from `eqx.nn.make_with_state`. The module is then called with `state`,
            and returns its outputs and the new state.
        filter_spec: Which arrays are trained: a function of a leaf, or a pytree of bools, as `eqx.filter` takes it. By
            default those of inexact dtype.
        method: What to call: see `FlaxLayer`.
        batch: Whether the module is written for one example. `jax.vmap` then maps it over the first axis of all
            tensors, with a key for each example, and one state, under the axis name of its `BatchNorm` layers.
        unbatched: The names of arguments that `batch` does not map, such as the times of a differential equation.
        training_argument: The train flag of the method, if it has one: see `FlaxLayer`. With None the module stays in
            the mode it is in.
        output: See `FlaxLayer`.
        factory: Instead of `module` and `state`, which are then None: see `from_factory`.
        **kwargs: The other arguments of `JaxLayer`: `seed`, `rules`, `name`, `dtype`, ...

    Attributes:
        module: The module.

    Raises:
        TypeError: If the module cannot be called.
        ValueError: If `unbatched` names an argument that the module does not take.

    Example:
        >>> import equinox as eqx, jax, numpy as np, jaxwrap
        >>> mlp = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
        >>> layer = jaxwrap.EquinoxLayer(mlp, batch=True, name="mlp")
        >>> tuple(layer(np.ones((3, 4), "float32")).shape)
        (3, 2)
        >>> layer.trainable_variables[0].path
        'mlp/params/layers/0/weight'
    """

    adapter_class = Equinox
    adapter: Equinox

    def __init__(
        self,
        module: Any,
        state: PyTree = None,
        *,
        filter_spec: Any = None,
        method: Method = None,
        batch: bool = False,
        unbatched: Sequence[str] = (),
        training_argument: str | None = AUTO,
        output: str | int | None = None,
        factory: Callable[..., Any] | None = None,
        **kwargs: Any,
    ):
        with naming(describe(self, kwargs.get("name"))):
            if factory is not None:
                module, state = make_module(factory, kwargs.get("seed"), kwargs.get("key_impl"))
            adapter = Equinox(
                module,
                state,
                filter_spec,
                method,
                batch,
                unbatched,
                training_argument,
                output,
                factory,
            )
        super().__init__(adapter, **kwargs)

    @property
    def module(self) -> Any:
        """The module."""
        return self.adapter.module

    @property
    def method(self) -> Method:
        """The method, as passed."""
        return self.adapter.method

    @classmethod
    def from_factory(cls, factory: Callable[..., Any], **kwargs: Any) -> EquinoxLayer:
        """Make a layer of the module that `factory(key)` returns now, with the layer's seed.

        With a registered factory, a layer can be saved whose module is stateful, or of classes that are not registered.

        Args:
            factory: Takes a JAX key, as `key` if it has an argument of that name, and returns an Equinox module, or
                the module and its state.
            **kwargs: The other arguments of the constructor.

        Example:
            >>> import equinox as eqx, jaxwrap
            >>> def make(key):
            ...     return eqx.nn.MLP(4, 2, 8, 1, key=key)
            >>> layer = jaxwrap.EquinoxLayer.from_factory(make, batch=True, seed=0)
            >>> len(layer.trainable_variables)
            4
        """
        return cls(None, factory=factory, **kwargs)

    @door
    def module_with_weights(self) -> Any:
        """Return a new module with the present values of the weights. For a stateful one, also the state."""
        variables = jax.tree_util.tree_map(
            lambda leaf: jnp.asarray(leaf) if is_array(leaf) else leaf, self.get_variables()
        )
        return self.adapter.module_of(variables["params"], variables["state"])
