"""The vjp of a flat function in two halves, with few arrays to keep between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxwrap._bridge._base import conjugate, restrict
from jaxwrap._typing import Array, FlatFunction, FlatResult, Static

# What takes less time to compute again, within what XLA fuses, than to write and to pass on as one more small array.
_CHEAP_NAMES = """
    abs add add_any and broadcast_in_dim ceil clamp convert_element_type copy cos div erf exp exp2 expand_dims expm1
    floor integer_pow iota log log1p logistic max min mul neg not or pow reduce_max reduce_min reduce_sum reshape rsqrt
    select_n sign sin sqrt square squeeze stop_gradient sub tanh transpose xor
"""
_CHEAP = frozenset(_CHEAP_NAMES.split())
# The bytes up to which an array takes longer to be passed on than to be copied.
_SMALL = 1 << 16


def _is_worth_keeping(primitive: Any, *operands: Any, **_: Any) -> bool:
    return primitive.name not in _CHEAP or any(map(_is_large, operands))


def _is_large(array: Any) -> bool:
    # A size is no number while TensorFlow's graph has it unknown.
    return isinstance(array.size, int) and array.size * array.dtype.itemsize > _SMALL


class Linearized:
    """A flat function that returns its result, the residuals of its vjp, and, as `Static`, the `Pullback`.

    Small residuals that are cheap to compute are computed again (`jax.checkpoint`): a layer of many small operations
    would otherwise have several for each of its parameters.
    """

    def __init__(self, fn: FlatFunction, wrt: tuple[int, ...], states: Sequence[int]):
        """Takes the function.

        Args:
            fn: The flat function.
            wrt: The arguments for which gradients are wanted.
            states: Those that will have been overwritten when they are.
        """
        self._fn = fn
        self._wrt = wrt
        self._states = states

    def __call__(self, *arrays: Array) -> tuple[FlatResult, list[Array], Static]:
        restricted, primals = restrict(self._fn, self._wrt, arrays)
        try:
            frugal = jax.checkpoint(restricted, policy=_is_worth_keeping, prevent_cse=False)
            floats, pullback, (others, aux, static) = jax.vjp(frugal, *primals, has_aux=True)
        except (NotImplementedError, TypeError):
            # JAX does not do that with some effects, nor with complex numbers.
            floats, pullback, (others, aux, static) = jax.vjp(restricted, *primals, has_aux=True)
        remaining = iter(floats)
        outputs = tuple(next(remaining) if other is None else other for other in others)
        leaves, structure = jax.tree_util.tree_flatten(pullback)
        # An argument need not be returned to be had again, unless it will have been overwritten.
        arguments = {id(array): index for index, array in enumerate(arrays)}
        places = [arguments.get(id(leaf)) for leaf in leaves]
        keys = {
            index: jax.random.key_impl(leaf)
            for index, leaf in enumerate(leaves)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        }
        residuals = []
        for index, leaf in enumerate(leaves):
            if places[index] in self._states:
                residuals.append(jnp.copy(leaf))
                places[index] = None
            elif places[index] is None:
                residuals.append(jax.random.key_data(leaf) if index in keys else leaf)
        pullback_of = Pullback(structure, places, keys)
        return FlatResult(outputs, aux, static), residuals, Static(pullback_of)


class Pullback:
    """What makes gradients of cotangents, given the arguments and the residuals of the forward call.

    Attributes:
        arguments: Which of the arguments of the forward call it needs.
    """

    def __init__(self, structure: Any, places: Sequence[int | None], keys: Mapping[int, Any]):
        self._structure = structure
        self._places = places
        self._keys = keys
        self.arguments = sorted({place for place in places if place is not None})
        self._jitted = jax.jit(self._pack)

    def gradients(self, *arrays: Array) -> list[Array]:
        """Takes these arguments, the residuals and the cotangents; returns the gradients."""
        remaining = iter(arrays)
        arguments = {index: next(remaining) for index in self.arguments}
        leaves = [next(remaining) if place is None else arguments[place] for place in self._places]
        for index, impl in self._keys.items():
            leaves[index] = jax.random.wrap_key_data(leaves[index], impl=impl)
        pullback = jax.tree_util.tree_unflatten(self._structure, leaves)
        gradients = pullback([conjugate(cotangent) for cotangent in remaining])
        return [conjugate(gradient) for gradient in gradients]

    def packed(self, *arrays: Array) -> tuple[dict[tuple[int, ...], Array], dict[int, Array]]:
        """What `gradients` returns, in fewer arrays, compiled.

        Returns:
            Gradients by their indices: the small ones of a dtype in one vector, one after the other; and the others.
        """
        vectors, others, static = self._jitted(*arrays)
        return dict(zip(static.value[0], vectors, strict=True)), dict(
            zip(static.value[1], others, strict=True)
        )

    def _pack(self, *arrays: Array) -> tuple[list[Array], list[Array], Static]:
        gradients = self.gradients(*arrays)
        small: dict[Any, list[int]] = {}
        for index, gradient in enumerate(gradients):
            if gradient.size and not _is_large(gradient):
                small.setdefault(gradient.dtype, []).append(index)
        groups = tuple(tuple(group) for group in small.values() if len(group) > 1)
        packed = {index for group in groups for index in group}
        alone = tuple(index for index in range(len(gradients)) if index not in packed)
        vectors = [
            jnp.concatenate([gradients[index].reshape(-1) for index in group]) for group in groups
        ]
        return vectors, [gradients[index] for index in alone], Static((groups, alone))
