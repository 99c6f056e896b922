"""The pure functions of a layer: checked once, called by name, their results checked while JAX traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxwrap._pytree import is_leaf_array, path_str
from jaxwrap._signature import Signature
from jaxwrap._typing import Array, PyTree

_CALL_ARGUMENTS = ("params", "state", "rng", "inputs", "training")
_INIT_ARGUMENTS = ("rng", "inputs", "training")


class PureFunctions:
    """A `call_fn` and the `init_fn` that makes its values.

    Args:
        call_fn: See `JaxLayer`.
        init_fn: Likewise, or None.
        owner: What errors begin with.

    Attributes:
        has_rng: Whether `call_fn` takes `rng`.
        variables: Which of "params" and "state" `call_fn` takes.

    Raises:
        TypeError: If one of them is not callable.
        ValueError: If an argument is missing, unknown or variadic.
    """

    def __init__(self, call_fn: Callable[..., Any], init_fn: Callable[..., Any] | None, owner: str):
        self._call_fn, self._init_fn, self._owner = call_fn, init_fn, owner
        self._call = Signature(call_fn, "call_fn", _CALL_ARGUMENTS, ("inputs",), owner)
        self._init = init_fn and Signature(init_fn, "init_fn", _INIT_ARGUMENTS, ("inputs",), owner)
        self.has_rng = "rng" in self._call
        self.variables = tuple(name for name in ("params", "state") if name in self._call)

    def init(self, rng: PyTree, inputs: PyTree) -> tuple[PyTree, PyTree]:
        """Calls `init_fn`; returns `(params, state)`."""
        assert self._init
        assert self._init_fn
        made = self._init.call(self._init_fn, {"rng": rng, "inputs": inputs, "training": True})
        if "state" in self.variables:
            return self._pair(made, "init_fn", "(params, state)")
        return made, None

    def call(
        self, params: PyTree, state: PyTree, rng: PyTree, inputs: PyTree, training: bool
    ) -> tuple[PyTree, PyTree]:
        """Calls `call_fn`; returns `(outputs, new_state)`."""
        values = {
            "params": params,
            "state": state,
            "rng": rng,
            "inputs": inputs,
            "training": training,
        }
        outputs, new_state = self._call.call(self._call_fn, values), None
        if "state" in self.variables:
            outputs, new_state = self._pair(outputs, "call_fn", "(outputs, new_state)")
        return jax.tree_util.tree_map_with_path(self._to_array, outputs), new_state

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
