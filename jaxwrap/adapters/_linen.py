"""Flax Linen modules."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import keras

from jaxwrap._errors import check_types, describe, naming
from jaxwrap._layer import Adapter, CallResult, JaxLayer
from jaxwrap._layer._signature import AUTO
from jaxwrap._serialization import serialize, serialize_callable
from jaxwrap._typing import PyTree
from jaxwrap.adapters._arguments import ModuleArguments, select_output
from jaxwrap.adapters._axis_rules import AxisRules, axis_rules_scope, check_axis_rules
from jaxwrap.adapters._boxes import specs_of, unboxed
from jaxwrap.adapters._capture import Capture, LinenCapture
from jaxwrap.adapters._collections import DROP, LOSS, METRIC, STATE, TRAINABLE, Collections
from jaxwrap.adapters._libraries import require
from jaxwrap.adapters._methods import (
    Method,
    bind_method,
    check_method,
    method_for_config,
    method_parameters,
)

if TYPE_CHECKING:
    from flax import linen

_DEFAULT_ROLES = {"params": TRAINABLE, "losses": LOSS, "metrics": METRIC, "intermediates": DROP}


@keras.saving.register_keras_serializable(package="jaxwrap")
@dataclasses.dataclass(frozen=True, eq=False)
class Linen(Adapter):
    """The adapter of Linen modules. `FlaxLayer` documents the fields."""

    module: linen.Module
    method: Method = None
    collections: Mapping[str, str] | None = None
    rngs: Mapping[str, int | None] | Sequence[str] | None = None
    training_argument: str | None = AUTO
    output: str | int | None = None
    capture: Sequence[str] = ()
    axis_rules: AxisRules = None

    passes_all_keys: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require("flax", "0.12.1")
        from flax import linen

        if not isinstance(self.module, linen.Module):
            raise TypeError(f"expected a `flax.linen.Module`; received {self.module!r}.")
        check_types(rngs=(self.rngs, "names, with integers or None for seeds, or None"))
        check_axis_rules(self.axis_rules)
        _ = self._roles, self._arguments, self._capture  # raise early

    @functools.cached_property
    def _roles(self) -> Collections:
        return Collections(self.collections, _DEFAULT_ROLES)

    @functools.cached_property
    def _capture(self) -> Capture:
        return Capture(self.capture)

    @functools.cached_property
    def _arguments(self) -> ModuleArguments:
        parameters = method_parameters(self.module, self.method)
        # A module whose own field sets its mode fails if it is set twice.
        own = [name for name in parameters if getattr(self.module, name, None) is not None]
        fixed = set(own) & {"deterministic", "use_running_average"}
        argument = None if self.training_argument == AUTO and fixed else self.training_argument
        return ModuleArguments(parameters, argument)

    def signature(self) -> inspect.Signature:
        """Return the arguments of the method, without the train flag."""
        return self._arguments.signature

    def streams(self) -> Mapping[str, int | None]:
        """Return those in `rngs`. By default one, from which Linen draws for all others."""
        if self.rngs is None:
            return {"dropout": None}
        return self.rngs if isinstance(self.rngs, Mapping) else dict.fromkeys(self.rngs)

    def unbox(self, params: PyTree, state: PyTree) -> tuple[tuple[PyTree, PyTree], Any]:
        """Take off what `nn.with_partitioning` and its like put around arrays."""
        return unboxed((params, state)), specs_of((params, state))

    def init(self, keys: PyTree, inputs: Mapping[str, PyTree]) -> tuple[PyTree, PyTree]:
        """Call `module.init`."""
        with axis_rules_scope(self.axis_rules):
            variables = self.module.init(keys, inputs, training=True, method=self._run)
        return self.split(variables)

    def call(
        self,
        params: PyTree,
        state: PyTree,
        keys: PyTree,
        inputs: Mapping[str, PyTree],
        training: bool,
    ) -> CallResult:
        """Call `module.apply`."""
        from flax.core import DenyList

        fixed = self._roles.named(TRAINABLE, DROP)
        captured = LinenCapture(self._capture) if self._capture else None

        def apply(rngs: PyTree) -> tuple[PyTree, PyTree]:
            return self.module.apply(
                {**(params or {}), **(state or {})},
                inputs,
                training=training,
                rngs=rngs,
                method=self._run,
                # Linen's `init` leaves out `intermediates`, but `apply` returns them if they are mutable.
                mutable=DenyList(fixed),
                capture_intermediates=captured.filter if captured else False,
            )

        with axis_rules_scope(self.axis_rules):
            outputs, changed = self._with_keys(apply, keys, training)
        values = None
        if captured:
            changed, values = captured.take(changed)
        # Only what `init` makes is state. Other collections appear in `apply` alone.
        new_state = {name: changed.get(name, old) for name, old in (state or {}).items()}
        result = self._roles.result(outputs, unboxed(new_state), changed)
        return result if values is None else self._capture.add(result, values)

    def _with_keys(self, apply: Callable[[PyTree], Any], keys: PyTree, training: bool) -> Any:
        """Call `apply` with the keys that the module needs."""
        from flax.errors import InvalidRngError

        if self.rngs is not None or self.passes_all_keys:
            return apply(keys)
        if not training:
            # Keys only if it fails without: most modules draw nothing in inference, and seeds must not move.
            with contextlib.suppress(InvalidRngError):
                return apply({})
        return apply(_with_default_stream(keys))

    def _run(self, module: Any, inputs: Mapping[str, PyTree], training: bool) -> Any:
        outputs = self._arguments.call(bind_method(module, self.method), inputs, training)
        return select_output(outputs, self.output)

    def join(self, params: PyTree, state: PyTree) -> PyTree:
        """Make one dict of all collections, as `module.apply` takes it."""
        return {**(params or {}), **(state or {})}

    def split(self, variables: Any) -> tuple[PyTree, PyTree]:
        """Split the collections by their roles."""
        if not isinstance(variables, Mapping):
            raise ValueError(
                "expected a dict of collections, as `module.init` and `get_variables` return it; received a "
                f"{type(variables).__name__}."
            )
        return self._roles.select(variables, TRAINABLE), self._roles.select(variables, STATE)

    def get_config(self) -> dict[str, Any]:
        """Return the fields as JSON, with a bound method by its name."""
        from flax import linen

        method = method_for_config(self.module, self.method, linen.Module)
        return {
            "module": serialize_callable(self.module, "module"),
            "method": serialize_callable(method, "method"),
            "collections": serialize(self._roles.given, "collections"),
            "rngs": serialize(None if self.rngs is None else dict(self.streams()), "rngs"),
            "training_argument": self.training_argument,
            "output": self.output,
            "capture": list(self.capture),
            "axis_rules": serialize(self.axis_rules, "axis_rules"),
        }

    @classmethod
    def fields_from_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields. A method that is named must be the module's own."""
        from flax import linen

        fields = super().fields_from_config(config)
        check_method(fields.get("module"), fields.get("method"), linen.Module)
        return fields


class LinenWithAllKeys(Linen):
    """The adapter of a layer whose class overrides `_get_call_rng`: its keys are passed in inference too."""

    passes_all_keys = True


@keras.saving.register_keras_serializable(package="jaxwrap")
class FlaxLayer(JaxLayer):
    """A Keras layer that computes a Flax Linen module, on every Keras backend.

    The contract is that of `keras.layers.FlaxLayer`, and more. The layer takes the arguments of the method, tensors by
    position or by keyword, other values by keyword. The method's train flag is Keras's `training`. Every RNG stream
    that the module draws from gets new keys at each call. In inference a module gets streams only if it fails without
    them, or `rngs` names them.

    Args:
        module: A `flax.linen.Module`.
        method: What to call: None for `__call__`, a method of `module`, its name, or a function that takes the module
            as its first argument.
        variables: Initial variables, as `module.init` returns them. They are copied. None to have `module.init` make
            them when the layer is built.
        collections: The roles of collections of variables, by name:

            - "trainable": parameters. The default for `params`.
            - "state": non-trainable state, if `module.init` makes it. The default for all not named here.
            - "loss": their sum is added to the model's loss, and `fit` shows each. The default for `losses`.
            - "metric": the model reports their means over batches. The default for `metrics`.
            - "output": the layer returns `(outputs, {name: collection})`.
            - "drop": not kept. The default for `intermediates`.
        rngs: The names of the RNG streams, or a dict with a seed for each, or None for the seed of the layer. By
            default any stream that the module asks for.
        training_argument: The train flag of the method. By default `training`, `train`, `is_training`, or the opposite,
            `deterministic`, `inference`, `use_running_average`. "train" names it, "!frozen" names an opposite one. With
            None the module's own default holds.
        output: The attribute, key or index of the one output to return. By default the layer returns all.
        capture: Regular expressions for whole paths of submodules, `("Dense_0", "encoder/.*")`. The layer then returns
            `(outputs, captured)`, where `captured` has the output of each of them by its path: a tuple for a module
            that runs more than once.
        axis_rules: What the logical names of axes in the module mean on the mesh of a `keras.distribution`, as pairs of
            a name and None, an axis or several: `(("batch", "data"), ("mlp", "model"))`. By default the rules of the
            context in which the layer is called.
        **kwargs: The other arguments of `JaxLayer`: `seed`, `rules`, `name`, `dtype`, ...

    Attributes:
        module: The module.
        method: The method, as passed.

    Raises:
        TypeError: If `module` is not a Linen module, or `variables` is not a dict.
        ValueError: For a role that does not exist, or if the method has no argument `training_argument`.

    Example:
        >>> import flax.linen as nn, numpy as np, jaxwrap
        >>> layer = jaxwrap.FlaxLayer(nn.Dense(4), name="dense")
        >>> tuple(layer(np.ones((2, 3), "float32")).shape)
        (2, 4)
        >>> sorted(variable.path for variable in layer.variables)[0]
        'dense/params/bias'
    """

    adapter_class = Linen
    adapter: Linen

    def __init__(
        self,
        module: linen.Module,
        method: Method = None,
        variables: PyTree = None,
        *,
        collections: Mapping[str, str] | None = None,
        rngs: Mapping[str, int | None] | Sequence[str] | None = None,
        training_argument: str | None = AUTO,
        output: str | int | None = None,
        capture: Sequence[str] = (),
        axis_rules: AxisRules = None,
        **kwargs: Any,
    ):
        overrides = type(self)._get_call_rng is not JaxLayer._get_call_rng
        with naming(describe(self, kwargs.get("name"))):
            adapter = (LinenWithAllKeys if overrides else Linen)(
                module,
                method,
                collections,
                rngs,
                training_argument,
                output,
                capture,
                axis_rules,
            )
            if variables is not None:
                if not isinstance(variables, Mapping):
                    raise TypeError(
                        "`variables` must be a dict of collections, as `module.init` returns it; received a "
                        f"{type(variables).__name__}."
                    )
                kwargs["params"], kwargs["state"] = adapter.split(variables)
        super().__init__(adapter, **kwargs)
        self.module, self.method = module, method


def _with_default_stream(keys: PyTree) -> PyTree:
    """Add the stream `params`, from which Linen draws for every stream that is missing."""
    if not keys or "params" in keys:
        return keys
    return {**keys, "params": jax.random.fold_in(next(iter(keys.values())), 1)}
