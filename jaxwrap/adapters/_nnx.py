"""Flax NNX modules."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import keras

from jaxwrap._errors import describe, door, naming
from jaxwrap._layer import Adapter, CallResult, JaxLayer
from jaxwrap._layer._signature import AUTO
from jaxwrap._serialization import serialize, serialize_callable
from jaxwrap._typing import PyTree
from jaxwrap.adapters._arguments import ModuleArguments, select_output
from jaxwrap.adapters._axis_rules import AxisRules, axis_rules_scope, check_axis_rules
from jaxwrap.adapters._boxes import specs_of_variables
from jaxwrap.adapters._capture import NnxCapture
from jaxwrap.adapters._collections import DROP, LOSS, METRIC, OUTPUT, Collections
from jaxwrap.adapters._libraries import require
from jaxwrap.adapters._methods import (
    Method,
    bind_method,
    check_method,
    method_for_config,
    method_parameters,
)
from jaxwrap.adapters._nnx_factories import (
    abstract_module,
    check_factory,
    make_module,
    module_for_config,
    rngs_of,
    unsharded,
)
from jaxwrap.adapters._nnx_variables import as_params_and_state, collection_name, take_apart

if TYPE_CHECKING:
    from flax import nnx

_DEFAULT_ROLES = {"losses": LOSS, "metrics": METRIC, "intermediates": DROP}


@keras.saving.register_keras_serializable(package="jaxwrap")
@dataclasses.dataclass(frozen=True, eq=False)
class NNX(Adapter):
    """The adapter of NNX modules. `NNXLayer` documents the fields. `trained` is its `trainable`.

    Keys and counters of `nnx.Rngs` are state. So a call gets keys of the layer only if the method takes `rngs`, and the
    module does not have any of its own.
    """

    module: nnx.Module | None
    method: Method = None
    trained: Any = None
    collections: Mapping[Any, str] | None = None
    training_argument: str | None = AUTO
    output: str | int | None = None
    factory: Callable[..., nnx.Module] | None = None
    capture: Sequence[str] = ()
    axis_rules: AxisRules = None

    def __post_init__(self) -> None:
        require("flax", "0.12.1")
        from flax import nnx

        if not isinstance(self.example, nnx.Module):
            raise TypeError(
                f"expected an `nnx.Module`; received {self.module!r}. A function that makes one goes to "
                "`NNXLayer.from_factory`."
            )
        check_axis_rules(self.axis_rules)
        _ = self._roles, self._arguments  # raise early
        if self.module is not None and self.factory is not None:
            check_factory(self._values(self.module), self._values(abstract_module(self.factory)))
        if self._capture:
            self._capture.check_module(self.example)

    def __str__(self) -> str:
        return type(self.example).__qualname__

    @functools.cached_property
    def example(self) -> nnx.Module:
        """The module. If only a factory was passed, one without values."""
        if self.module is None and self.factory is not None:
            return abstract_module(self.factory)
        return self.module  # type: ignore[return-value]

    @functools.cached_property
    def _roles(self) -> Collections:
        named = {collection_name(name): role for name, role in (self.collections or {}).items()}
        return Collections(named, _DEFAULT_ROLES)

    @functools.cached_property
    def _capture(self) -> NnxCapture:
        return NnxCapture(self.capture)

    @functools.cached_property
    def _arguments(self) -> ModuleArguments:
        parameters = method_parameters(self.example, self.method)
        return ModuleArguments(parameters, self.training_argument, ["rngs"])

    @functools.cached_property
    def _takes_rngs(self) -> bool:
        from flax import nnx

        if "rngs" not in method_parameters(self.example, self.method):
            return False
        _, own, _ = nnx.split(self.example, nnx.RngState, ...)
        return not jax.tree_util.tree_leaves(own)

    @property
    def draws(self) -> str:  # type: ignore[override]
        """Always, for a method that takes `rngs`."""
        return "always" if self._takes_rngs else "never"

    @property
    def _filter(self) -> Any:
        from flax import nnx

        return nnx.Param if self.trained is None else self.trained

    @functools.cached_property
    def _graphdef(self) -> Any:
        return self._parts(self.example)[0]

    def _parts(self, module: Any) -> Any:
        """Return the graph definition, parameters and state of a copy of a module, without what it has sown."""
        from flax import nnx

        # Of a clone, since the module of the user must not change.
        with unsharded():
            return take_apart(nnx.clone(module), self._filter, self._sown)[1:]

    def _values(self, module: Any) -> tuple[PyTree, PyTree]:
        from flax import nnx

        _, params, state = self._parts(module)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(state)

    def initial(self) -> tuple[PyTree, PyTree] | None:
        """Return the values of the module, unless a factory makes them."""
        return None if self.module is None else self._values(self.module)

    def unbox(self, params: PyTree, state: PyTree) -> tuple[tuple[PyTree, PyTree], Any]:
        """Return the values as they are, and the names that `nnx.with_partitioning` and its like gave to variables."""
        _, *parts = self._parts(self.example)
        return (params, state), tuple(map(specs_of_variables, parts))

    def signature(self) -> inspect.Signature:
        """Return the arguments of the method, without the train flag."""
        return self._arguments.signature

    def init(self, keys: PyTree, inputs: Mapping[str, PyTree]) -> tuple[PyTree, PyTree]:
        """Call the factory."""
        assert self.factory is not None
        with axis_rules_scope(self.axis_rules):
            return self._values(make_module(self.factory, rngs_of(keys)))

    def call(
        self,
        params: PyTree,
        state: PyTree,
        keys: PyTree,
        inputs: Mapping[str, PyTree],
        training: bool,
    ) -> CallResult:
        """Call a module that has been merged of the values."""
        from flax import nnx

        module = self.merge(params, state)
        if self.training_argument is not None:
            module.train() if training else module.eval()
        if self._capture:
            self._capture.record(module)
        own = {}
        if self._takes_rngs:
            own["rngs"] = None if keys is None else rngs_of(keys)
        method = bind_method(module, self.method)
        with axis_rules_scope(self.axis_rules):
            outputs = self._arguments.call(method, inputs, training, **own)
        outputs = select_output(outputs, self.output)
        captured = self._capture.take(module) if self._capture else None
        sown, _, _, new_state = take_apart(module, self._filter, self._sown)
        result = self._roles.result(outputs, nnx.to_pure_dict(new_state), sown)
        return result if captured is None else self._capture.add(result, captured)

    def merge(self, params: PyTree, state: PyTree) -> Any:
        """Make a new module of these values."""
        from flax import nnx

        with unsharded():
            return nnx.merge(self._graphdef, params, state)

    @property
    def _sown(self) -> list[str]:
        return self._roles.named(LOSS, METRIC, OUTPUT, DROP)

    def split(self, variables: Any) -> tuple[PyTree, PyTree]:
        """Split what `join` returns, or an `nnx.State` of the whole module."""
        _, params, _ = self._parts(self.example)
        return super().split(as_params_and_state(variables, params, self._sown))

    def get_config(self) -> dict[str, Any]:
        """Return the fields as JSON."""
        from flax import nnx

        method = method_for_config(self.example, self.method, nnx.Module)
        return {
            "module": module_for_config(self.module) if self.factory is None else None,
            "method": serialize_callable(method, "method"),
            "trained": serialize(self.trained, "trainable"),
            "collections": serialize(self._roles.given, "collections"),
            "training_argument": self.training_argument,
            "output": self.output,
            "factory": serialize(self.factory, "factory"),
            "capture": list(self.capture),
            "axis_rules": serialize(self.axis_rules, "axis_rules"),
        }

    @classmethod
    def fields_from_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields. A method that is named must be the module's own."""
        from flax import nnx

        fields = super().fields_from_config(config)
        module, factory = (fields.get(name) for name in ("module", "factory"))
        example = module if factory is None else abstract_module(factory)
        check_method(example, fields.get("method"), nnx.Module)
        return fields


@keras.saving.register_keras_serializable(package="jaxwrap")
class NNXLayer(JaxLayer):
    """A Keras layer that computes a Flax NNX module, on every Keras backend.

    The values of the module's variables become the weights. The instance itself never changes. `nnx.Param` is trained.
    All other variables, such as `BatchStat`, `Cache` and the keys and counters of `nnx.Rngs`, are state. Shared modules
    and variables stay shared. A call in training comes after `module.train()`, others after `module.eval()`. The layer
    takes the arguments of the method, tensors by position or by keyword, other values by keyword.

    Args:
        module: An `nnx.Module`. For one that is made with the layer's seed when the layer is made, see `from_factory`.
        method: What to call: None for `__call__`, a method of `module`, its name, or a function that takes the module
            as its first argument.
        trainable: An `nnx` filter for the variables that are trained, such as `nnx.LoRAParam`. By default `nnx.Param`.
            Or a bool, as for every Keras layer: whether the layer is trained at all.
        collections: The roles of sown variables, by their type or its name: "loss", "metric", "output" or "drop", as
            for `FlaxLayer`. By default `nnx.Intermediate` is dropped.
        training_argument: The train flag of the method, if it has one: see `FlaxLayer`. With None the module stays in
            the mode it is in.
        output: See `FlaxLayer`.
        factory: A function that makes such a module: see `from_factory`. Files name it, and `module` gives the values.
            With None for `module` it gives the values too.
        capture: Submodules whose outputs the layer returns too, by their paths: see `FlaxLayer`.
        axis_rules: See `FlaxLayer`.
        **kwargs: The other arguments of `JaxLayer`: `seed`, `rules`, `name`, `dtype`, ...

    Attributes:
        module: The module.
        method: The method, as passed.

    Example:
        >>> import numpy as np, jaxwrap
        >>> from flax import nnx
        >>> layer = jaxwrap.NNXLayer(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), name="linear")
        >>> tuple(layer(np.ones((5, 3), "float32")).shape)
        (5, 2)
        >>> sorted(variable.path for variable in layer.variables)
        ['linear/params/bias', 'linear/params/kernel']
    """

    adapter_class = NNX
    adapter: NNX

    def __init__(
        self,
        module: nnx.Module | None,
        method: Method = None,
        *,
        trainable: Any = None,
        collections: Mapping[Any, str] | None = None,
        training_argument: str | None = AUTO,
        output: str | int | None = None,
        factory: Callable[..., nnx.Module] | None = None,
        capture: Sequence[str] = (),
        axis_rules: AxisRules = None,
        **kwargs: Any,
    ):
        # `trained` comes from a config, where `trainable` is the bool of every layer.
        trained = kwargs.pop("trained", None if isinstance(trainable, bool) else trainable)
        if isinstance(trainable, bool):
            kwargs["trainable"] = trainable
        with naming(describe(self, kwargs.get("name"))):
            options = (collections, training_argument, output, factory, capture, axis_rules)
            adapter = NNX(module, method, trained, *options)
        super().__init__(adapter, **kwargs)

    @property
    def module(self) -> nnx.Module:
        """The module. If only a factory was passed, one without values."""
        return self.adapter.example

    @property
    def method(self) -> Method:
        """The method, as passed."""
        return self.adapter.method

    @classmethod
    def from_factory(cls, factory: Callable[..., Any], **kwargs: Any) -> NNXLayer:
        """Make a layer of the module that `factory(rngs)` returns, when the layer is built, with the layer's seed.

        Args:
            factory: Takes an `nnx.Rngs`, as `rngs` if it has an argument of that name, and returns an `nnx.Module`.
            **kwargs: The other arguments of the constructor.

        Example:
            >>> import numpy as np, jaxwrap
            >>> from flax import nnx
            >>> layer = jaxwrap.NNXLayer.from_factory(lambda rngs: nnx.Linear(3, 2, rngs=rngs), seed=0)
            >>> tuple(layer(np.ones((5, 3), "float32")).shape)
            (5, 2)
        """
        return cls(None, factory=factory, **kwargs)

    @door
    def module_with_weights(self) -> nnx.Module:
        """Return a new module with the present values of the weights.

        Raises:
            ValueError: If the layer is not built.
        """
        values = jax.tree_util.tree_map(jnp.asarray, self.get_variables())
        return self.adapter.merge(values["params"], values["state"])
