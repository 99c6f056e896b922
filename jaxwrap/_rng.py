"""Keras seeds → JAX keys."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import keras
import numpy as np

from jaxwrap._bridge import get_bridge
from jaxwrap._typing import Array, Tensor

# Initial values are drawn from counters that calls do not reach.
_INIT_COUNTER = 1 << 31


def to_key(seed: Tensor, impl: str | None = None) -> Array:
    """Makes a JAX key of a Keras seed.

    Keras keeps `[seed, counter]`, in a dtype that depends on the backend; as two 32-bit words it is the data of a
    threefry key, new for each count. The same seed thus gives the same numbers on every backend. Implementations with
    longer keys get the two words again and again, as JAX does for `rbg`.

    Args:
        seed: An integer array of shape (2,).
        impl: The implementation, such as "threefry2x32" or "rbg".

    Returns:
        A typed key of that implementation; for None, a raw key of JAX's default one, as `jax.random.PRNGKey` makes it.
    """
    words = jnp.asarray(seed).astype(jnp.uint32)
    (size,) = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl))).shape
    data = jnp.tile(words, -(-size // 2))[:size]
    return data if impl is None else jax.random.wrap_key_data(data, impl=impl)


def check_impl(impl: str | None, owner: str) -> None:
    """Raises ValueError for the name of a key implementation that JAX does not have."""
    try:
        jax.eval_shape(lambda: jax.random.key(0, impl=impl))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{owner}: `key_impl` must be one of JAX's key implementations, such as 'threefry2x32' or 'rbg', or None; "
            f"received {impl!r}."
        ) from error


def init_seed(seed: int, count: int) -> np.ndarray:
    """The seed, of shape (2,), of the `count`-th draw of initial values."""
    return np.array([seed % (1 << 32), _INIT_COUNTER + count], "uint32")


class Generator(keras.random.SeedGenerator):
    """A Keras seed generator that can be drawn from while JAX traces: see `drawing`."""

    def __init__(self, seed: int, name: str):
        super().__init__(seed, name=name)
        self._steps: dict[int, Tensor] = {}

    def next(self, ordered: bool = True) -> Tensor:
        """A new seed, of shape (2,)."""
        draws = getattr(_drawing, "draws", {})
        if self not in draws:
            return super().next(ordered)
        state, count = draws[self]
        draws[self] = state, count + 1
        return state + jnp.array([0, count], state.dtype)

    def after(self, count: int) -> Tensor:
        """What that many draws leave the state at."""
        state = self.state.value
        step = self._steps.get(count)
        if step is None or step.device != getattr(state, "device", None):
            step = keras.ops.convert_to_tensor(np.array([0, count]), self.state.dtype)
            if get_bridge().is_concrete(step):
                self._steps[count] = step
        return state + step


_drawing = threading.local()


class Draws(dict[Generator, tuple[Array, int]]):
    """The state from which each generator draws, and how often it has."""

    def counts(self) -> tuple[int, ...]:
        """How often each generator has been drawn from."""
        return tuple(count for _, count in self.values())


@contextlib.contextmanager
def drawing(generators: Sequence[Generator], states: Sequence[Array]) -> Iterator[Draws]:
    """In here, generators draw from these states, JAX arrays, and change nothing but the count in what this yields."""
    before = getattr(_drawing, "draws", {})
    draws = Draws((g, (state, 0)) for g, state in zip(generators, states, strict=True))
    _drawing.draws = draws
    try:
        yield draws
    finally:
        _drawing.draws = before
