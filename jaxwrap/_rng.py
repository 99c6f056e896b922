"""Keras seeds → JAX keys."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import keras
import numpy as np

from jaxwrap._typing import Array, PyTree, Tensor

# Initial values are drawn from counters that calls do not reach.
_INIT_COUNTER = 1 << 31


def to_key(seed: Tensor) -> Array:
    """Makes a JAX key of a Keras seed.

    Keras keeps `[seed, counter]`, in a dtype that depends on the backend; as two 32-bit words it is the data of a
    threefry key, new for each count. The same seed thus gives the same numbers on every backend.

    Args:
        seed: An integer array of shape (2,).

    Returns:
        A key as `jax.random.PRNGKey` makes it: uint32, of shape (2,).
    """
    return jnp.asarray(seed).astype(jnp.uint32)


def init_seed(seed: int, count: int) -> np.ndarray:
    """The seed, of shape (2,), of the `count`-th draw of initial values."""
    return np.array([seed % (1 << 32), _INIT_COUNTER + count], "uint32")


def draw(
    state: keras.Variable, make: Callable[[], PyTree]
) -> tuple[PyTree, list[tuple[keras.Variable, Tensor]]]:
    """Draws seeds without changing the generator.

    Args:
        state: The variable of the generator.
        make: Draws the seeds from it.

    Returns:
        What `make` returns, and the pairs of variable and value to assign once the seeds have served.
    """
    with keras.StatelessScope(state_mapping=[(state, state.value)]) as scope:
        before = scope.get_current_value(state)
        seeds = make()
        after = scope.get_current_value(state)
    return seeds, [] if after is before else [(state, after)]
