"""The vjp of a flat function in two halves, with few arrays to keep between them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxwrap._bridge._packing import is_large, pack
from jaxwrap._bridge._vjp import conjugate, restrict
from jaxwrap._typing import Array, FlatFunction, FlatResult, Static

# A call on PyTorch or in a TensorFlow graph is two functions, compiled apart:
#
#   forward(arguments)                       backward(arguments, residuals, cotangents)
#     jax.vjp(fn) ─▶ outputs                   pullback = structure + leaves
#                 └▶ pullback, a pytree        pullback(cotangents) ─▶ gradients
#                      │ leaves:                        ▲
#                      ├ an argument as it is ──────────┤ the caller has it: its place is enough
#                      ├ state, overwritten until then ─┤ copied
#                      ├ a small, cheap value ──────────┤ not kept: `jax.checkpoint` computes it again
#                      └ anything else ─────────────────┘ a residual, passed on
#
# Each array that is passed on costs microseconds, so small ones that are cheap to compute are not worth it.

# Primitives that take less time to compute again, inside one fusion of XLA, than to write and to pass on.
_CHEAP_NAMES = """
    abs add add_any and broadcast_in_dim ceil clamp convert_element_type copy cos div erf exp exp2 expand_dims expm1
    floor integer_pow iota log log1p logistic max min mul neg not or pow reduce_max reduce_min reduce_sum reshape rsqrt
    select_n sign sin sqrt square squeeze stop_gradient sub tanh transpose xor
"""
_CHEAP = frozenset(_CHEAP_NAMES.split())


def _is_worth_keeping(primitive: Any, *operands: Any, **_: Any) -> bool:
    return primitive.name not in _CHEAP or any(map(is_large, operands))


class Linearized:
    """A flat function that returns its result, the residuals of its vjp, and the place of the `Pullback` as `Static`.

    Attributes:
        pullbacks: The pullback of each trace.
    """

    def __init__(self, fn: FlatFunction, wrt: tuple[int, ...], states: Sequence[int]):
        """Take the function.

        Args:
            fn: The flat function.
            wrt: The arguments to differentiate.
            states: The arguments that are overwritten before the backward call.
        """
        self._fn = fn
        self._wrt = wrt
        self._states = states
        self.pullbacks: list[Pullback] = []
        self._lock = threading.Lock()

    def __call__(self, *arrays: Array) -> tuple[FlatResult, list[Array], Static]:
        restricted, primals = restrict(self._fn, self._wrt, arrays)
        # Forward and backward are compiled apart, so XLA cannot merge what both compute. The barriers of `prevent_cse`
        # would cost time for nothing.
        try:
            frugal = jax.checkpoint(restricted, policy=_is_worth_keeping, prevent_cse=False)
            floats, pullback, (others, aux, static) = jax.vjp(frugal, *primals, has_aux=True)
        except (NotImplementedError, TypeError):
            # `jax.checkpoint` refuses some effects, and complex numbers.
            floats, pullback, (others, aux, static) = jax.vjp(restricted, *primals, has_aux=True)
        remaining = iter(floats)
        outputs = tuple(next(remaining) if other is None else other for other in others)
        leaves, structure = jax.tree_util.tree_flatten(pullback)
        # The caller still has the arguments, so their places are enough.
        arguments = {id(array): index for index, array in enumerate(arrays)}
        places = [arguments.get(id(leaf)) for leaf in leaves]
        # A typed key has no form outside of JAX. Its data have, and `Pullback` makes a key of them again.
        keys = {
            index: jax.random.key_impl(leaf)
            for index, leaf in enumerate(leaves)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        }
        residuals = []
        for index, leaf in enumerate(leaves):
            if places[index] in self._states:
                # The caller writes the new state into this memory before the backward call.
                residuals.append(jnp.copy(leaf))
                places[index] = None
            elif places[index] is None:
                residuals.append(jax.random.key_data(leaf) if index in keys else leaf)
        # Two threads may trace at once, and `append` alone gives no place.
        with self._lock:
            self.pullbacks.append(Pullback(structure, places, keys))
            place = len(self.pullbacks) - 1
        # A number, since JAX's caches keep `Static`, and a pullback holds what is compiled for it.
        return FlatResult(outputs, aux, static), residuals, Static(place)


class Pullback:
    """Computes gradients from cotangents, and the arguments and residuals of the forward call.

    Attributes:
        arguments: The places of the arguments that it needs.
    """

    def __init__(self, structure: Any, places: Sequence[int | None], keys: Mapping[int, Any]):
        self._structure = structure
        self._places = places
        self._keys = keys
        self.arguments = sorted({place for place in places if place is not None})
        self._jitted = jax.jit(self._pack)

    def gradients(self, *arrays: Array) -> list[Array]:
        """Take these arguments, the residuals and the cotangents, and return the gradients."""
        remaining = iter(arrays)
        arguments = {index: next(remaining) for index in self.arguments}
        leaves = [next(remaining) if place is None else arguments[place] for place in self._places]
        for index, impl in self._keys.items():
            leaves[index] = jax.random.wrap_key_data(leaves[index], impl=impl)
        pullback = jax.tree_util.tree_unflatten(self._structure, leaves)
        # JAX's cotangents of complex numbers are the conjugates of those of TensorFlow and PyTorch.
        gradients = pullback([conjugate(cotangent) for cotangent in remaining])
        return [conjugate(gradient) for gradient in gradients]

    def packed(self, *arrays: Array) -> tuple[dict[tuple[int, ...], Array], dict[int, Array]]:
        """Compute `gradients` compiled, in fewer arrays.

        Returns:
            Gradients by their indices: the small ones of each dtype in vectors, and the others.
        """
        vectors, others, static = self._jitted(*arrays)
        return dict(zip(static.value[0], vectors, strict=True)), dict(
            zip(static.value[1], others, strict=True)
        )

    def _pack(self, *arrays: Array) -> tuple[list[Array], list[Array], Static]:
        return pack(self.gradients(*arrays))
