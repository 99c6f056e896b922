"""Haiku transforms."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import keras

from jaxwrap._errors import describe, naming
from jaxwrap._layer import Adapter, CallResult, JaxLayer
from jaxwrap._layer._signature import AUTO
from jaxwrap._serialization import serialize_by_name
from jaxwrap._typing import PyTree
from jaxwrap.adapters._arguments import ModuleArguments, select_output
from jaxwrap.adapters._libraries import require


@keras.saving.register_keras_serializable(package="jaxwrap")
@dataclasses.dataclass(frozen=True, eq=False)
class Haiku(Adapter):
    """The adapter of Haiku transforms. `HaikuLayer` documents the fields."""

    transformed: Any
    method: str | int | None = None
    training_argument: str | None = AUTO
    output: str | int | None = None

    def __post_init__(self) -> None:
        require("haiku", "0.0.13", distribution="dm-haiku")
        if not (hasattr(self.transformed, "init") and hasattr(self.transformed, "apply")):
            raise TypeError(
                f"expected the result of `hk.transform`, or of one of its kind; received {self.transformed!r}."
            )
        _ = self._arguments  # raises early

    @functools.cached_property
    def _apply(self) -> Callable[..., Any]:
        apply = self.transformed.apply
        if callable(apply) and self.method is None:
            return apply
        if callable(apply):
            raise ValueError("`method` is for `hk.multi_transform`; this is another transform.")
        names = list(apply) if isinstance(apply, dict) else list(range(len(apply)))
        if self.method not in names:
            raise ValueError(
                f"`method` must say which function of the multi-transform to apply, one of {names}; received "
                f"{self.method!r}."
            )
        return apply[self.method]

    @functools.cached_property
    def _passed(self) -> list[str]:
        """The names of what Haiku itself takes, before the arguments of the function, whatever those are called."""
        import haiku as hk

        with_state = (hk.TransformedWithState, hk.MultiTransformedWithState)
        has_state = isinstance(self.transformed, with_state)
        made_by = getattr(self._apply, "func", self._apply)  # of a multi-transform, a partial
        has_rng = not getattr(made_by, "__qualname__", "").startswith("without_apply_rng.")
        return ["params", *(["state"] if has_state else []), *(["rng"] if has_rng else [])]

    @functools.cached_property
    def _arguments(self) -> ModuleArguments:
        # The signature of `apply` loses arguments that are called as Haiku's own.
        original = getattr(self._apply, "_original_fn", None)
        if self.method is not None:
            # Haiku hides the arguments of the functions of a multi-transform.
            taken = dict(inspect.signature(lambda *args: None).parameters)
        elif original is not None:
            taken = dict(inspect.signature(original).parameters)
        else:
            parameters = list(inspect.signature(self._apply).parameters.values())
            taken = {p.name: p for p in parameters[len(self._passed) :]}
        return ModuleArguments(taken, self.training_argument, by_position=True)

    @property
    def draws(self) -> str:  # type: ignore[override]
        """Always, for a transform that takes an rng."""
        return "always" if "rng" in self._passed else "never"

    def signature(self) -> inspect.Signature:
        """The arguments of the function, without the train flag."""
        return self._arguments.signature

    def init(self, keys: PyTree, inputs: Mapping[str, PyTree]) -> tuple[PyTree, PyTree]:
        """Call `transformed.init`."""
        made = self._arguments.call(functools.partial(self.transformed.init, keys), inputs, True)
        return made if "state" in self._passed else (made, None)

    def call(
        self,
        params: PyTree,
        state: PyTree,
        keys: PyTree,
        inputs: Mapping[str, PyTree],
        training: bool,
    ) -> CallResult:
        """Call `transformed.apply`."""
        values = {"params": params, "state": state, "rng": keys}
        apply = functools.partial(self._apply, *(values[name] for name in self._passed))
        result = self._arguments.call(apply, inputs, training)
        outputs, new = result if "state" in self._passed else (result, None)
        return CallResult(select_output(outputs, self.output), new)

    def get_config(self) -> dict[str, Any]:
        """The fields as JSON. A transform is a pair of closures, which only a registered name can stand for."""
        transformed = serialize_by_name(
            self.transformed,
            "transformed",
            "has not been registered",
            'Register it, under a name: `jaxwrap.register_serializable("my_package", "my_net")(transformed)`',
        )
        return {
            "transformed": transformed,
            "method": self.method,
            "training_argument": self.training_argument,
            "output": self.output,
        }


@keras.saving.register_keras_serializable(package="jaxwrap")
class HaikuLayer(JaxLayer):
    """A Keras layer that computes a function transformed by Haiku, on every Keras backend.

    The layer takes the arguments of the function, tensors by position or by keyword, other values by keyword. The
    function's train flag, such as `is_training`, is Keras's `training`. A function that takes an rng gets a new key at
    each call, in inference too. A call in inference that does not draw changes no seed.

    Args:
        transformed: The result of `hk.transform`, `hk.transform_with_state`, `hk.without_apply_rng` or
            `hk.multi_transform`.
        params: Initial parameters, as `transformed.init` returns them. They are copied. None to have it make them when
            the layer is built.
        state: Likewise, the initial state.
        method: For `hk.multi_transform`, the name or the index of the function to apply.
        training_argument: The train flag of the function: see `FlaxLayer`.
        output: See `FlaxLayer`.
        **kwargs: The other arguments of `JaxLayer`: `seed`, `rules`, `name`, `dtype`, ...

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

    adapter_class = Haiku
    adapter: Haiku

    def __init__(
        self,
        transformed: Any,
        params: PyTree = None,
        state: PyTree = None,
        *,
        method: str | int | None = None,
        training_argument: str | None = AUTO,
        output: str | int | None = None,
        **kwargs: Any,
    ):
        with naming(describe(self, kwargs.get("name"))):
            adapter = Haiku(transformed, method, training_argument, output)
        super().__init__(adapter, params=params, state=state, **kwargs)
        self.transformed, self.method = transformed, method
