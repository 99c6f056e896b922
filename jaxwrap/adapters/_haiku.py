"""Haiku transforms."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import keras

from jaxwrap._serialization import name_of, serialize
from jaxwrap._signature import AUTO
from jaxwrap._typing import PyTree
from jaxwrap.adapters._module import ModuleLayer, require


@keras.saving.register_keras_serializable(package="jaxwrap")
class HaikuLayer(ModuleLayer):
    """A Keras layer that computes a function transformed by Haiku, on every Keras backend.

    The layer takes the arguments that the function takes, tensors by position or by keyword, other values by keyword.
    Of these, the function's train flag (`is_training`, say) is Keras's `training`. A function that takes an rng gets a
    new key at each call, in inference too; a call in inference that draws nothing changes no seed.

    Args:
        transformed: What `hk.transform`, `hk.transform_with_state`, `hk.without_apply_rng` or `hk.multi_transform`
            return.
        params: Initial parameters, as `transformed.init` returns them. They are copied. None to have it make them when
            the layer is built.
        state: Likewise, the initial state.
        method: For `hk.multi_transform`, the name or the index of the function to apply.
        training_argument: The train flag of the function: see `FlaxLayer`.
        **kwargs: What `JaxLayer` takes beside its functions and values: `seed`, `rules`, `name`, `dtype`, ...

    Attributes:
        transformed: The transformed function.
        method: As given.

    Raises:
        TypeError: If it is something else.
        ValueError: If a multi-transform comes without `method`, or `method` names none of its functions.

    Example:
        >>> import haiku as hk, numpy as np, jaxwrap
        >>> transformed = hk.transform(lambda x: hk.nets.MLP([8, 2])(x))
        >>> layer = jaxwrap.HaikuLayer(transformed, name="mlp")
        >>> tuple(layer(np.ones((3, 4), "float32")).shape), len(layer.trainable_variables)
        ((3, 2), 4)
    """

    _serialized = (*ModuleLayer._serialized, "transformed")

    def __init__(
        self,
        transformed: Any,
        params: PyTree = None,
        state: PyTree = None,
        *,
        method: str | int | None = None,
        training_argument: str | None = AUTO,
        **kwargs: Any,
    ):
        owner = self._describe(kwargs.get("name"))
        require("haiku", "0.0.13", "haiku", owner, distribution="dm-haiku")
        if not (hasattr(transformed, "init") and hasattr(transformed, "apply")):
            raise TypeError(
                f"{owner}: expected what `hk.transform` returns, or one of its kind; received {transformed!r}."
            )
        self._keep("transformed", transformed)
        self.method = method
        self._keep("_apply", self._find_apply(owner))
        self._keep("_module_argument", training_argument)
        parameters = inspect.signature(self._apply).parameters
        # What Haiku itself passes, before what the function takes.
        self._keep("_passed", [n for n in ("params", "state", "rng") if n in list(parameters)[:3]])
        taken = {name: p for name, p in parameters.items() if name not in self._passed}
        if method is not None:  # Haiku hides what the functions of a multi-transform take
            taken = inspect.signature(lambda *args: None).parameters
        self._takes(taken, training_argument)
        call_fn, init_fn = self._functions()
        super().__init__(call_fn, init_fn, params=params, state=state, **kwargs)

    def _find_apply(self, owner: str) -> Callable[..., Any]:
        apply = self.transformed.apply
        if callable(apply) and self.method is None:
            return apply
        if callable(apply):
            raise ValueError(
                f"{owner}: `method` is for `hk.multi_transform`; this is another transform."
            )
        names = list(apply) if isinstance(apply, dict) else list(range(len(apply)))
        if self.method not in names:
            raise ValueError(
                f"{owner}: `method` must say which function of the multi-transform to apply, one of {names}; received "
                f"{self.method!r}."
            )
        return apply[self.method]

    def _functions(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        def call(inputs: dict[str, PyTree], training: bool, **passed: PyTree) -> PyTree:
            values = [passed[name] for name in self._passed]
            return self._call_with(lambda *a, **k: self._apply(*values, *a, **k), inputs, training)

        def init(rng: PyTree, inputs: dict[str, PyTree]) -> PyTree:
            return self._call_with(
                lambda *a, **k: self.transformed.init(rng, *a, **k), inputs, True
            )

        # `params` only, or `rng` or `state` too: what the transform takes.
        parameters = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
            for name in (*self._passed, "inputs", "training")
        ]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return call, init

    def _get_call_rng(self, training: bool) -> PyTree:
        return self._get_call_seed()

    def _function_config(self) -> dict[str, Any]:
        if name_of(self.transformed) is None:
            raise TypeError(
                f"{self._owner} cannot be saved: `transformed` has not been registered. Register it, under a name: "
                '`jaxwrap.register_serializable("my_package", "my_net")(transformed)`.'
            )
        return {
            "transformed": serialize(self.transformed, "transformed", self._owner),
            "method": self.method,
            "training_argument": self._module_argument,
        }
