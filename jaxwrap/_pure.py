"""The pure functions of a layer: checked once, called by name, their results checked while JAX traces."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr

from jaxwrap._arguments import Arguments
from jaxwrap._pytree import is_leaf_array, path_str
from jaxwrap._signature import AUTO, Signature, find_train_flag, parameters_of
from jaxwrap._typing import Array, PyTree

_OWN_ARGUMENTS = ("params", "state", "rng")


@dataclasses.dataclass(frozen=True)
class CallResult:
    """What a `call_fn` may return instead of its outputs, or of `(outputs, new_state)`, to say more.

    Attributes:
        outputs: The outputs, a pytree of arrays.
        state: The new state, if `call_fn` takes `state`.
        losses: A pytree of arrays, the sums of which are added to the model's loss.
        metrics: A dict of arrays, whose means the model reports under these names, averaged over batches.

    Example:
        >>> import jax.numpy as jnp, numpy as np, jaxwrap
        >>> def call(params, inputs):
        ...     return jaxwrap.CallResult(inputs * params, losses=0.01 * jnp.abs(params))
        >>> layer = jaxwrap.JaxLayer(call, params=-2.0)
        >>> _ = layer(np.ones(3, "float32"))
        >>> len(layer.losses)
        1
    """

    outputs: PyTree
    state: PyTree = None
    losses: PyTree = None
    metrics: dict[str, Array] = dataclasses.field(default_factory=dict)


class PureFunctions:
    """A `call_fn` and the `init_fn` that makes its values.

    Attributes:
        arguments: What the caller feeds.
        has_rng: Whether `call_fn` takes `rng`.
        variables: Which of "params" and "state" `call_fn` takes.
    """

    def __init__(
        self,
        call_fn: Callable[..., Any],
        init_fn: Callable[..., Any] | None,
        call_arguments: Sequence[str],
        training_argument: str | None,
        packed: Arguments | None,
        owner: str,
    ):
        """Checks the functions.

        Args:
            call_fn: See `JaxLayer`.
            init_fn: Likewise, or None.
            call_arguments: Likewise.
            training_argument: Likewise.
            packed: What the caller feeds, if that is not `call_arguments`: the functions then get it all as a dict,
                `inputs`.
            owner: What errors begin with.

        Raises:
            TypeError: If one of them is not callable.
            ValueError: If an argument is missing, unknown or variadic.
        """
        self._call_fn, self._init_fn, self._owner = call_fn, init_fn, owner
        self._packed = packed is not None
        parameters = parameters_of(call_fn, "call_fn", owner)
        names = tuple(call_arguments)
        self._fed_by_keras = {}
        if "mask" in parameters and "mask" not in names and not packed:
            names = (*names, "mask")
            self._fed_by_keras = {"mask": None}
        self._flag = find_train_flag(parameters, training_argument, owner)
        flag = self._flag.name if self._flag else "training"
        allowed = dict.fromkeys((*_OWN_ARGUMENTS, *names, flag, "training"))
        self._call = Signature(call_fn, "call_fn", allowed, names, owner)
        unset = self._flag is None or flag != "training"
        if unset and _is_required(parameters.get("training")):
            raise ValueError(
                f"{owner}: `training_argument` is {training_argument!r}, so `training` of `call_fn` needs a default."
            )
        self._init = self._init_flag = None
        if init_fn is not None:
            init_parameters = parameters_of(init_fn, "init_fn", owner)
            # One that is named by hand is that of `call_fn`; `init_fn` need not have it.
            flag = None if training_argument == AUTO else self._flag
            if flag is None or flag.name in init_parameters:
                self._init_flag = find_train_flag(init_parameters, training_argument, owner)
            own = ("rng", *names, self._init_flag.name if self._init_flag else "training")
            required = [name for name in names if name == "inputs"]
            self._init = Signature(init_fn, "init_fn", own, required, owner)
        fed = [
            parameters[name].replace(default=None)
            if name in self._fed_by_keras
            else parameters[name]
            for name in names
        ]
        self.arguments = packed or Arguments(fed, owner)
        self.has_rng = "rng" in self._call
        self.variables = tuple(name for name in ("params", "state") if name in self._call)

    def init(self, rng: PyTree, arguments: dict[str, PyTree]) -> tuple[PyTree, PyTree]:
        """Calls `init_fn`; returns `(params, state)`."""
        assert self._init
        assert self._init_fn
        values = {"rng": rng, **self._fed(arguments)}
        if self._init_flag:
            values[self._init_flag.name] = self._init_flag.value(True)
        made = self._init.call(self._init_fn, values)
        if "state" in self.variables:
            return self._pair(made, "init_fn", "(params, state)")
        return made, None

    def call(
        self,
        params: PyTree,
        state: PyTree,
        rng: PyTree,
        arguments: dict[str, PyTree],
        training: bool,
    ) -> CallResult:
        """Calls `call_fn`."""
        values = {
            "params": params,
            "state": state,
            "rng": rng,
            **self._fed(arguments),
        }
        if self._flag:
            values[self._flag.name] = self._flag.value(training)
        result = self._call.call(self._call_fn, values)
        if not isinstance(result, CallResult):
            new_state = None
            if "state" in self.variables:
                result, new_state = self._pair(result, "call_fn", "(outputs, new_state)")
            result = CallResult(result, new_state)
        return CallResult(
            jax.tree_util.tree_map_with_path(self._to_array, result.outputs),
            result.state,
            _total(result.losses),
            {name: jnp.mean(value).astype(jnp.float32) for name, value in result.metrics.items()},
        )

    def _fed(self, arguments: dict[str, PyTree]) -> dict[str, PyTree]:
        """What the caller feeds, as the functions get it."""
        return {"inputs": arguments} if self._packed else {**self._fed_by_keras, **arguments}

    def _to_array(self, path: Any, output: Any) -> Array:
        if not is_leaf_array(output):
            raise TypeError(
                f"{self._owner}: `call_fn` returned {output!r}, a {type(output).__name__}, as output "
                f"{path_str(path)}; expected arrays."
            )
        return jnp.asarray(output)

    def _pair(self, result: Any, role: str, form: str) -> tuple[PyTree, PyTree]:
        sequence = isinstance(result, (tuple, list))
        if not sequence or len(result) != 2:
            length = f" of length {len(result)}" if sequence else ""
            raise ValueError(
                f"{self._owner}: `call_fn` takes `state`, so `{role}` must return {form}; it returned a "
                f"{type(result).__name__}{length}."
            )
        return result[0], result[1]


def call_and_tell(
    fn: Callable[[PyTree, PyTree], PyTree], keys: PyTree, rest: PyTree
) -> tuple[PyTree, bool]:
    """Calls a function of arrays, and tells whether its result depends on the keys.

    Returns:
        What `fn(keys, rest)` returns, and whether it depends on any array in `keys`.
    """
    count = len(jax.tree_util.tree_leaves(keys))
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(keys, rest)
    _, used = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    flat = jaxpr_as_fun(closed)(*jax.tree_util.tree_leaves((keys, rest)))
    return jax.tree_util.tree_structure(shapes).unflatten(flat), any(used[:count])


def _is_required(parameter: inspect.Parameter | None) -> bool:
    return parameter is not None and parameter.default is parameter.empty


def _total(losses: PyTree) -> Array | None:
    leaves = jax.tree_util.tree_leaves(losses)
    if not leaves:
        return None
    return sum(jnp.sum(leaf).astype(jnp.float32) for leaf in leaves)
