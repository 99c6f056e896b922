"""The vjp of a flat function in two halves, with few arrays to keep between them."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

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
# Up to this many bytes, to pass an array on takes longer than to copy it.
_SMALL = 1 << 16


def _is_worth_keeping(primitive: Any, *operands: Any, **_: Any) -> bool:
    return primitive.name not in _CHEAP or any(map(_is_large, operands))


def _is_large(array: Any) -> bool:
    # A size is a symbol while TensorFlow's graph does not know it.
    return isinstance(array.size, int) and array.size * array.dtype.itemsize > _SMALL


def _vectors(indices: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Divide small gradients among vectors, by size. Who keeps one keeps its vector, so that is small too."""
    groups: list[list[int]] = []
    total = 0
    for index in sorted(indices, key=lambda index: sizes[index]):
        total += sizes[index]
        if not groups or total > _SMALL:
            groups.append([])
            total = sizes[index]
        groups[-1].append(index)
    return groups


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
        gradients = self.gradients(*arrays)
        # Each array that crosses to the backend costs microseconds, so small gradients of one dtype go together.
        small: dict[Any, list[int]] = {}
        for index, gradient in enumerate(gradients):
            if gradient.size and not _is_large(gradient):
                small.setdefault(gradient.dtype, []).append(index)
        sizes = [gradient.nbytes for gradient in gradients]
        split = (group for each in small.values() for group in _vectors(each, sizes))
        groups = tuple(tuple(group) for group in split if len(group) > 1)
        packed = {index for group in groups for index in group}
        alone = tuple(index for index in range(len(gradients)) if index not in packed)
        vectors = [
            jnp.concatenate([gradients[index].reshape(-1) for index in group]) for group in groups
        ]
        return vectors, [gradients[index] for index in alone], Static((groups, alone))
